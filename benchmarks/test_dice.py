"""Dice by itself, forward and forward+backward in training: the reference, torch.compile of it, Dice written over
torch's BatchNorm (as most libraries have it), and other libraries' own modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import din_kernels
from din_kernels.testing import tolerance
from reference import units

from . import peers
from .arena import Arena, Contestant, Expected, Options, Race
from .record import FIRST
from .roofline import dice_floor
from .workloads import DICE, DICE_CPU, DiceWorkload


@dataclasses.dataclass
class DiceInputs:
    x: Tensor
    grad: Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    workload: DiceWorkload
    measure: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.workload.name}-{self.measure}-{str(self.dtype).removeprefix('torch.')}"


class BatchNormDice(nn.Module):
    """Dice over ``nn.BatchNorm1d``, whose backward is one fused kernel of torch's."""

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(alpha.clone())
        self.norm = nn.BatchNorm1d(alpha.numel(), eps=1e-8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.norm(x))
        return x * (self.alpha + (1 - self.alpha) * p)


def cases(options: Options) -> list[Case]:
    gpu = options.device.type == "cuda"
    measures = ("forward", "forward+backward")
    if options.smoke:
        return [Case(DiceWorkload("smoke", 12, 6), m) for m in measures]
    dtypes = (torch.float32, torch.bfloat16) if gpu and not options.quick else (torch.float32,)
    shapes = list((DICE if gpu else DICE_CPU).values())[: 1 if options.quick and not gpu else None]
    return [
        Case(w, m, dtype) for w in shapes for dtype in dtypes for m in (measures[1:] if options.quick else measures)
    ]


def _call(module: Callable[[Tensor], Tensor], alpha: Tensor, measure: str) -> Callable[[DiceInputs], Sequence[Tensor]]:
    def infer(inputs: DiceInputs) -> Sequence[Tensor]:
        with torch.no_grad():
            return (module(inputs.x),)

    def train(inputs: DiceInputs) -> Sequence[Tensor]:
        y = module(inputs.x)
        return y, *torch.autograd.grad(y, (inputs.x, alpha), inputs.grad)

    return infer if measure == "forward" else train


def _named(result: Sequence[Tensor], inputs: DiceInputs) -> dict[str, Tensor]:
    return dict(zip(("result", "x", "alpha"), result, strict=False))


def test_dice(arena: Arena, benchmark: Any, case: Case) -> None:
    workload, measure, dtype, device = case.workload, case.measure, case.dtype, arena.device
    generator = torch.Generator(device).manual_seed(0)
    alpha = torch.randn(workload.channels, generator=generator, device=device) * 0.25

    def inputs_of() -> DiceInputs:
        x, grad = (
            torch.randn(workload.rows, workload.channels, generator=generator, device=device).to(dtype)
            for _ in range(2)
        )
        return DiceInputs(x.requires_grad_(measure != "forward"), grad)

    first = inputs_of()
    inputs = [first, *(inputs_of() for _ in range(1, arena.copies(2 * first.x.numel() * first.x.element_size())))]

    def with_alpha(module: nn.Module) -> nn.Module:
        module.to(device, torch.float32 if dtype == torch.bfloat16 else dtype).train()
        with torch.no_grad():
            module.alpha.copy_(alpha)  # type: ignore[operator]
        return module

    def reference(compiled: bool) -> Callable[[DiceInputs], Sequence[Tensor]]:
        module = with_alpha(units.Dice(workload.channels))
        called = torch.compile(module, dynamic=False) if compiled else module
        return _call(called, module.alpha, measure)  # type: ignore[arg-type]

    def fused(compiled: bool = False) -> Callable[[DiceInputs], Sequence[Tensor]]:
        module = with_alpha(din_kernels.Dice(workload.channels))
        called = torch.compile(module, dynamic=False) if compiled else module
        return _call(called, module.alpha, measure)  # type: ignore[arg-type]

    def batch_norm(compiled: bool) -> Callable[[DiceInputs], Sequence[Tensor]]:
        module = BatchNormDice(alpha).to(device).train()
        called = torch.compile(module, dynamic=False) if compiled else module
        return _call(called, module.alpha, measure)

    def of_peer(build: Callable[[int], nn.Module]) -> Callable[[DiceInputs], Sequence[Tensor]]:
        module = with_alpha(build(workload.channels))
        return _call(module, module.alpha, measure)  # type: ignore[arg-type]

    exact = units.Dice(workload.channels).to(device, torch.float64)
    with torch.no_grad():
        exact.alpha.copy_(alpha)
    x = first.x.detach().double().requires_grad_()
    y = exact(x)
    rows = tolerance(dtype, length=workload.rows, stages=4)
    expected = {"result": Expected(y.detach(), rows)}
    if measure != "forward":
        dx, dalpha = torch.autograd.grad(y, (x, exact.alpha), first.grad.double())
        expected |= {"x": Expected(dx, rows), "alpha": Expected(dalpha, rows)}
    cached = first.x.numel() * first.x.element_size() <= arena.machine.cache / 2
    floor = dice_floor(workload, dtype, cached=cached)
    if measure != "forward":
        floor = floor + dice_floor(workload, dtype, backward=True, cached=cached)
    race = Race(
        "dice", workload.name, measure, dtype, inputs, expected, floor,
        details={"rows": workload.rows, "channels": workload.channels, "copies": len(inputs)},
    )  # fmt: skip
    contestants = [
        Contestant(FIRST, fused, _named),
        Contestant("fused, compiled", lambda: fused(True), _named, compiled=True),
        Contestant("eager", lambda: reference(False), _named),
        Contestant("over BatchNorm", lambda: batch_norm(False), _named),
        Contestant("compiled", lambda: reference(True), _named, compiled=True),
        Contestant("over BatchNorm, compiled", lambda: batch_norm(True), _named, compiled=True),
    ]
    contestants += [Contestant(name, functools.partial(of_peer, build), _named) for name, build in peers.DICE.items()]
    arena.race(race, contestants, benchmark)
