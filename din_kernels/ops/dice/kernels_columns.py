"""Triton kernels of Dice for up to a few thousand rows: a program holds all rows of its channels on chip.

One launch each way: x is read once and y written once, x and the gradient read once and dx written once, five passes over a
tensor in all, where ``kernels.py`` and ``kernels_backward.py`` take eight. A tile is [BLOCK_R, BLOCK_C] with BLOCK_R ≥ N.
"""

import triton
import triton.language as tl

from .kernels import _activated, _folded, _gate, _moved, _normaliser, _offsets, _slope, _vector
from .kernels_backward import _store_sums


@triton.jit
def _tile_moments(value, counts, BLOCK_C: tl.constexpr):
    """(count, mean, M2) [BLOCK_C] of the rows of a tile that count. Two passes: the deviations from a first mean correct what
    rounding did to it."""
    counts = counts[:, None]
    count = tl.sum(tl.where(counts, 1.0, 0.0) + tl.zeros([1, BLOCK_C], tl.float32), 0)
    at_least_one = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(counts, value, 0.0), 0) / at_least_one
    away = tl.where(counts, value - mean[None, :], 0.0)
    left = tl.sum(away, 0) / at_least_one
    m2 = tl.sum(away * away, 0) - left * left * count
    return count, mean + left, tl.where(m2 < 0, 0.0, m2)  # not tl.maximum: NaN must stay


@triton.jit(do_not_specialize=["num_rows", "x_stride"])
def forward_columns(
    x, mask, y, shift, running_mean, running_var, tracked, step, normaliser, alpha, alpha_stride, weight, bias,
    num_rows, x_stride, x_channel, eps,
    C: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RUNNING: tl.constexpr, HAS_TRACKED: tl.constexpr, STEP_POINTER: tl.constexpr,
    AFFINE: tl.constexpr,
):  # fmt: skip
    """y [N, C] and ``normaliser`` [3, C] of training; the running statistics are updated."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.arange(0, BLOCK_R)
    counts = slot < num_rows
    live = counts[:, None] & (cols < C)[None, :]
    source = _offsets(tl.cast(x_stride, tl.int64) * X_UNIT, x_channel, cols, BLOCK_R)
    value = tl.load(x + source, mask=live, other=0.0).to(tl.float32)
    if HAS_MASK:
        counts = counts & (tl.load(mask + slot, mask=counts, other=0) != 0)
    count, mean, m2 = _tile_moments(value, counts, BLOCK_C)
    mean, rstd = _normaliser(
        count, mean, m2, shift, running_mean, running_var, tracked, step, eps, normaliser, cols, C,
        C, HAS_SHIFT, HAS_RUNNING, HAS_TRACKED, STEP_POINTER,
    )  # fmt: skip
    _, rate, offset = _folded(rstd, weight, bias, cols, C, AFFINE)
    slope, moved = _slope(alpha, alpha_stride, cols, C), _moved(shift, cols, C, HAS_SHIFT)
    result = _activated(value, mean, rate, offset, slope, moved, HAS_SHIFT, AFFINE)
    tl.store(y + _offsets(C, 1, cols, BLOCK_R), result.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_rows", "x_stride", "grad_stride"])
def backward_columns(
    grad, x, mask, dx, sums, normaliser, shift, alpha, alpha_stride, weight, bias,
    num_rows, grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SHIFT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """dx [N, C] and the sums [3 or 4, C] of ``kernels_backward.py``, in training.

    dx = g·(α + (1 − α)·p) + rstd·weight·dz − [row counts]·rstd·weight·(Σ dz + x̂·Σ dz·x̂) / count
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.arange(0, BLOCK_R)
    counts = slot < num_rows
    live = counts[:, None] & (cols < C)[None, :]
    up = _offsets(tl.cast(grad_stride, tl.int64) * GRAD_UNIT, grad_channel, cols, BLOCK_R)
    source = _offsets(tl.cast(x_stride, tl.int64) * X_UNIT, x_channel, cols, BLOCK_R)
    g = tl.load(grad + up, mask=live, other=0.0).to(tl.float32)
    value = tl.load(x + source, mask=live, other=0.0).to(tl.float32)
    mean, rstd = _vector(normaliser, cols, C), _vector(normaliser + C, cols, C)
    inverse = _vector(normaliser + 2 * C, cols, C)
    scale, rate, offset = _folded(rstd, weight, bias, cols, C, AFFINE)
    slope = _slope(alpha, alpha_stride, cols, C)
    rest = 1.0 - slope

    centred = value - mean[None, :]
    p = _gate(centred, rate, offset, AFFINE)
    if HAS_SHIFT:
        value += _moved(shift, cols, C, HAS_SHIFT)[None, :]
    direct = g * (slope[None, :] + rest[None, :] * p)
    closed = g * value * (1.0 - p)
    dz = closed * p
    sum_dx = tl.zeros_like(rstd)
    sum_dz = rest * tl.sum(dz, 0)
    if HAS_SHIFT:
        sum_dx = tl.sum(direct, 0) + tl.where(inverse == 0, scale * sum_dz, 0.0)
    sum_slanted = rest * rstd * tl.sum(dz * centred, 0)
    _store_sums(sums, cols, sum_dz, sum_slanted, tl.sum(closed, 0), sum_dx, C, C, HAS_SHIFT)

    through = (scale * inverse * sum_dz)[None, :] + centred * (scale * inverse * rstd * sum_slanted)[None, :]
    if HAS_MASK:
        counts = counts & (tl.load(mask + slot, mask=counts, other=0) != 0)
        through = tl.where(counts[:, None], through, 0.0)
    result = direct + (rest * scale)[None, :] * dz - through
    tl.store(dx + _offsets(C, 1, cols, BLOCK_R), result.to(dx.dtype.element_ty), mask=live)
