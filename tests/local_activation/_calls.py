"""Random public calls of the local activation unit, and two independent statements of what they must give.

``reference.LocalActivationUnit`` materialises the concatenation or the outer product. ``by_loops`` goes through single
(behaviour, candidate) pairs one after another, written from the paper; it shares no code with the package or the
reference. Both run in float64 under autograd, so that every gradient can be compared, through the returned weights too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import din_kernels
from din_kernels.ops.local_activation import torch_impl, torch_plan, torch_walk
from din_kernels.testing import jagged_lengths, offsets_of, widths
from reference.units import LocalActivationUnit as Reference

NAN = float("nan")
LAYOUTS = ("offsets", "offsets32", "lengths", "lengths32", "mask", "full", "nested")


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """candidates 0: query [B, D]; otherwise [B, C, D]. wide: query and keys are slices of something wider."""

    lengths: tuple[int, ...]
    dim: int
    hidden: tuple[int, ...]
    activation: str
    interaction: str
    layout: str = "offsets"
    candidates: int = 0
    softmax: bool = False
    scale: float | None = None
    bias: bool = True
    training: bool = False
    per_channel: bool = False
    wide: bool = False
    seed: int = 0


@st.composite
def call_specs(draw: Any, max_batch: int = 5, max_length: int = 14, long: int = 60) -> CallSpec:
    layout = draw(st.sampled_from(LAYOUTS))
    lengths = draw(jagged_lengths(max_batch, max_length, tile=8, long=long))
    if layout == "full":
        lengths = [draw(st.integers(0, 30))] * len(lengths)
    if layout == "nested" and not lengths:
        layout = "offsets"  # torch.nested has no empty batch
    return CallSpec(
        lengths=tuple(lengths),
        dim=draw(widths(20)),
        hidden=tuple(draw(st.lists(widths(24), min_size=1, max_size=4))),
        activation=draw(st.sampled_from(["dice", "dice", "prelu", "sigmoid", "relu"])),
        interaction=draw(st.sampled_from(["outer", "product"])),
        layout=layout,
        candidates=draw(st.sampled_from([0, 0, 1, 3])),
        softmax=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.5, 2.0])),
        bias=draw(st.booleans()),
        training=draw(st.booleans()),
        per_channel=draw(st.booleans()),
        wide=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@dataclasses.dataclass(frozen=True)
class Walking:
    """How the torch backend cuts the rows up; the defaults would put every small batch into one chunk."""

    chunk_pairs: int = 4096
    piece_rows: int = 512
    held_bytes: int = 64 << 20
    even_lists: int = 24
    long_lists: int = 512

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with (
            mock.patch.object(torch_plan, "CHUNK_PAIRS", self.chunk_pairs),
            mock.patch.object(torch_plan, "PIECE_ROWS", self.piece_rows),
            mock.patch.object(torch_impl, "HELD_BYTES", self.held_bytes),
            mock.patch.object(torch_walk, "EVEN_LISTS", self.even_lists),
            mock.patch.object(torch_walk, "LONG_LISTS", self.long_lists),
        ):
            yield


def walkings() -> st.SearchStrategy[Walking]:
    return st.builds(
        Walking,
        chunk_pairs=st.sampled_from([4096, 1, 7, 16]),
        piece_rows=st.sampled_from([512, 3, 8]),
        held_bytes=st.sampled_from([64 << 20, 0]),
        even_lists=st.sampled_from([24, 1]),
        long_lists=st.sampled_from([512, 1, 10_000]),
    )


class ChannelPReLU(torch.nn.PReLU):
    """One slope per feature, features last (``nn.PReLU`` takes dimension 1 for the channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.weight)


