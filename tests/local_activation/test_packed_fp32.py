"""Packed kernel of fp32: values, what splitting does to extreme numbers, and how accurate it is on tensor cores.

The interpreter multiplies in full fp32, so it shows nothing of the tensor cores' rounding: ``cut`` emulates that.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from din_kernels.ops.local_activation import packed, triton_impl
from din_kernels.ops.local_activation.problem import UnitConfig
from tests.support.memory_monitor import memory_monitor

from ._cases import Spec, check_outputs, make_case

pytest.importorskip("triton")

SHAPES = [
    Spec(lengths=(70, 0, 3), dim=64, hidden=(36,)),
    Spec(lengths=(9, 60), dim=36, hidden=(36,), activation="dice", training=True, softmax=True, layout="padded"),
    Spec(lengths=(9, 60), dim=64, hidden=(48,), activation="prelu", precision="tf32", candidates=2, softmax=True),
    Spec(lengths=(7, 60, 1), dim=20, hidden=(80, 40), activation="relu", bias=False, wide_rows=True),
    Spec(lengths=(7, 60, 1), dim=128, hidden=(64, 16), activation="dice", softmax=True),
]


@pytest.mark.parametrize("spec", SHAPES, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_outputs(device, poison_scratch, spec):
    case = make_case(spec, device)
    with memory_monitor() as monitor:
        outputs = packed.forward(case.config, case.tensors, return_weights=True)
    assert "forward_packed_fp32" in monitor.kernels()
    check_outputs(case, outputs)


def test_dispatch(device, monkeypatch):
    """What ``fits`` says is what runs."""
    taken = []
    monkeypatch.setattr(packed, "forward", lambda *a, **k: taken.append("packed"))
    monkeypatch.setattr(triton_impl.universal, "forward", lambda *a, **k: taken.append("universal"))
    served = Spec(dim=64, hidden=(36,))
    for spec, path in [
        (served, "packed"),
        (dataclasses.replace(served, precision="tf32"), "packed"),
        (dataclasses.replace(served, activation="dice", softmax=True), "packed"),
        (dataclasses.replace(served, hidden=(80, 40)), "universal"),
        (dataclasses.replace(served, dim=128), "universal"),
    ]:
        case = make_case(spec, device)
        triton_impl.forward(case.config, case.tensors, return_weights=False)
        assert taken.pop() == path, spec
    config = UnitConfig("product", "sigmoid", 64, (36,))
    assert not packed.fits(config, torch.float32, 80)


@pytest.mark.parametrize("size", [1e-42, 3.4e38])
def test_extreme_keys(device, size):
    """Denormal numbers and those next to the largest one stay what they are; other lists see nothing of them."""
    case = make_case(Spec(lengths=(3, 70), dim=16, hidden=(16,)), device)
    plain = packed.forward(case.config, case.tensors, return_weights=True)
    keys = case.tensors.keys.clone()
    keys[:3] = 0.0
    keys[1, 2] = size
    # A query of zero at that column: v∘e would overflow in any precision.
    query = case.tensors.query.clone()
    query[0] = 0.0
    weights = [case.tensors.weights[0] * 1e-3, case.tensors.weights[1] * 1e-3]
    tensors = case.tensors._replace(keys=keys, query=query, weights=weights)
    found = packed.forward(case.config, tensors, return_weights=True)
    assert bool(found.pooled.isfinite().all())
    assert bool(found.weights.isfinite().all())
    z = torch.nn.functional.linear(keys[1].double(), (weights[0][:, 16:32] - weights[0][:, 32:48]).double())
    score = (torch.sigmoid(z + tensors.biases[0].double()) * weights[1].double()).sum() + tensors.biases[1].double()
    assert float(found.weights[1]) == pytest.approx(float(score), rel=1e-5)
    assert float(found.pooled[0, 2]) == pytest.approx(float(score) * keys[1, 2].double().item(), rel=1e-5, abs=1e-44)
    assert plain.pooled.shape == found.pooled.shape


def cut(x: Tensor) -> Tensor:
    """The 11 leading bits: what a tensor core of tf32 takes from an operand."""
    return (x.view(torch.int32) & -8192).view(torch.float32)


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """``kernels_packed_fp32.dot`` as the hardware does it."""
    a_high, b_high = cut(a), cut(b)
    return cut(a - a_high) @ b_high + a_high @ cut(b - b_high) + a_high @ b_high


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("hidden", [(36,), (80, 40)])
def test_as_accurate_as_ieee(dim, hidden):
    """Scores and sums of lists: at most twice the error of fp32's own products, where tf32 is off a hundred times more."""
    e, v, offset = torch.randn(1024, dim), torch.randn(1024, dim), torch.randn(1024, hidden[0])
    k, p = torch.randn(2, dim, hidden[0]) / math.sqrt(dim)
    upper = torch.randn(hidden[0], hidden[-1]) / math.sqrt(hidden[0])
    out = torch.randn(hidden[-1], 1)

    def unit(product, dtype):
        keys = e.to(dtype)
        h = torch.sigmoid(offset.to(dtype) + product(keys, k.to(dtype)) + product(v.to(dtype) * keys, p.to(dtype)))
        if len(hidden) > 1:
            h = torch.sigmoid(product(h, upper.to(dtype)))
        scores = h @ out.to(dtype)
        return scores, (scores * keys).view(16, 64, dim).sum(1)

    expected = unit(torch.matmul, torch.float64)
    for want, ieee, split, tf32 in zip(
        expected, unit(torch.matmul, torch.float32), unit(split_product, torch.float32),
        unit(lambda a, b: cut(a) @ cut(b), torch.float32), strict=True,
    ):  # fmt: skip
        assert error(split, want) <= 2 * error(ieee, want)
        assert error(tf32, want) > 100 * error(ieee, want)
