"""Triton kernels of Dice, backward: a pass that sums and a pass that writes dx, or both in one launch; see kernels.py."""

import triton
import triton.language as tl

from .kernels import _folded, _gate, _limit, _merge_parts, _offsets, _part, _store_three, _vector


@triton.jit
def _add_parts(parts, num_parts, cols, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The three sums [BLOCK_C] of all parts [P, 3, C], BLOCK_P at a time in order."""
    first = tl.zeros([BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_C], tl.float32)
    third = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < num_parts)[:, None] & (cols < C)[None, :]
        at = parts + part.to(tl.int64)[:, None] * (3 * C) + cols[None, :]
        first += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        second += tl.sum(tl.load(at + C, mask=inside, other=0.0), 0)
        third += tl.sum(tl.load(at + 2 * C, mask=inside, other=0.0), 0)
    return first, second, third


@triton.jit
def _row_sums(
    grad, x, dx, first, rows, cols, mean, rstd, alpha, alpha_stride, weight, bias,
    grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, AFFINE: tl.constexpr, WRITE_DX: tl.constexpr,
):  # fmt: skip
    """Σ dz, Σ dz·x̂ and Σ g·x·(1 − p) [BLOCK_C] over ``rows`` rows, dz = g·x·(1 − α)·p·(1 − p).

    WRITE_DX: also dx, where no gradient goes through the statistics (evaluation).
    """
    inside = (cols < C)[None, :]
    scale, rate, offset = _folded(rstd, weight, bias, cols, C, AFFINE)
    slope = tl.load(alpha + cols * alpha_stride, mask=cols < C, other=0.0).to(tl.float32)
    rest = 1.0 - slope
    up, source = _offsets(grad_stride, grad_channel, cols, BLOCK_R), _offsets(x_stride, x_channel, cols, BLOCK_R)
    target = _offsets(C, 1, cols, BLOCK_R)
    direct = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    slanted = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    closed = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    grad += first * grad_stride
    x += first * x_stride
    dx += first * C
    for start in range(0, rows, BLOCK_R):
        live = (start + tl.arange(0, BLOCK_R) < rows)[:, None] & inside
        g = tl.load(grad + up, mask=live, other=0.0).to(tl.float32)
        value = tl.load(x + source, mask=live, other=0.0).to(tl.float32)
        centred = value - mean[None, :]
        p = _gate(centred, rate, offset, AFFINE)
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
    return rest * tl.sum(direct, 0), rest * rstd * tl.sum(slanted, 0), tl.sum(closed, 0)


@triton.jit
def _gradient_rows(
    grad, x, mask, dx, first, rows, cols, mean, rstd, inverse, sum_dz, sum_slanted, alpha, alpha_stride, weight, bias,
    grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, BLOCK_R: tl.constexpr, HAS_MASK: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """dx = g·(α + (1 − α)·p) + rstd·weight·(dz − [row counts]·(Σ dz + x̂·Σ dz·x̂) / count) for ``rows`` rows."""
    slot = tl.arange(0, BLOCK_R)
    inside = (cols < C)[None, :]
    scale, rate, offset = _folded(rstd, weight, bias, cols, C, AFFINE)
    slope = tl.load(alpha + cols * alpha_stride, mask=cols < C, other=0.0).to(tl.float32)
    rest = 1.0 - slope
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
        result = (
            g * (slope[None, :] + rest[None, :] * p) + (g * value * p * (1.0 - p)) * (rest * scale)[None, :] - through
        )
        tl.store(dx + target, result.to(dx.dtype.element_ty), mask=live)
        grad += BLOCK_R * grad_stride
        x += BLOCK_R * x_stride
        dx += BLOCK_R * C


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "x_stride", "grad_stride"])
def sum_parts(
    grad, x, dx, parts, normaliser, alpha, alpha_stride, weight, bias,
    num_rows, rows_per_part, grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    AFFINE: tl.constexpr, WRITE_DX: tl.constexpr,
):  # fmt: skip
    """parts [P, 3, C] ← the three sums of every part; grid (blocks of channels, P)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    first, rows = _part(part, rows_per_part, num_rows)
    sum_dz, sum_slanted, sum_closed = _row_sums(
        grad, x, dx, first, rows, cols, _vector(normaliser, cols, C), _vector(normaliser + C, cols, C),
        alpha, alpha_stride, weight, bias, tl.cast(grad_stride, tl.int64) * GRAD_UNIT, grad_channel,
        tl.cast(x_stride, tl.int64) * X_UNIT, x_channel, C, BLOCK_R, BLOCK_C, AFFINE, WRITE_DX,
    )  # fmt: skip
    _store_three(parts + tl.cast(part, tl.int64) * (3 * C), cols, sum_dz, sum_slanted, sum_closed, C, C)


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "num_parts", "x_stride", "grad_stride"])
def apply_gradient(
    grad, x, mask, dx, parts, num_parts, sums, normaliser, alpha, alpha_stride, weight, bias,
    num_rows, rows_per_part, grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_MASK: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Add up ``parts``, keep the sums [3, C] (gradients of bias, weight and α), and write dx."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    first, rows = _part(part, rows_per_part, num_rows)
    sum_dz, sum_slanted, sum_closed = _add_parts(parts, num_parts, cols, C, BLOCK_C, BLOCK_P)
    _store_three(sums, cols, sum_dz, sum_slanted, sum_closed, _limit(part, C), C)
    _gradient_rows(
        grad, x, mask, dx, first, rows, cols, _vector(normaliser, cols, C), _vector(normaliser + C, cols, C),
        _vector(normaliser + 2 * C, cols, C), sum_dz, sum_slanted, alpha, alpha_stride, weight, bias,
        tl.cast(grad_stride, tl.int64) * GRAD_UNIT, grad_channel, tl.cast(x_stride, tl.int64) * X_UNIT, x_channel,
        C, BLOCK_R, HAS_MASK, AFFINE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "x_stride", "grad_stride"])
