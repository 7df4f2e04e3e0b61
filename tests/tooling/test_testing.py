"""The rules that decide every other test must themselves be right."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from din_kernels.testing import (
    assert_close,
    compare,
    hostile_gradients,
    jagged_batch,
    jagged_lengths,
    offsets_of,
    tolerance,
    unit_roundoff,
    widths,
)


def test_units():
    assert unit_roundoff(torch.float32) == 2.0**-24
    assert unit_roundoff(torch.bfloat16) == 2.0**-8
    assert unit_roundoff(torch.float16) == 2.0**-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 64, 4096])
def test_honest_arithmetic_passes_with_room_and_not_too_much(dtype, length):
    """A matrix product in ``dtype``: within the tolerance, and the tolerance within three orders of magnitude of it."""
    a, b = torch.randn(64, length, dtype=torch.float64), torch.randn(length, 48, dtype=torch.float64)
    if dtype == torch.float32:
        a, b = a.float().double(), b.float().double()  # the rounding of the inputs is nobody's error
    found = assert_close("product", a.to(dtype) @ b.to(dtype), a @ b, length=length)
    if dtype == torch.float32:
        assert found.rms_ratio > found.tolerance.rms / 1000


def test_bfloat16_storage_passes_and_a_second_rounding_needs_a_second_stage():
    x = torch.randn(200, 64, dtype=torch.float64)
    assert_close("stored", x.bfloat16(), x)
    with pytest.raises(AssertionError, match="RMS error ratio"):
        assert_close("as float32", x.bfloat16().float(), x)


def test_tf32_products_pass_as_tf32_only():
    a, b = torch.randn(64, 128), torch.randn(128, 32)

    def truncate(x: torch.Tensor) -> torch.Tensor:  # what the tensor core does with the low 13 bits
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    exact, coarse = a.double() @ b.double(), truncate(a) @ truncate(b)
    assert_close("tf32", coarse, exact, length=128, precision="tf32")
    with pytest.raises(AssertionError):
        assert_close("ieee", coarse, exact, length=128)


def test_tolerance_by_hand():
    u = 2.0**-24
    assert tolerance(torch.float32, length=100, stages=2).rms == pytest.approx(4 * 2 * (u + u + 10 * u))
    with pytest.raises(ValueError, match="precision must be one of"):
        tolerance(torch.float32, precision="fp8")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_one_bad_element_among_a_million_fails_and_is_named(value):
    """RMS alone would hide it."""
    expected = torch.randn(1000, 1000, dtype=torch.float64)
    actual = expected.float()
    actual[321, 7] += value * 1e-3 if math.isfinite(value) else value
    with pytest.raises(AssertionError, match=r"grad_keys: .* at \(321, 7\): .* 1 of 1000000 elements too far"):
        assert_close("grad_keys", actual, expected)


def test_shapes_zeros_and_empties():
    with pytest.raises(AssertionError, match=r"shape \(3, 1\), expected \(3,\)"):
        assert_close("x", torch.zeros(3, 1), torch.zeros(3))
    assert_close("empty", torch.zeros(0, 4), torch.zeros(0, 4))
    assert_close("zero", torch.zeros(4), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_close("not zero", torch.full((4,), 1e-30), torch.zeros(4, dtype=torch.float64))
    assert_close("cancelled", torch.full((4,), 1e-8), torch.zeros(4, dtype=torch.float64), scale=1.0)
    same = torch.tensor([math.inf, 1.0])
    assert compare(same, same.double(), tolerance(torch.float32)).bad == 0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(lengths=jagged_lengths(), dim=widths(20))
def test_strategies_make_consistent_batches(lengths, dim):
    batch = jagged_batch(lengths, dim, index_dtype=torch.int32)
    assert batch.offsets.dtype == torch.int32
    assert batch.offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.keys.shape == (sum(lengths), dim)
    keys, row_lengths = batch.padded(fill=math.nan)
    assert row_lengths.tolist() == list(lengths)
    assert int(torch.isnan(keys).all(-1).sum()) == keys.shape[0] * keys.shape[1] - sum(lengths)


def test_strategies_reach_the_shapes_that_break_kernels():
    seen = {
        "no samples": False,
        "no rows": False,
        "empty first and last": False,
        "long among short": False,
        "border": False,
    }

    @settings(derandomize=True, deadline=None, max_examples=150, database=None)
    @given(lengths=jagged_lengths())
    def look(lengths):
        seen["no samples"] |= lengths == []
        seen["no rows"] |= bool(lengths) and sum(lengths) == 0
        seen["empty first and last"] |= len(lengths) > 2 and lengths[0] == lengths[-1] == 0 and sum(lengths) > 0
        seen["long among short"] |= len(lengths) > 1 and max(lengths) == 150
        seen["border"] |= 17 in lengths

    look()
    assert all(seen.values()), seen


def test_hostile_gradients_have_the_strides_they_promise():
    gradients = hostile_gradients((6, 4))
    assert all(g.shape == (6, 4) for g in gradients)
    strides = {g.stride() for g in gradients}
    assert (0, 0) in strides
    assert (1, 6) in strides
    assert (7, 1) in strides
    assert any(g.storage_offset() == 1 and g.is_contiguous() for g in gradients)


def test_offsets():
    assert offsets_of([]).tolist() == [0]
    assert offsets_of([2, 0, 3], dtype=torch.int32).tolist() == [0, 2, 2, 5]


def test_importing_needs_no_hypothesis():
    code = "import sys; sys.modules['hypothesis'] = None; import din_kernels.testing as t; t.jagged_batch([1, 2], 3)"
    subprocess.run([sys.executable, "-c", code], check=True)
