"""Random calls of the local activation unit in its normal form, with the float64 results they must have.

``make_case`` builds ``reference.LocalActivationUnit`` in float64 (which materialises the concatenation or outer
product), runs it with autograd on padded or jagged keys, and returns the same call as ``(UnitConfig, UnitTensors)``
for a backend.
Padding rows hold NaN on the backend's side: whoever uses them shows.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from din_kernels.ops.local_activation.problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from din_kernels.testing import assert_close
from reference.units import LocalActivationUnit

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One call. layout: "jagged", "padded" (lengths) or "mask" (padded, holes anywhere); training: Dice's statistics
    are those of the batch; per_channel: PReLU with one slope per channel."""

    lengths: tuple[int, ...] = (3, 0, 5)
    dim: int = 8
    hidden: tuple[int, ...] = (16,)
    interaction: str = "product"
    activation: str = "sigmoid"
    layout: str = "jagged"
    candidates: int = 1
    softmax: bool = False
    scale: float = 1.0
    bias: bool = True
    training: bool = False
    per_channel: bool = False
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    precision: str = "ieee"
    seed: int = 0
    wide_rows: bool = False  # keys are a slice of something wider


@dataclasses.dataclass
class Case:
    spec: Spec
    config: UnitConfig
    tensors: UnitTensors
    inv_count: Tensor | None
    grad_pooled: Tensor  # [Q, D]
    grad_weights: Tensor  # [R·C] flat
    pooled: Tensor  # float64 results from here on
    weights: Tensor  # [R·C] flat
    moments: list[tuple[float, Tensor, Tensor]]  # of every hidden layer
    gradients: UnitGradients
    pairs: int


