"""Triton kernels of Dice, backward: a pass that sums and a pass that writes dx; see kernels.py.

With HAS_SHIFT there are four sums, not three: the gradient of the shift is Σ dx. What goes through the batch's statistics
adds up to −rstd·weight·Σ dz and cancels the sigmoid's share, so Σ dx = Σ g·(α + (1 − α)·p), to which rstd·weight·Σ dz is
added where running statistics normalised.
"""

import triton
import triton.language as tl

from .kernels import _folded, _gate, _limit, _merge_parts, _offsets, _part, _slope, _store_three, _vector


@triton.jit
def _add_parts(
    parts, num_parts, cols, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FOUR: tl.constexpr
):
    """The sums [BLOCK_C] of all parts [P, 3 or 4, C], BLOCK_P at a time in order; the fourth is 0 if there is none."""
    first = tl.zeros([BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_C], tl.float32)
    third = tl.zeros([BLOCK_C], tl.float32)
    fourth = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < num_parts)[:, None] & (cols < C)[None, :]
        at = parts + part.to(tl.int64)[:, None] * ((3 + FOUR) * C) + cols[None, :]
        first += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        second += tl.sum(tl.load(at + C, mask=inside, other=0.0), 0)
        third += tl.sum(tl.load(at + 2 * C, mask=inside, other=0.0), 0)
        if FOUR:
            fourth += tl.sum(tl.load(at + 3 * C, mask=inside, other=0.0), 0)
    return first, second, third, fourth


@triton.jit
def _store_sums(pointer, cols, first, second, third, fourth, limit, C: tl.constexpr, FOUR: tl.constexpr):
    """Rows of [3 or 4, C] at ``pointer``, columns below ``limit``."""
    _store_three(pointer, cols, first, second, third, limit, C)
    if FOUR:
        tl.store(pointer + 3 * C + cols, fourth, mask=cols < limit)


@triton.jit
def _row_sums(
    grad, x, dx, first, rows, cols, mean, rstd, inverse, shift, alpha, alpha_stride, weight, bias,
    grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SHIFT: tl.constexpr, AFFINE: tl.constexpr,
    WRITE_DX: tl.constexpr,
):  # fmt: skip
    """Σ dz, Σ dz·x̂, Σ g·x·(1 − p) and, with HAS_SHIFT, Σ dx [BLOCK_C] over ``rows`` rows, dz = g·x·(1 − α)·p·(1 − p).

    WRITE_DX: also dx, where no gradient goes through the statistics (evaluation).
    """
    inside = (cols < C)[None, :]
    scale, rate, offset = _folded(rstd, weight, bias, cols, C, AFFINE)
    slope = _slope(alpha, alpha_stride, cols, C)
    rest = 1.0 - slope
    up, source = _offsets(grad_stride, grad_channel, cols, BLOCK_R), _offsets(x_stride, x_channel, cols, BLOCK_R)
    target = _offsets(C, 1, cols, BLOCK_R)
    direct = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    slanted = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    closed = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if HAS_SHIFT:
        moved = _vector(shift, cols, C)
        opened = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    grad += first * grad_stride
    x += first * x_stride
    dx += first * C
    for start in range(0, rows, BLOCK_R):
        live = (start + tl.arange(0, BLOCK_R) < rows)[:, None] & inside
        g = tl.load(grad + up, mask=live, other=0.0).to(tl.float32)
        value = tl.load(x + source, mask=live, other=0.0).to(tl.float32)
        centred = value - mean[None, :]
        p = _gate(centred, rate, offset, AFFINE)
        if HAS_SHIFT:
            value += moved[None, :]
            opened += g * (slope[None, :] + rest[None, :] * p)
        q_part = g * value * (1.0 - p)
        dz = q_part * p
        direct += dz
        slanted += dz * centred
        closed += q_part
        if WRITE_DX:
            result = g * (slope[None, :] + rest[None, :] * p) + (rest * scale)[None, :] * dz
            tl.store(dx + target, result.to(dx.dtype.element_ty), mask=live)
            dx += BLOCK_R * C
        grad += BLOCK_R * grad_stride
        x += BLOCK_R * x_stride
    sum_dz = rest * tl.sum(direct, 0)
    sum_dx = tl.zeros_like(sum_dz)
    if HAS_SHIFT:
        sum_dx = tl.sum(opened, 0) + tl.where(inverse == 0, scale * sum_dz, 0.0)
    return sum_dz, rest * rstd * tl.sum(slanted, 0), tl.sum(closed, 0), sum_dx


