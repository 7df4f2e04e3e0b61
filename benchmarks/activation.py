"""Contestants of the local activation races, and the float64 result they are held to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import din_kernels
from din_kernels.testing import tolerance
from reference import units

from . import peers
from .arena import Arena, Contestant, Expected, Race
from .record import FIRST
from .roofline import activation_floor
from .workloads import ActivationInputs, ActivationWorkload, make_activation

MEASURES = ("forward", "forward+backward")
Forward = Callable[[ActivationInputs], Tensor]  # pooled, [B, D] or [B, C, D]


def linears_of(unit: nn.Module) -> list[nn.Linear]:
    """The unit's linear layers, typed."""
    return [cast(nn.Linear, linear) for linear in cast(nn.ModuleList, unit.linears)]


class FactorisedPadded(nn.Module):
    """The strongest plain-PyTorch form: padded, but with the first layer factorised per sample (A_b e + c_b), so that
    neither the concatenation nor the outer product exists. Shares the parameters of ``unit``."""

    def __init__(self, unit: units.LocalActivationUnit) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        unit = self.unit
        many = query.dim() == 3
        v = query if many else query.unsqueeze(1)  # [B, C, D]
        mask = (torch.arange(keys.shape[1], device=keys.device) < lengths.unsqueeze(1)).unsqueeze(1)  # [B, 1, T]
        first, *later = linears_of(unit)
        dim, width = keys.shape[-1], first.weight.shape[0]
        if unit.interaction == "product":
            of_query, of_key, of_difference, of_product = first.weight.view(width, 4, dim).unbind(1)
            matrix = (of_key - of_difference) + of_product * v.unsqueeze(2)  # [B, C, H, D]
            constant = nn.functional.linear(v, of_query + of_difference, first.bias)
        else:
            of_key, of_outer, of_query = first.weight.split([dim, dim * dim, dim], dim=1)
            outer = v @ of_outer.reshape(width * dim, dim).T  # vec(key ⊗ query) has the query's index fast
            matrix = of_key + outer.view(*v.shape[:2], width, dim)
            constant = nn.functional.linear(v, of_query, first.bias)
        hidden = keys.unsqueeze(1) @ matrix.transpose(-1, -2) + constant.unsqueeze(2)  # [B, C, T, H]
        valid = mask.expand(hidden.shape[:-1])
        for activation, linear in zip(unit.activations, later, strict=True):
            hidden = activation(hidden, valid) if isinstance(activation, units.Dice) else activation(hidden)
            hidden = linear(hidden)
        scores = hidden.squeeze(-1)
        if unit.softmax:
            scores = scores * (1.0 if unit.scale is None else unit.scale)
            weights = torch.softmax(scores.masked_fill(~valid, float("-inf")), dim=-1).masked_fill(~valid, 0.0)
        else:
            weights = scores.masked_fill(~valid, 0.0)
        pooled = weights @ keys
        return pooled if many else pooled.squeeze(1)


def reference_unit(workload: ActivationWorkload, seed: int = 1) -> units.LocalActivationUnit:
    """The unfused unit of a workload, in float32 on the CPU, initialised from ``seed``."""
    torch.manual_seed(seed)
    return units.LocalActivationUnit(
        workload.dim, workload.hidden, workload.activation, workload.interaction, workload.softmax
    )


def fused_unit(unit: units.LocalActivationUnit) -> din_kernels.LocalActivationUnit:
    """The fused unit with the parameters of ``unit``, on its device and in its dtype."""
    weight = linears_of(unit)[0].weight
    fused = din_kernels.LocalActivationUnit(
        unit.embedding_dim, unit.hidden_units, unit.activation, unit.interaction, unit.softmax, unit.scale
    ).to(weight.device, weight.dtype)
    fused.load_state_dict(unit.state_dict(), strict=True)
    return fused


def rows_of(padded: Tensor, inputs: ActivationInputs) -> Tensor:
    """Padded [B, T, D] -> the real rows [N, D]."""
    return padded[torch.arange(padded.shape[1], device=padded.device) < inputs.lengths.unsqueeze(1)]


# ---- calls -------------------------------------------------------------------------------------------------------------


def as_call(forward: Forward, parameters: Sequence[Tensor], measure: str, layout: str) -> Callable[[Any], Any]:
    """One call: forward without a graph, or forward and backward to queries, keys (in ``layout``) and parameters."""
    if measure == "forward":

        def infer(inputs: ActivationInputs) -> tuple[Tensor]:
            with torch.no_grad():
                return (forward(inputs),)

        return infer

    def train(inputs: ActivationInputs) -> tuple[Tensor, ...]:
        keys = inputs.padded if layout == "padded" else inputs.keys
        pooled = forward(inputs)
        return pooled, *torch.autograd.grad(pooled, (inputs.query, keys, *parameters), inputs.grad)

    return train


