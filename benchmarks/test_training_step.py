"""A whole training step of the reference DIN: embeddings, unit, MLP, loss, mini-batch-aware penalty, backward, SGD.

``eager`` is the reference trainer's step: jagged rows, unfused modules, dense gradients of the tables, the penalty through
autograd. ``padded`` is the same with the behaviours padded for the unit, as libraries do. ``fused`` has the fused unit and
Dice, ``MBAEmbedding`` tables and ``SparseSGD``, which applies the penalty to the rows of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from din_kernels import MBAEmbedding
from din_kernels.optim import SparseSGD
from din_kernels.testing import tolerance
from reference.data import Batch
from reference.models import DIN, ModelConfig, Schema
from reference.regularizers import RowPenalty

from .arena import Arena, Contestant, Expected, Options, Race
from .record import FIRST
from .test_sparse_update import delta_expected
from .workloads import STEP, STEP_CPU, Lengths, StepWorkload

LR, LAMBDA = 0.1, 0.01
MEASURE = "step"


@dataclasses.dataclass(frozen=True)
class Case:
    workload: StepWorkload

    def __str__(self) -> str:
        return self.workload.name


def cases(options: Options) -> list[Case]:
    shapes = list((STEP if options.device.type == "cuda" else STEP_CPU).values())
    if options.smoke:
        shapes = [
            dataclasses.replace(
                w, batch=6, lengths=Lengths("uniform", 1, 4), items=50, categories=7, field_dim=4,
                unit_hidden=(4,) * len(w.unit_hidden), mlp_hidden=(8, 4),
            )
            for w in shapes
        ]  # fmt: skip
    return [Case(w) for w in shapes]


class PaddedUnit(nn.Module):
    """A unit that takes jagged rows and pads them before it works, as every library without jagged layouts does."""

    def __init__(self, unit: nn.Module, longest: int) -> None:
        super().__init__()
        self.unit, self.longest = unit, longest

    def forward(self, query: Tensor, keys: Tensor, offsets: Tensor) -> Tensor:
        lengths = offsets[1:] - offsets[:-1]
        mask = torch.arange(self.longest, device=keys.device) < lengths.unsqueeze(1)
        padded = keys.new_zeros(len(lengths), self.longest, keys.shape[1]).masked_scatter(mask.unsqueeze(-1), keys)
        return self.unit(query, padded, lengths=lengths)


def make_batch(workload: StepWorkload, device: torch.device, value_seed: int) -> Batch:
    """Lengths of the workload; items by a Zipf-like law (squared uniform), each in one category."""
    generator = torch.Generator().manual_seed(value_seed)
    lengths = workload.lengths.sample(workload.batch)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    def items(count: int) -> Tensor:
        return (torch.rand(count, generator=generator).square() * workload.items).long().clamp(max=workload.items - 1)

    item, history = items(workload.batch), items(int(offsets[-1]))
    label = torch.randint(0, 2, (workload.batch,), generator=generator).float()
    none = torch.zeros(workload.batch, 0, dtype=torch.int64)
    user = torch.zeros(workload.batch, dtype=torch.int64)
    batch = Batch(user, item, item % workload.categories, none, label, history, history % workload.categories, offsets)
    return batch.to(device)


def step_of(
    model: DIN,
    called: Callable[[Batch], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    penalty: RowPenalty | None,
) -> Callable[[Batch], tuple[Tensor, ...]]:
    parameters = list(model.parameters())

    def step(batch: Batch) -> tuple[Tensor, ...]:
        loss = nn.functional.binary_cross_entropy_with_logits(called(batch), batch.label.to(parameters[0].dtype))
        extra = None if penalty is None else penalty.penalty(model, batch)
        total = loss if extra is None else loss + extra
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach(), *parameters

    return step


def test_training_step(arena: Arena, benchmark: Any, case: Case) -> None:
    workload, device = case.workload, arena.device
    schema = Schema(workload.items, workload.categories)
    config = ModelConfig(
        field_dim=workload.field_dim, unit_hidden=workload.unit_hidden, mlp_hidden=workload.mlp_hidden,
        activation=workload.activation, interaction=workload.interaction,
    )  # fmt: skip
    torch.manual_seed(0)
    start = DIN(schema, config).state_dict()
    generator = torch.Generator().manual_seed(1)
    counts = [torch.randint(1, 100, (n,), generator=generator) for n in (workload.items, workload.categories)]
    first = make_batch(workload, device, 0)
    size = first.history_item.numel() * workload.field_dim * 8
    inputs = [first, *(make_batch(workload, device, seed) for seed in range(1, arena.copies(size)))]

    def unfused(dtype: torch.dtype = torch.float32) -> tuple[DIN, RowPenalty]:
        model = DIN(schema, config).to(device, dtype)
        model.load_state_dict(start)
        item, category = ((1.0 / n).to(device, dtype) for n in counts)
        return model, RowPenalty(LAMBDA, (item, category))

    def eager(compiled: bool, padded: bool = False) -> Callable[[Batch], tuple[Tensor, ...]]:
        model, penalty = unfused()
        if padded:
            model.unit = PaddedUnit(model.unit, workload.lengths.high)
        called = torch.compile(model, dynamic=False) if compiled else model
        return step_of(model, called, [torch.optim.SGD(model.parameters(), lr=LR)], penalty)

    def fused() -> Callable[[Batch], tuple[Tensor, ...]]:
        model = DIN(schema, dataclasses.replace(config, fused=True)).to(device)
        model.load_state_dict(start)
        items = model.items
        items.item, items.category = (
            MBAEmbedding(len(table.weight), config.field_dim, n.to(device), _weight=table.weight.detach())
            for table, n in zip((items.item, items.category), counts, strict=True)
        )
        tables = [items.item.weight, items.category.weight]
        rest = [p for p in model.parameters() if all(p is not t for t in tables)]
        optimizers = [SparseSGD(tables, lr=LR, regularizer="mba", reg_lambda=LAMBDA), torch.optim.SGD(rest, lr=LR)]
        return step_of(model, model, optimizers, None)

    names = [name for name, _ in DIN(schema, config).named_parameters()]

    def named(result: tuple[Tensor, ...], _: Batch) -> dict[str, Tensor]:
        loss, *parameters = result
        changes = {
            name: p.detach().to(p.device, torch.float64) - start[name].to(p.device)
            for name, p in zip(names, parameters, strict=True)
        }
        return {"result": loss, **changes}

    exact, penalty = unfused(torch.float64)
    loss, *after = step_of(exact, exact, [torch.optim.SGD(exact.parameters(), lr=LR)], penalty)(first)
    rows = first.history_item.numel()
    base = tolerance(torch.float32, length=rows, stages=4 * (len(workload.unit_hidden) + len(workload.mlp_hidden)))
    expected = {"result": Expected(loss, base)}
    for name, value in zip(names, after, strict=True):
        expected[name] = delta_expected(start[name].to(device), value.detach(), base)
    race = Race(
        "training_step", workload.name, MEASURE, torch.float32, inputs, expected,
        details={
            "batch": workload.batch, "rows": rows, "padded_rows": workload.batch * workload.lengths.high,
            "dim": 2 * workload.field_dim, "hidden": "-".join(map(str, workload.unit_hidden)),
            "interaction": workload.interaction, "activation": workload.activation, "items": workload.items,
            "copies": len(inputs),
        },
    )  # fmt: skip
    contestants = [
        Contestant(FIRST, fused, named),
        Contestant("eager", lambda: eager(False), named),
        Contestant("padded", lambda: eager(False, padded=True), named),
        Contestant("compiled", lambda: eager(True), named, compiled=True),
        Contestant("padded, compiled", lambda: eager(True, padded=True), named, compiled=True),
    ]
    arena.race(race, contestants, benchmark)