def make_units(spec: CallSpec, backend: str = "torch") -> tuple[din_kernels.LocalActivationUnit, Reference]:
    """The fused unit and the reference with the same float64 parameters, which are not those of initialisation."""
    options = (spec.dim, spec.hidden, spec.activation, spec.interaction, spec.softmax, spec.scale, spec.bias)
    torch.manual_seed(spec.seed)
    unit, reference = din_kernels.LocalActivationUnit(*options, backend=backend), Reference(*options)
    if spec.activation == "prelu" and spec.per_channel:
        unit.activations = torch.nn.ModuleList([torch.nn.PReLU(w) for w in spec.hidden])
        reference.activations = torch.nn.ModuleList([ChannelPReLU(w) for w in spec.hidden])
    with torch.no_grad():
        for module in reference.activations:
            if spec.activation == "prelu":
                module.weight.normal_(0.2, 0.4)
            if spec.activation == "dice":
                module.alpha.normal_(0.2, 0.4)
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    unit.load_state_dict(reference.state_dict(), strict=True)
    return unit.double().train(spec.training), reference.double().train(spec.training)


@dataclasses.dataclass
class Data:
    """The call's tensors; padding is NaN in ``keys`` and 0 in ``clean_keys``, which the references get."""

    query: Tensor
    keys: Tensor
    clean_keys: Tensor
    how: dict[str, Tensor]
    keep: Tensor | None
    grad_pooled: Tensor
    grad_weights: Tensor

    def lists(self, keys: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
        if self.keep is None:
            return list(torch.split(keys, list(lengths))) if lengths else []
        return [rows[keep] for rows, keep in zip(keys, self.keep, strict=True)]


def make_data(spec: CallSpec) -> Data:
    generator = torch.Generator().manual_seed(spec.seed + 1)

    def normal(*shape: int) -> Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator, dtype=torch.float64)
        return wide[..., 1:-2] if spec.wide else wide[..., :-3].contiguous()

    batch, count = len(spec.lengths), max(spec.candidates, 1)
    of_candidates = (spec.candidates,) if spec.candidates else ()
    query = normal(batch, *of_candidates, spec.dim)
    index = torch.int32 if spec.layout.endswith("32") else torch.int64
    if spec.layout in ("offsets", "offsets32", "nested"):
        keys = normal(sum(spec.lengths), spec.dim)
        weights_shape = (*keys.shape[:1], *of_candidates)
        grads = normal(*query.shape), torch.randn(weights_shape, generator=generator, dtype=torch.float64)
        return Data(query, keys, keys, {"offsets": offsets_of(spec.lengths, dtype=index)}, None, *grads)
    longest = max(spec.lengths, default=0)
    width = longest if spec.layout == "full" else longest + 2
    keep = torch.zeros(batch, width, dtype=torch.bool)
    for sample, length in enumerate(spec.lengths):
        scattered = spec.layout == "mask"
        keep[sample, torch.randperm(width, generator=generator)[:length] if scattered else slice(0, length)] = True
    keys = normal(batch, width, spec.dim)
    clean = keys.masked_fill(~keep.unsqueeze(2), 0)
    keys = keys.masked_fill_(~keep.unsqueeze(2), NAN)  # in place: a slice stays a slice
    how = {"full": {}, "mask": {"mask": keep}}.get(spec.layout, {"lengths": torch.tensor(spec.lengths, dtype=index)})
    weights = torch.randn(batch, count, width, generator=generator, dtype=torch.float64)
    weights = weights if spec.candidates else weights.squeeze(1)
    return Data(query, keys, clean, how, keep, normal(*query.shape), weights)