def naming(
    layout: str, parameter_names: Sequence[str], without: Collection[str] = ()
) -> Callable[[Any, Any], dict[str, Tensor]]:
    """What the gate compares, by name, but for those ``without``."""

    def named(result: tuple[Tensor, ...], inputs: ActivationInputs) -> dict[str, Tensor]:
        values = {"result": result[0]}
        if len(result) > 1:
            values["query"] = result[1]
            values["keys"] = rows_of(result[2], inputs) if layout == "padded" else result[2]
            values |= dict(zip(parameter_names, result[3:], strict=False))
        return {name: value for name, value in values.items() if name not in without}

    return named


def lost_in_rounding(unit: units.LocalActivationUnit) -> set[str]:
    """Gradients that unfused operations in 16 bits get too wrong for any gate: of the biases before Dice. Most of such a
    gradient cancels against what the batch's mean passes back to every row, which is too little to change a row's 16 bits.
    The paper's unit, 36 wide, 200,000 behaviours, bfloat16: off by 17 % of its RMS on an H200, by 39 % on a CPU, where the
    fused one is off by 0.2 %."""
    if unit.activation != "dice" or linears_of(unit)[0].weight.dtype.itemsize > 2:
        return set()
    return {f"linears.{layer}.bias" for layer in range(len(unit.activations))}


def contestants(
    unit: units.LocalActivationUnit,
    workload: ActivationWorkload,
    measure: str,
    *,
    compiled: bool = True,
    with_peers: bool = True,
) -> list[Contestant]:
    """The fused unit (jagged and padded rows in) and every baseline."""
    names = [name for name, _ in unit.named_parameters()]
    inexact = lost_in_rounding(unit)

    def own(
        name: str, layout: str, make_forward: Callable[[], tuple[Forward, Sequence[Tensor]]], slow: bool = False,
        without: Collection[str] = inexact,
    ) -> Contestant:  # fmt: skip
        def make() -> Callable[[Any], Any]:
            forward, parameters = make_forward()
            return as_call(forward, parameters, measure, layout)

        return Contestant(name, make, naming(layout, names, without), compiled=slow)

    def fused(layout: str) -> tuple[Forward, Sequence[Tensor]]:
        module = fused_unit(unit)
        if layout == "padded":
            return lambda i: module(i.query, i.padded, lengths=i.lengths), list(module.parameters())
        return lambda i: module(i.query, i.keys, offsets=i.offsets), list(module.parameters())

    def eager() -> tuple[Forward, Sequence[Tensor]]:
        return lambda i: unit(i.query, i.padded, lengths=i.lengths), list(unit.parameters())

    def jagged() -> tuple[Forward, Sequence[Tensor]]:
        return lambda i: unit(i.query, i.keys, offsets=i.offsets), list(unit.parameters())

    def compiled_eager() -> tuple[Forward, Sequence[Tensor]]:
        module = torch.compile(unit, dynamic=False)
        return lambda i: module(i.query, i.padded, lengths=i.lengths), list(unit.parameters())

    def factorised(compile: bool) -> tuple[Forward, Sequence[Tensor]]:
        plain = FactorisedPadded(unit)
        module = torch.compile(plain, dynamic=False) if compile else plain
        return lambda i: module(i.query, i.padded, i.lengths), list(unit.parameters())

    result = [
        own(FIRST, "jagged", lambda: fused("jagged"), without=()),
        own("fused, padded in", "padded", lambda: fused("padded"), without=()),
        own("eager", "padded", eager),
        own("jagged torch", "jagged", jagged),
        own("factorised", "padded", lambda: factorised(False)),
    ]
    if compiled:
        result.append(own("compiled", "padded", compiled_eager, slow=True))
        result.append(own("factorised, compiled", "padded", lambda: factorised(True), slow=True))
    if with_peers and workload.interaction == "product" and not workload.candidates:
        for name, build in peers.ACTIVATION.items():
            make = functools.partial(peer_call, build, unit, workload.padded_length, measure)
            result.append(Contestant(name, make, naming("padded", ())))
    return result


def peer_call(
    build: peers.Build, unit: units.LocalActivationUnit, padded_length: int, measure: str
) -> Callable[[Any], Any]:  # fmt: skip
    """The call of another library's module; its parameters' gradients are computed, but not compared by name."""
    forward, parameters = build(unit, padded_length)
    return as_call(forward, parameters, measure, "padded")


# ---- what is right ---------------------------------------------------------------------------------------------------