class ChannelPReLU(torch.nn.PReLU):
    """One slope per feature, features last (``nn.PReLU`` takes dimension 1 for the channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.weight)


def _unit(spec: Spec) -> LocalActivationUnit:
    unit = LocalActivationUnit(
        spec.dim, spec.hidden, spec.activation, spec.interaction, spec.softmax, spec.scale, spec.bias
    )
    if spec.activation == "prelu" and spec.per_channel:
        unit.activations = torch.nn.ModuleList([ChannelPReLU(width) for width in spec.hidden])
    with torch.no_grad():
        for linear in unit.linears:
            torch.nn.init.normal_(linear.weight, std=1.2 / math.sqrt(linear.weight.shape[1]))
            if spec.bias:
                torch.nn.init.normal_(linear.bias, std=0.3)
        for activation in unit.activations:
            if spec.activation == "prelu":
                activation.weight.normal_(0.25, 0.3)
            if spec.activation == "dice":
                activation.alpha.normal_(0.2, 0.4)
                activation.running_mean.normal_(0.0, 0.3)
                activation.running_var.uniform_(0.5, 1.5)
        # The backend sees parameters of its own dtype; the reference must start from the same numbers.
        for parameter in unit.parameters():
            parameter.copy_(parameter.to(spec.dtype).to(parameter.dtype))
    unit = unit.double()
    return unit.train(spec.training)


def _keep(spec: Spec, generator: torch.Generator) -> tuple[Tensor, int]:
    """[B, T] which places of the padded form are real, and T."""
    width = max(spec.lengths, default=0) + (2 if spec.layout != "jagged" else 0)
    width = max(width, 1)
    keep = torch.zeros(len(spec.lengths), width, dtype=torch.bool)
    for sample, length in enumerate(spec.lengths):
        places = torch.randperm(width, generator=generator)[:length] if spec.layout == "mask" else slice(0, length)
        keep[sample, places] = True
    return keep, width


def make_case(spec: Spec, device: torch.device | str = "cpu") -> Case:
    torch.manual_seed(spec.seed)
    generator = torch.Generator().manual_seed(spec.seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype).double()

    unit = _unit(spec)
    batch, count = len(spec.lengths), spec.candidates
    keep, width = _keep(spec, generator)
    query = normal(batch, count, spec.dim).requires_grad_()
    padded_keys = normal(batch, width, spec.dim)
    jagged = spec.layout == "jagged"
    keys = (padded_keys[keep] if jagged else padded_keys).detach().requires_grad_()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(spec.lengths, dtype=torch.int64).cumsum(0)])
    given = {"offsets": offsets} if jagged else {"mask": keep}

    moments: list[tuple[float, Tensor, Tensor]] = []

    def observe(module: torch.nn.Module, arguments: tuple, _: object) -> None:
        x = arguments[0]
        valid = arguments[1] if len(arguments) > 1 else None
        if valid is None:
            valid = torch.ones(x.shape[:-1], dtype=torch.bool) if jagged else keep.unsqueeze(1).expand(x.shape[:-1])
        rows = x.detach()[valid]
        mean = rows.mean(0) if rows.shape[0] else rows.new_zeros(rows.shape[1])
        moments.append((float(rows.shape[0]), mean, (rows - mean).square().sum(0)))

    running: list[tuple[Tensor, Tensor]] = []
    if spec.activation == "dice":
        running = [(a.running_mean.clone(), a.running_var.clone()) for a in unit.activations]
    hooks = [activation.register_forward_hook(observe) for activation in unit.activations]
    pooled, weights = unit(query, keys, return_weights=True, **given)
    for hook in hooks:
        hook.remove()
    grad_pooled = normal(*pooled.shape)
    grad_weights = normal(*weights.shape)
    loss = (pooled * grad_pooled).sum() + (weights * grad_weights).sum()
    parameters = list(unit.parameters())
    found = torch.autograd.grad(loss, [query, keys, *parameters], allow_unused=True)
    asked = [query, keys, *parameters]
    grads = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(asked, found, strict=True)}

    pairs = sum(spec.lengths) * count
    means: list[Tensor] = []
    rstds: list[Tensor] = []
    inv_count = None
    if spec.activation == "dice":
        batch_statistics = spec.training and pairs >= 2
        for activation, moment, buffers in zip(unit.activations, moments, running, strict=True):
            (total, mean, m2), (running_mean, running_var) = moment, buffers
            var = m2 / total if batch_statistics else running_var
            means.append((mean if batch_statistics else running_mean).float().to(device))
            rstds.append(torch.rsqrt(var + activation.eps).float().to(device))
        if spec.training:
            inv_count = torch.tensor(1.0 / pairs if batch_statistics else 0.0, device=device)

    rows = keys.detach().reshape(-1, spec.dim).clone()
    if not jagged:
        rows[~keep.reshape(-1)] = NAN
    rows = rows.to(device=device, dtype=spec.dtype)
    if spec.wide_rows:
        wide = torch.full((rows.shape[0], spec.dim + 5), NAN, dtype=spec.dtype, device=device)
        wide[:, 2 : 2 + spec.dim] = rows
        rows = wide[:, 2 : 2 + spec.dim]
    if jagged:
        starts, ends = offsets[:-1], offsets[1:]
    else:
        starts = torch.arange(batch) * width
        ends = starts + (width if spec.layout == "mask" else torch.tensor(spec.lengths, dtype=torch.int64))

    def to(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=device, dtype=spec.dtype)

    alphas: list[Tensor | None] = [None] * len(spec.hidden)
    alpha_parameters = [getattr(a, "alpha", getattr(a, "weight", None)) for a in unit.activations]
    if spec.activation in ("prelu", "dice"):
        alphas = [to(a) for a in alpha_parameters]
    config = UnitConfig(
        spec.interaction, spec.activation, spec.dim, spec.hidden, spec.softmax, spec.scale, count,
        0 if jagged else width, spec.precision,
    )  # fmt: skip
    tensors = UnitTensors(
        to(query).reshape(-1, spec.dim), rows,
        starts.to(device=device, dtype=spec.index_dtype), ends.to(device=device, dtype=spec.index_dtype),
        keep.reshape(-1).to(device) if spec.layout == "mask" else None,
        [to(linear.weight) for linear in unit.linears],
        [to(linear.bias) if spec.bias else None for linear in unit.linears], alphas, means, rstds,
    )  # fmt: skip
    gradients = UnitGradients(
        grads[id(query)].reshape(-1, spec.dim), grads[id(keys)].reshape(-1, spec.dim),
        [grads[id(linear.weight)] for linear in unit.linears],
        [grads[id(linear.bias)] if spec.bias else None for linear in unit.linears],
        [grads[id(a)] if isinstance(a, torch.nn.Parameter) else None for a in alpha_parameters],
    )  # fmt: skip
    return Case(
        spec, config, tensors, inv_count, to(grad_pooled).reshape(-1, spec.dim), to(grad_weights).reshape(-1),
        pooled.detach().reshape(-1, spec.dim), weights.detach().reshape(-1), moments, gradients, pairs,
    )  # fmt: skip


def _stages(spec: Spec) -> int:
    """Rounding steps one after another on the way to a result: layers (more for Dice with its statistics), pooling."""
    return 2 + len(spec.hidden) * (3 if spec.activation == "dice" else 1) + (2 if spec.softmax else 0)


def _size(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def check_statistics(case: Case, layer: int, found: tuple[Tensor, Tensor, Tensor]) -> None:
    count, mean, m2 = case.moments[layer]
    assert found[0].dtype == torch.float64
    assert float(found[0]) == count
    dtype, stages = case.spec.dtype, _stages(case.spec)
    length = max(case.spec.dim, *case.spec.hidden)
    spread = float((m2 / max(count, 1)).mean().sqrt()) if mean.numel() else 0.0
    assert_close("mean", found[1], mean, dtype=dtype, length=length, stages=stages, scale=spread or 1.0)
    length += int(count)
    assert_close("m2", found[2], m2, dtype=dtype, length=length, stages=2 * stages, scale=max(count, 1) * 1e-3)


def check_outputs(case: Case, outputs: UnitOutputs) -> None:
    spec = case.spec
    length = max(spec.dim, *spec.hidden, *spec.lengths, 1)
    options = {"dtype": spec.dtype, "length": length, "stages": _stages(spec), "precision": spec.precision}
    assert outputs.pooled.dtype == spec.dtype
    assert_close("pooled", outputs.pooled, case.pooled, **options)
    if outputs.weights is not None:
        assert outputs.weights.dtype == spec.dtype
        assert_close("weights", outputs.weights, case.weights, **options)
        assert bool((outputs.weights[case.weights.to(outputs.weights.device) == 0] == 0).all()), "weights of padding"
    if spec.softmax:
        assert outputs.log_normaliser is not None
        empty = torch.tensor([n == 0 for n in spec.lengths for _ in range(spec.candidates)], dtype=torch.bool)
        assert bool((outputs.log_normaliser.cpu()[empty] == -math.inf).all())


def check_gradients(case: Case, found: UnitGradients) -> None:
    spec, want = case.spec, case.gradients
    length = max(spec.dim, *spec.hidden, case.pairs, 1)
    options = {"dtype": spec.dtype, "length": length, "stages": 2 * _stages(spec) + 2, "precision": spec.precision}
    # Gradients of parameters are sums over all pairs that may cancel; the largest group tells the size of the terms.
    # Softmax subtracts g · u from g · e, to nothing in a list of one row: what is left is rounding error of g · e.
    keys = torch.nan_to_num(case.tensors.keys.double())
    size = _size(case.grad_pooled.double()) * _size(keys) * math.sqrt(spec.dim * max(case.pairs, 1))
    size = max([size, *(_size(g) for g in (*want.weights, *want.biases, *want.alphas) if g is not None)])
    assert_close("grad query", found.query, want.query, scale=max(size, _size(want.keys)), **options)
    assert_close("grad keys", found.keys, want.keys, **options)
    for name in ("weights", "biases", "alphas"):
        got, expected = getattr(found, name), getattr(want, name)
        assert len(got) == len(expected)
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert (g is None) == (e is None), f"{name}[{i}]"
            if g is not None and e is not None:
                assert_close(f"grad {name}[{i}]", g, e, scale=size, **options)