@triton.jit
def _gradient_rows(
    grad, x, mask, dx, first, rows, cols, mean, rstd, inverse, sum_dz, sum_slanted, shift, alpha, alpha_stride, weight, bias,
    grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, BLOCK_R: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SHIFT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """dx = g·(α + (1 − α)·p) + rstd·weight·(dz − [row counts]·(Σ dz + x̂·Σ dz·x̂) / count) for ``rows`` rows."""
    slot = tl.arange(0, BLOCK_R)
    inside = (cols < C)[None, :]
    scale, rate, offset = _folded(rstd, weight, bias, cols, C, AFFINE)
    slope = _slope(alpha, alpha_stride, cols, C)
    rest = 1.0 - slope
    if HAS_SHIFT:
        moved = _vector(shift, cols, C)
    level = scale * inverse * sum_dz
    tilt = scale * inverse * sum_slanted * rstd
    up, source = _offsets(grad_stride, grad_channel, cols, BLOCK_R), _offsets(x_stride, x_channel, cols, BLOCK_R)
    target = _offsets(C, 1, cols, BLOCK_R)
    grad += first * grad_stride
    x += first * x_stride
    dx += first * C
    for start in range(0, rows, BLOCK_R):
        alive = start + slot < rows
        live = alive[:, None] & inside
        g = tl.load(grad + up, mask=live, other=0.0).to(tl.float32)
        value = tl.load(x + source, mask=live, other=0.0).to(tl.float32)
        centred = value - mean[None, :]
        p = _gate(centred, rate, offset, AFFINE)
        through = level[None, :] + centred * tilt[None, :]
        if HAS_MASK:
            counts = tl.load(mask + first + start + slot, mask=alive, other=0) != 0
            through = tl.where(counts[:, None], through, 0.0)
        if HAS_SHIFT:
            value += moved[None, :]
        result = (
            g * (slope[None, :] + rest[None, :] * p) + (g * value * p * (1.0 - p)) * (rest * scale)[None, :] - through
        )
        tl.store(dx + target, result.to(dx.dtype.element_ty), mask=live)
        grad += BLOCK_R * grad_stride
        x += BLOCK_R * x_stride
        dx += BLOCK_R * C


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "x_stride", "grad_stride"])
def sum_parts(
    grad, x, dx, parts, normaliser, shift, alpha, alpha_stride, weight, bias,
    num_rows, rows_per_part, grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr, AFFINE: tl.constexpr, WRITE_DX: tl.constexpr,
):  # fmt: skip
    """parts [P, 3 or 4, C] ← the sums of every part; grid (blocks of channels, P)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    first, rows = _part(part, rows_per_part, num_rows)
    sum_dz, sum_slanted, sum_closed, sum_dx = _row_sums(
        grad, x, dx, first, rows, cols, _vector(normaliser, cols, C), _vector(normaliser + C, cols, C),
        _vector(normaliser + 2 * C, cols, C), shift, alpha, alpha_stride, weight, bias,
        tl.cast(grad_stride, tl.int64) * GRAD_UNIT, grad_channel, tl.cast(x_stride, tl.int64) * X_UNIT, x_channel,
        C, BLOCK_R, BLOCK_C, HAS_SHIFT, AFFINE, WRITE_DX,
    )  # fmt: skip
    parts += tl.cast(part, tl.int64) * ((3 + HAS_SHIFT) * C)
    _store_sums(parts, cols, sum_dz, sum_slanted, sum_closed, sum_dx, C, C, HAS_SHIFT)


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "num_parts", "x_stride", "grad_stride"])
def apply_gradient(
    grad, x, mask, dx, parts, num_parts, sums, normaliser, shift, alpha, alpha_stride, weight, bias,
    num_rows, rows_per_part, grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SHIFT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Add up ``parts``, keep the sums [3 or 4, C] (gradients of bias, weight, α and shift), and write dx."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    first, rows = _part(part, rows_per_part, num_rows)
    sum_dz, sum_slanted, sum_closed, sum_dx = _add_parts(parts, num_parts, cols, C, BLOCK_C, BLOCK_P, HAS_SHIFT)
    _store_sums(sums, cols, sum_dz, sum_slanted, sum_closed, sum_dx, _limit(part, C), C, HAS_SHIFT)
    _gradient_rows(
        grad, x, mask, dx, first, rows, cols, _vector(normaliser, cols, C), _vector(normaliser + C, cols, C),
        _vector(normaliser + 2 * C, cols, C), sum_dz, sum_slanted, shift, alpha, alpha_stride, weight, bias,
        tl.cast(grad_stride, tl.int64) * GRAD_UNIT, grad_channel, tl.cast(x_stride, tl.int64) * X_UNIT, x_channel,
        C, BLOCK_R, HAS_MASK, HAS_SHIFT, AFFINE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def finish_parts(
    parts, num_parts, result,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, MOMENTS: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """result [3 or 4, C] ← parts [P, 3 or 4, C] merged (MOMENTS, always 3) or added; only where no other pass follows."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if MOMENTS:
        first, second, third = _merge_parts(parts, num_parts, cols, C, BLOCK_C, BLOCK_P)
        _store_three(result, cols, first, second, third, C, C)
    else:
        first, second, third, fourth = _add_parts(parts, num_parts, cols, C, BLOCK_C, BLOCK_P, HAS_SHIFT)
        _store_sums(result, cols, first, second, third, fourth, C, C, HAS_SHIFT)