def expected_results(
    unit: units.LocalActivationUnit, inputs: ActivationInputs, measure: str, *, tf32: bool, row_limit: int = 1 << 28
) -> dict[str, Expected]:
    """The float64 reference on ``inputs``: jagged, and a few samples at a time where Dice does not tie them together.

    row_limit: bytes of first-layer features held at once.
    """
    dtype = inputs.keys.dtype
    exact = units.LocalActivationUnit(
        unit.embedding_dim, unit.hidden_units, unit.activation, unit.interaction, unit.softmax, unit.scale
    ).to(inputs.keys.device, torch.float64)
    exact.load_state_dict(unit.state_dict())
    exact.train(unit.training)
    lengths = inputs.lengths.tolist()
    backward = measure == "forward+backward"
    width = linears_of(unit)[0].in_features * 8 * (inputs.query.shape[1] if inputs.query.dim() == 3 else 1)
    most = len(inputs.keys) + 1 if unit.activation == "dice" else max(row_limit // width, 1)

    pooled, d_query, d_keys = [], [], []
    total = [torch.zeros_like(p) for p in exact.parameters()]
    begin = row = 0
    while begin < len(lengths):
        end, rows = begin, 0
        while end < len(lengths) and (end == begin or rows + lengths[end] <= most):
            rows += lengths[end]
            end += 1
        query = inputs.query[begin:end].detach().double().requires_grad_()
        keys = inputs.keys[row : row + rows].detach().double().requires_grad_()
        offsets = inputs.offsets[begin : end + 1] - row
        out = exact(query, keys, offsets=offsets)
        pooled.append(out.detach())
        if backward:
            seed = inputs.grad[begin:end].double()
            found = torch.autograd.grad(out, (query, keys, *exact.parameters()), seed)
            d_query.append(found[0])
            d_keys.append(found[1])
            total = [a + b for a, b in zip(total, found[2:], strict=True)]
        begin, row = end, row + rows

    precision = "tf32" if tf32 else "ieee"
    stages = 2 * (len(unit.linears) + 1) + (2 * len(unit.activations) if unit.activation == "dice" else 0)
    longest = max(max(lengths), linears_of(unit)[0].in_features, *unit.hidden_units)
    of_rows = tolerance(dtype, length=longest, stages=stages, precision=precision)
    of_sums = tolerance(dtype, length=max(len(inputs.keys), 1), stages=stages, precision=precision)
    result = {"result": Expected(torch.cat(pooled), of_rows)}
    if backward:
        result["query"] = Expected(torch.cat(d_query), of_rows)
        result["keys"] = Expected(torch.cat(d_keys), of_rows)
        gradients = dict(zip((name for name, _ in exact.named_parameters()), total, strict=True))
        for name, value in gradients.items():
            # A bias gradient sums the terms of its layer's weight gradient without their factor, and may cancel.
            twin = gradients.get(name.replace(".bias", ".weight"), value)
            result[name] = Expected(value, of_sums, float(twin.square().mean().sqrt()))
    return result


# ---- a race ----------------------------------------------------------------------------------------------------------


def make_inputs(
    arena: Arena, workload: ActivationWorkload, dtype: torch.dtype, measure: str
) -> list[ActivationInputs]:  # fmt: skip
    """Copies with the same lengths and other values, enough to exceed the cache; leaves that want gradients if measured."""
    first = make_activation(workload, dtype=dtype, device=arena.device)
    size = first.keys.numel() * first.keys.element_size()
    result = [first]
    for seed in range(1, arena.copies(size)):
        other = make_activation(workload, dtype=dtype, device=arena.device, value_seed=seed)
        result.append(other)
    if measure != "forward":
        for one in result:
            for leaf in (one.query, one.keys, one.padded):
                leaf.requires_grad_()
    return result


def run(
    arena: Arena, benchmark: Any, workload: ActivationWorkload, measure: str, dtype: torch.dtype = torch.float32, *,
    tf32: bool = False, suite: str = "local_activation", compiled: bool = True, with_peers: bool = True,
) -> None:  # fmt: skip
    """Race all contestants on ``workload``."""
    inputs = make_inputs(arena, workload, dtype, measure)
    unit = reference_unit(workload).to(arena.device, dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        floor = activation_floor(workload, dtype)
        if measure != "forward":
            floor = floor + activation_floor(workload, dtype, backward=True)
        rows = len(inputs[0].keys)
        race = Race(
            suite, workload.name, measure, dtype, inputs, expected_results(unit, inputs[0], measure, tf32=tf32), floor, tf32,
            details={
                "batch": workload.batch, "rows": rows, "padded_rows": workload.batch * workload.padded_length,
                "dim": workload.dim, "hidden": workload.hidden_name, "interaction": workload.interaction,
                "activation": workload.activation, "candidates": workload.candidates, "note": workload.note,
                "copies": len(inputs), "longest": workload.padded_length,
            },
        )  # fmt: skip
        arena.race(race, contestants(unit, workload, measure, compiled=compiled, with_peers=with_peers), benchmark)
    finally:
        torch.set_float32_matmul_precision(before)


def parameters_of(workload: ActivationWorkload) -> int:
    """Parameters of the unit: first layer 4·D or D·(D + 2) columns."""
    return sum(math.prod(p.shape) for p in reference_unit(workload).parameters())