Results = dict[str, Tensor]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _results(
    module: torch.nn.Module, query: Tensor, keys: Tensor, pooled: Tensor, weights: Tensor, data: Data
) -> Results:
    results: Results = {"pooled": pooled, "weights": weights}
    loss = (pooled * data.grad_pooled).sum() + (weights * data.grad_weights).sum()
    names = ["query", "keys", *[name for name, _ in module.named_parameters()]]
    leaves = [query, keys, *module.parameters()]
    # Loops over nothing touch no leaf at all.
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    for name, leaf, grad in zip(names, leaves, found, strict=True):
        results[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    results.update({f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()})
    return {name: value.detach() for name, value in results.items()}


def of_unit(unit: din_kernels.LocalActivationUnit, spec: CallSpec, data: Data) -> Results:
    query, keys = _leaf(data.query), _leaf(data.keys)
    if spec.layout == "nested":
        given = torch.nested.nested_tensor_from_jagged(keys, data.how["offsets"])
        pooled, weights = unit(query, given, return_weights=True)
        weights = weights.values()
    else:
        pooled, weights = unit(query, keys, return_weights=True, **data.how)
    return _results(unit, query, keys, pooled, weights, data)


def of_reference(reference: Reference, spec: CallSpec, data: Data) -> Results:
    query, keys = _leaf(data.query), _leaf(data.clean_keys)
    pooled, weights = reference(query, keys, return_weights=True, **data.how)
    return _results(reference, query, keys, pooled, weights, data)


def _features(interaction: str, v: Tensor, e: Tensor) -> Tensor:
    if interaction == "outer":
        return torch.cat([e, *[e[i] * v for i in range(e.numel())], v])
    return torch.cat([v, e, v - e, e * v])


def _activated(module: torch.nn.Module, kind: str, rows: list[Tensor], training: bool) -> list[Tensor]:
    if kind == "sigmoid":
        return [1 / (1 + torch.exp(-z)) for z in rows]
    if kind == "relu":
        return [torch.clamp(z, min=0) for z in rows]
    if kind == "prelu":
        return [torch.where(z > 0, z, module.weight * z) for z in rows]
    mean, var = module.running_mean, module.running_var
    if training and len(rows) > 1:
        mean = sum(rows) / len(rows)
        var = sum((z - mean) ** 2 for z in rows) / len(rows)
    gates = [1 / (1 + torch.exp(-(z - mean) / torch.sqrt(var + module.eps))) for z in rows]
    return [p * z + (1 - p) * module.alpha * z for p, z in zip(gates, rows, strict=True)]


def by_loops(module: Reference, spec: CallSpec, data: Data) -> Results:
    """Values and gradients pair by pair; ``module`` only holds the parameters. Buffers are not updated."""
    query, keys = _leaf(data.query), _leaf(data.clean_keys)
    lists = data.lists(keys, spec.lengths)
    candidates = query if spec.candidates else query.unsqueeze(1)
    count = candidates.shape[1] if candidates.dim() == 3 else 1
    pairs = [(b, c, j) for b in range(len(lists)) for c in range(count) for j in range(spec.lengths[b])]
    hidden = [_features(spec.interaction, candidates[b, c], lists[b][j]) for b, c, j in pairs]
    for linear, activation in zip(module.linears, module.activations, strict=False):
        z = [linear.weight @ h + (0 if linear.bias is None else linear.bias) for h in hidden]
        hidden = _activated(activation, spec.activation, z, spec.training)
    last = module.linears[-1]
    scores = {pair: (last.weight @ h + (0 if last.bias is None else last.bias))[0]
              for pair, h in zip(pairs, hidden, strict=True)}  # fmt: skip
    pooled = torch.zeros_like(candidates)
    weights = torch.zeros_like(data.grad_weights)
    for b, rows in enumerate(lists):
        places = range(sum(spec.lengths[:b]), sum(spec.lengths[: b + 1]))
        if data.keep is not None:
            places = data.keep[b].nonzero().squeeze(1).tolist()
        for c in range(count):
            a = [scores[b, c, j] for j in range(len(rows))]
            if spec.softmax and a:
                powers = [torch.exp(s * (1.0 if spec.scale is None else spec.scale)) for s in a]
                a = [p / sum(powers) for p in powers]
            for j, place in enumerate(places):
                pooled = pooled.index_put((torch.tensor(b), torch.tensor(c)), a[j] * rows[j], accumulate=True)
                where = (b, c, place) if data.keep is not None else (place, c)
                if not spec.candidates:
                    where = (b, place) if data.keep is not None else (place,)
                weights = weights.index_put(tuple(torch.tensor(i) for i in where), a[j])
    pooled = pooled if spec.candidates else pooled.squeeze(1)
    results = _results(module, query, keys, pooled, weights, data)
    return {name: value for name, value in results.items() if not name.startswith("buffer")}


def assert_same(found: Results, expected: Results, *, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    """Equal within 1e-10 of the size of the quantity."""
    for name, want in expected.items():
        got = found[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        size = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol * max(1.0, size), msg=lambda m, n=name: f"{n}: {m}")
