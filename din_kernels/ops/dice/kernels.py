"""Triton kernels of Dice: two passes each way, one in evaluation.

Rows x [N, C]; a program owns BLOCK_C channels and a run of consecutive rows (a *part*), which it walks in tiles
[BLOCK_R, BLOCK_C]. Training reads x twice forward and (g, x) twice backward, and writes y and dx once: ``moments_parts``
and ``sum_parts`` leave three numbers per part and channel in ``parts`` [P, 3, C]; every program of the pass that follows
adds up the parts of its own channels, in the same order, so there is no launch between, no atomic, and one result. The
second pass takes the parts in reverse, to find in the L2 cache what the first one read last. Where a program can hold
whole channels there is one launch each way, which reads everything once (``kernels_columns.py``).

Statistics. Each of the BLOCK_R rows of a tile (a *slot*) keeps sums of x − origin and its square, where origin is the first
value that counted in that slot: cancellation is then bounded by the tiles a program walks, and is 2 for rows in random order,
however large the mean. Slots, then parts, then processes are merged as (count, mean, M2) by Chan's formula.

Numbers that do not vary along rows are folded before the loop, so that an element costs little more than its sigmoid:
with centred = x − mean, p = 1 / (1 + 2^(centred·rate + offset)), rate = −log2(e)·rstd·weight, offset = −log2(e)·bias.

Shift. With HAS_SHIFT the activation's input is z = x + shift, where x comes from a GEMM and ``shift`` [C] is the bias that
the GEMM left out. The variance and z − E[z] = x − E[x] do not see it: the statistics pass does without it, ``normaliser``
holds the mean of x, and only factors z and running means take the shift.

Strides come in units: ``x_stride``·X_UNIT elements lie between rows, so that the compiler knows how they are aligned.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# ---- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def _part(part, rows_per_part, num_rows):
    """First row (int64) and number of rows of a part."""
    first = tl.cast(part, tl.int64) * rows_per_part
    return first, tl.minimum(num_rows - first, rows_per_part).to(tl.int32)


@triton.jit
def _limit(part, C: tl.constexpr):
    """C for part 0 and 0 for others: what all parts know, one stores."""
    return (part == 0).to(tl.int32) * C


@triton.jit
def _offsets(stride, channel_stride, cols, BLOCK_R: tl.constexpr):
    """Offsets [BLOCK_R, BLOCK_C] of a tile's elements from its first row, int64: strides may be anything."""
    rows = tl.arange(0, BLOCK_R).to(tl.int64)
    return rows[:, None] * stride + cols.to(tl.int64)[None, :] * channel_stride


@triton.jit
def _vector(pointer, cols, C: tl.constexpr):
    return tl.load(pointer + cols, mask=cols < C, other=0.0).to(tl.float32)


# ---- statistics -----------------------------------------------------------------------------------------------------


@triton.jit
def _merge(count, near, rest, m2):
    """Moments [BLOCK_C] of a union from those of its parts [K, BLOCK_C], whose means are near + rest, not yet rounded to
    one number (Chan, Golub and LeVeque, 1979).

    Means are taken relative to one of them: their sum would round away what a small variance needs.
    """
    total = tl.sum(count, 0)
    base = tl.max(tl.where(count > 0, near + rest, float("-inf")), 0)
    base = tl.where(total > 0, base, 0.0)
    away = tl.where(count > 0, (near - base[None, :]) + rest, 0.0)
    shift = tl.sum(count * away, 0) / tl.maximum(total, 1.0)
    off = away - shift[None, :]
    return total, base + shift, tl.sum(m2 + count * off * off, 0)