def backward_columns(
    grad, x, mask, dx, sums, normaliser, alpha, alpha_stride, weight, bias,
    num_rows, grad_stride, grad_channel, x_stride, x_channel,
    C: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_MASK: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """``sum_parts`` and ``apply_gradient`` in one launch, for few rows: one program does all rows of its channels."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, rows = _part(0, num_rows, num_rows)
    up_stride, stride = tl.cast(grad_stride, tl.int64) * GRAD_UNIT, tl.cast(x_stride, tl.int64) * X_UNIT
    mean, rstd = _vector(normaliser, cols, C), _vector(normaliser + C, cols, C)
    sum_dz, sum_slanted, sum_closed = _row_sums(
        grad, x, dx, first, rows, cols, mean, rstd, alpha, alpha_stride, weight, bias,
        up_stride, grad_channel, stride, x_channel, C, BLOCK_R, BLOCK_C, AFFINE, False,
    )  # fmt: skip
    _store_three(sums, cols, sum_dz, sum_slanted, sum_closed, C, C)
    _gradient_rows(
        grad, x, mask, dx, first, rows, cols, mean, rstd, _vector(normaliser + 2 * C, cols, C), sum_dz, sum_slanted,
        alpha, alpha_stride, weight, bias, up_stride, grad_channel, stride, x_channel, C, BLOCK_R, HAS_MASK, AFFINE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def finish_parts(
    parts, num_parts, result, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, MOMENTS: tl.constexpr
):
    """result [3, C] ← parts [P, 3, C] merged (MOMENTS) or added; only where a pass of its own does not follow."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if MOMENTS:
        first, second, third = _merge_parts(parts, num_parts, cols, C, BLOCK_C, BLOCK_P)
    else:
        first, second, third = _add_parts(parts, num_parts, cols, C, BLOCK_C, BLOCK_P)
    _store_three(result, cols, first, second, third, C, C)