@triton.jit
def _row_moments(
    x, mask, first, rows, cols, x_stride, x_channel,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2) [BLOCK_C] of ``rows`` rows from ``first`` on, or those of them that ``mask`` selects."""
    slot = tl.arange(0, BLOCK_R)
    inside = (cols < C)[None, :]
    offsets = _offsets(x_stride, x_channel, cols, BLOCK_R)
    origin = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_R], tl.float32)
    x += first * x_stride
    for start in range(0, rows, BLOCK_R):
        counts = start + slot < rows
        value = tl.load(x + offsets, mask=counts[:, None] & inside, other=0.0).to(tl.float32)
        if HAS_MASK:
            counts = counts & (tl.load(mask + first + start + slot, mask=counts, other=0) != 0)
        origin = tl.where((count == 0)[:, None], value, origin)
        away = tl.where(counts[:, None], value - origin, 0.0)
        total += away
        squares += away * away
        count += tl.where(counts, 1.0, 0.0)
        x += BLOCK_R * x_stride
    counted = tl.broadcast_to(count[:, None], [BLOCK_R, BLOCK_C])
    shift = total / tl.maximum(counted, 1.0)
    m2 = squares - total * shift
    return _merge(counted, origin, shift, tl.where(m2 < 0, 0.0, m2))  # not tl.maximum: NaN must stay


@triton.jit
def _merge_parts(parts, num_parts, cols, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """(count, mean, M2) [BLOCK_C] of all parts [P, 3, C], BLOCK_P at a time in order."""
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part < num_parts)[:, None] & (cols < C)[None, :]
        at = parts + part.to(tl.int64)[:, None] * (3 * C) + cols[None, :]
        more, other_mean, other_m2 = _merge(
            tl.load(at, mask=inside, other=0.0),
            tl.load(at + C, mask=inside, other=0.0),
            0.0,
            tl.load(at + 2 * C, mask=inside, other=0.0),
        )
        both = tl.maximum(count + more, 1.0)
        delta = tl.where((count > 0) & (more > 0), other_mean - mean, 0.0)
        mean = tl.where(count > 0, mean + delta * (more / both), other_mean)
        m2 += other_m2 + delta * delta * (count * (more / both))
        count += more
    return count, mean, m2


@triton.jit
def _store_three(pointer, cols, first, second, third, limit, C: tl.constexpr):
    """Rows of [3, C] at ``pointer``, columns below ``limit``."""
    mask = cols < limit
    tl.store(pointer + cols, first, mask=mask)
    tl.store(pointer + C + cols, second, mask=mask)
    tl.store(pointer + 2 * C + cols, third, mask=mask)


@triton.jit
def _move(buffer, cols, value, step, keep):
    """buffer += step·(value − buffer) where ``keep``."""
    old = tl.load(buffer + cols, mask=keep, other=0.0).to(tl.float32)
    tl.store(buffer + cols, (old + step * (value - old)).to(buffer.dtype.element_ty), mask=keep)


@triton.jit
def _normaliser(
    count, mean, m2, shift, running_mean, running_var, tracked, step, eps, normaliser, cols, limit,
    C: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RUNNING: tl.constexpr, HAS_TRACKED: tl.constexpr,
    STEP_POINTER: tl.constexpr,
):  # fmt: skip
    """What normalises: mean and 1/√(var + ε) [BLOCK_C]. It is kept, and the running statistics are updated, for columns
    below ``limit``: C for the programs of one part, 0 for all others.

    Fewer than two rows have no variance: then the running statistics serve, and nobody writes them; else nobody
    but that one part reads them. So no program ever reads what another one writes.
    """
    inside = cols < C
    enough = (count >= 2) & inside
    inverse = tl.where(enough, 1.0 / tl.maximum(count, 1.0), 0.0)
    var = m2 * inverse
    used_mean = tl.where(enough, mean, 0.0)
    used_var = tl.where(enough, var, 1.0)
    if HAS_SHIFT:
        moved = _vector(shift, cols, C)
        used_mean = tl.where(enough, used_mean, -moved)
    if HAS_RUNNING:
        serve = inside & (count < 2)
        used_mean += tl.load(running_mean + cols, mask=serve, other=0.0).to(tl.float32)
        old_var = tl.load(running_var + cols, mask=serve, other=0.0).to(tl.float32)
        used_var = tl.where(serve, old_var, used_var)
    rstd = 1.0 / tl.sqrt_rn(used_var + eps)
    _store_three(normaliser, cols, used_mean, rstd, inverse, limit, C)
    if HAS_RUNNING:
        if STEP_POINTER:
            step = tl.load(step)
        keep = enough & (cols < limit)
        if HAS_SHIFT:
            mean += moved
        _move(running_mean, cols, mean, step, keep)
        _move(running_var, cols, m2 / tl.maximum(count - 1.0, 1.0), step, keep)
        if HAS_TRACKED:
            if tl.program_id(0) == 0:
                tl.store(tracked + cols, tl.load(tracked + cols, mask=keep & (cols == 0)) + 1, mask=keep & (cols == 0))
    return used_mean, rstd


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _folded(rstd, weight, bias, cols, C: tl.constexpr, AFFINE: tl.constexpr):
    """(rstd·weight, rate, offset) of 2^(centred·rate + offset)."""
    scale = rstd
    offset = tl.zeros_like(rstd)
    if AFFINE:
        scale = rstd * _vector(weight, cols, C)
        offset = _vector(bias, cols, C) * (-LOG2E)
    return scale, scale * (-LOG2E), offset


@triton.jit
def _gate(centred, rate, offset, AFFINE: tl.constexpr):
    """p = σ(z) for −log2(e)·z = centred·rate + offset."""
    exponent = centred * rate[None, :]
    if AFFINE:
        exponent += offset[None, :]
    return 1.0 / (1.0 + tl.exp2(exponent))


@triton.jit
def _moved(shift, cols, C: tl.constexpr, HAS_SHIFT: tl.constexpr):
    moved = tl.zeros_like(cols).to(tl.float32)
    if HAS_SHIFT:
        moved = _vector(shift, cols, C)
    return moved


@triton.jit
def _slope(alpha, alpha_stride, cols, C: tl.constexpr):
    return tl.load(alpha + cols * alpha_stride, mask=cols < C, other=0.0).to(tl.float32)


@triton.jit
def _activated(value, mean, rate, offset, slope, moved, HAS_SHIFT: tl.constexpr, AFFINE: tl.constexpr):
    """(x + shift)·(α + (1 − α)·p)."""
    p = _gate(value - mean[None, :], rate, offset, AFFINE)
    if HAS_SHIFT:
        value += moved[None, :]
    return value * (slope[None, :] + (1.0 - slope)[None, :] * p)


@triton.jit
def _apply_rows(
    x, y, first, rows, cols, mean, rstd, shift, alpha, alpha_stride, weight, bias, x_stride, x_channel,
    C: tl.constexpr, BLOCK_R: tl.constexpr, HAS_SHIFT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """y = (x + shift)·(α + (1 − α)·p) for ``rows`` rows from ``first`` on; y may lie in the memory of x."""
    inside = (cols < C)[None, :]
    _, rate, offset = _folded(rstd, weight, bias, cols, C, AFFINE)
    slope = _slope(alpha, alpha_stride, cols, C)
    moved = _moved(shift, cols, C, HAS_SHIFT)
    source, target = _offsets(x_stride, x_channel, cols, BLOCK_R), _offsets(C, 1, cols, BLOCK_R)
    x += first * x_stride
    y += first * C
    for start in range(0, rows, BLOCK_R):
        live = (start + tl.arange(0, BLOCK_R) < rows)[:, None] & inside
        value = tl.load(x + source, mask=live, other=0.0).to(tl.float32)
        result = _activated(value, mean, rate, offset, slope, moved, HAS_SHIFT, AFFINE)
        tl.store(y + target, result.to(y.dtype.element_ty), mask=live)
        x += BLOCK_R * x_stride
        y += BLOCK_R * C


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "x_stride"])
def moments_parts(
    x, mask, parts, num_rows, rows_per_part, x_stride, x_channel,
    C: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """parts [P, 3, C] ← (count, mean, M2) of every part; grid (blocks of channels, P)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    first, rows = _part(part, rows_per_part, num_rows)
    count, mean, m2 = _row_moments(
        x, mask, first, rows, cols, tl.cast(x_stride, tl.int64) * X_UNIT, x_channel, C, BLOCK_R, BLOCK_C, HAS_MASK
    )
    _store_three(parts + tl.cast(part, tl.int64) * (3 * C), cols, count, mean, m2, C, C)


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "num_parts", "x_stride"])
def apply_training(
    x, y, parts, num_parts, shift, running_mean, running_var, tracked, step, normaliser, alpha, alpha_stride, weight, bias,
    num_rows, rows_per_part, x_stride, x_channel, eps,
    C: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RUNNING: tl.constexpr, HAS_TRACKED: tl.constexpr, STEP_POINTER: tl.constexpr,
    AFFINE: tl.constexpr,
):  # fmt: skip
    """Merge ``parts``, update the running statistics, keep ``normaliser`` [3, C] for backward, and write y."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    first, rows = _part(part, rows_per_part, num_rows)
    count, mean, m2 = _merge_parts(parts, num_parts, cols, C, BLOCK_C, BLOCK_P)
    mean, rstd = _normaliser(
        count, mean, m2, shift, running_mean, running_var, tracked, step, eps, normaliser, cols, _limit(part, C),
        C, HAS_SHIFT, HAS_RUNNING, HAS_TRACKED, STEP_POINTER,
    )  # fmt: skip
    _apply_rows(
        x, y, first, rows, cols, mean, rstd, shift, alpha, alpha_stride, weight, bias,
        tl.cast(x_stride, tl.int64) * X_UNIT, x_channel, C, BLOCK_R, HAS_SHIFT, AFFINE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "rows_per_part", "x_stride"])
def apply_running(
    x, y, shift, running_mean, running_var, normaliser, alpha, alpha_stride, weight, bias,
    num_rows, rows_per_part, x_stride, x_channel, eps,
    C: tl.constexpr, X_UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SHIFT: tl.constexpr,
    AFFINE: tl.constexpr,
):  # fmt: skip
    """Evaluation: y from the running statistics, and ``normaliser`` [3, C] with 1/count = 0."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    first, rows = _part(part, rows_per_part, num_rows)
    mean = _vector(running_mean, cols, C)
    if HAS_SHIFT:
        mean -= _vector(shift, cols, C)
    rstd = 1.0 / tl.sqrt_rn(_vector(running_var, cols, C) + eps)
    _store_three(normaliser, cols, mean, rstd, tl.zeros_like(mean), _limit(part, C), C)
    _apply_rows(
        x, y, first, rows, cols, mean, rstd, shift, alpha, alpha_stride, weight, bias,
        tl.cast(x_stride, tl.int64) * X_UNIT, x_channel, C, BLOCK_R, HAS_SHIFT, AFFINE,
    )  # fmt: skip
