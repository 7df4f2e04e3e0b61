"""Triton kernels of the sparse update: chunk-carry over occurrences sorted by row.

The N occurrences of a batch are sorted by row (``plan.py``). Chunk p owns the sorted positions [p·CHUNK, (p+1)·CHUNK),
whatever rows they belong to, so work is balanced for any skew. A run of one row that lies inside a chunk is summed in
registers and its row is updated on the spot. A run cut by a chunk border leaves its part in a carry buffer: ``carry_in``
holds the part of a run that began in an earlier chunk, ``carry_out`` the first part of a run that goes on. ``finish_cut_runs``
adds the parts of each cut run in a fixed order and updates its row. A run over thousands of chunks (one id in most of the
batch) is first summed by groups of GROUP chunks in ``sum_groups``, so that no program ever adds more than a few hundred rows
one after another.

Every row is owned by exactly one program of one launch: there are no atomics, and the result does not depend on scheduling.

Rows below 32 columns would leave most lanes of a warp idle, so a program then walks LANES chunks side by side, as rows of a
[LANES, BLOCK_D] tile. From 32 columns on LANES is 1.
"""

import triton
import triton.language as tl

# Values of the constexprs OPTIMIZER and REGULARIZER.
SGD = tl.constexpr(0)
ADAGRAD = tl.constexpr(1)
ROWWISE_ADAGRAD = tl.constexpr(2)
ADAM = tl.constexpr(3)

NO_DECAY = tl.constexpr(0)
MBA = tl.constexpr(1)
L2 = tl.constexpr(2)
DIFACTO = tl.constexpr(3)


@triton.jit
def _scalar(value, IS_POINTER: tl.constexpr):
    """A hyper-parameter is a number, or a pointer to one on the device (for graphs and for values made there)."""
    if IS_POINTER:
        return tl.load(value)
    else:
        return value


@triton.jit
def _mix(x):
    """32-bit finaliser with full avalanche (constants found by C. Wellons' search, bias 0.17)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(seed, row, cols):
    """32 random bits per (seed, row, column): they do not depend on how the launch is cut up."""
    seed = tl.cast(seed, tl.int64)
    h = _mix((seed & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h ^ (row & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h ^ ((row >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _mix(h[:, None] ^ cols[None, :].to(tl.uint32))


@triton.jit
def _round_stochastic(x, noise, IS_FP16: tl.constexpr):
    """Round fp32 up or down with probability proportional to nearness, to a value bf16 (or fp16) holds exactly."""
    bits = x.to(tl.uint32, bitcast=True)
    if IS_FP16:
        rounded = ((bits + (noise & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 fp16 has a fixed spacing of 2^-24 instead of a fixed number of bits.
        fraction = (noise & 0x1FFF).to(tl.float32) * 0.0001220703125  # 2^-13
        small = tl.floor(x * 16777216.0 + fraction) * 5.9604644775390625e-08  # 2^24, 2^-24
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, small, rounded)  # 2^-14
    else:
        rounded = ((bits + (noise & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the bit trick would turn NaN into a number


@triton.jit
def _fetch(
    weight, state0, state1, occurrences, row, cols, live, stride_w,
    D: tl.constexpr, OPTIMIZER: tl.constexpr, REGULARIZER: tl.constexpr,
):  # fmt: skip
    """Read what the update of ``row`` [LANES] needs. Called before the gradients have arrived, to overlap the misses."""
    mask = live[:, None] & (cols < D)[None, :]
    w = tl.load(weight + row[:, None] * stride_w + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    s0 = w
    s1 = w
    n = row
    if OPTIMIZER == ROWWISE_ADAGRAD:
        s0 = tl.load(state0 + row, mask=live, other=0.0)[:, None]
    elif OPTIMIZER != SGD:
        s0 = tl.load(state0 + row[:, None] * D + cols[None, :], mask=mask, other=0.0)
    if OPTIMIZER == ADAM:
        s1 = tl.load(state1 + row[:, None] * D + cols[None, :], mask=mask, other=0.0)
    if REGULARIZER == MBA:
        n = tl.load(occurrences + row, mask=live, other=1).to(tl.int64)
    return w, s0, s1, n


@triton.jit
def _finish(
    weight, state0, state1, row, cols, live, total, count, w, s0, s1, n, stride_w,
    lr, grad_scale, reg_lambda, eps, beta1, beta2, bias, seed,
    D: tl.constexpr, OPTIMIZER: tl.constexpr, REGULARIZER: tl.constexpr, COUPLED: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Apply one optimizer step to ``row`` [LANES], whose summed gradient is ``total`` [LANES, BLOCK_D]."""
    mask = live[:, None] & (cols < D)[None, :]
    g = total * grad_scale
    c = w
    if REGULARIZER == MBA:
        c = (reg_lambda / tl.maximum(n, 1).to(tl.float32))[:, None] * w
    elif REGULARIZER == L2:
        c = reg_lambda * w
    elif REGULARIZER == DIFACTO:
        c = (reg_lambda * count.to(tl.float32))[:, None] * w
    if (REGULARIZER != NO_DECAY) and COUPLED:
        g += c

    if OPTIMIZER == SGD:
        new = w - lr * g
    elif OPTIMIZER == ADAM:
        s0 += (1.0 - beta1) * (g - s0)
        s1 += (1.0 - beta2) * (g * g - s1)
        new = w - (lr * bias) * s0 / (tl.sqrt(s1) + eps)
        tl.store(state0 + row[:, None] * D + cols[None, :], s0, mask=mask)
        tl.store(state1 + row[:, None] * D + cols[None, :], s1, mask=mask)
    elif OPTIMIZER == ROWWISE_ADAGRAD:
        s0 += (tl.sum(tl.where(mask, g * g, 0.0), axis=1) / D)[:, None]
        new = w - lr * g / (tl.sqrt(s0) + eps)
        tl.store(state0 + row[:, None], s0, mask=live[:, None])
    else:
        s0 += g * g
        new = w - lr * g / (tl.sqrt(s0) + eps)
        tl.store(state0 + row[:, None] * D + cols[None, :], s0, mask=mask)

    if (REGULARIZER != NO_DECAY) and (not COUPLED):
        new -= lr * c
    if ROUNDING:
        new = _round_stochastic(new, _noise(seed, row, cols), weight.dtype.element_ty == tl.float16)
    tl.store(weight + row[:, None] * stride_w + cols[None, :], new.to(weight.dtype.element_ty), mask=mask)


@triton.jit
def _gather(grad, order, i, live, cols, stride_gn, stride_gd, D: tl.constexpr):
    """Gradient rows of the sorted positions ``i`` [LANES]; zero where not ``live``."""
    source = tl.load(order + i, mask=live, other=0).to(tl.int64)
    at = grad + source[:, None] * stride_gn + cols[None, :].to(tl.int64) * stride_gd
    return tl.load(at, mask=live[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _visit(
    total, count, early, key, following, live, g, w, s0, s1, n,
    weight, state0, state1, carry_in, counts_in, chunk, cols, stride_w,
    lr, grad_scale, reg_lambda, eps, beta1, beta2, bias, seed,
    D: tl.constexpr, OPTIMIZER: tl.constexpr, REGULARIZER: tl.constexpr, COUPLED: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Add one occurrence per lane to the running sum; where it is the last of its row, put the row away."""
    total += g
    count += live.to(tl.int32)
    ends = live & (key != following)
    if tl.max(ends.to(tl.int32), axis=0) > 0:
        # The first run of a chunk may have begun earlier: then its row is not ours, and its sum goes to the carry.
        carried = ends & early
        at = carry_in + chunk[:, None] * D + cols[None, :]
        tl.store(at, total, mask=carried[:, None] & (cols < D)[None, :])
        if REGULARIZER == DIFACTO:
            tl.store(counts_in + chunk, count, mask=carried)
        _finish(
            weight, state0, state1, key, cols, ends & (early == 0), total, count, w, s0, s1, n, stride_w,
            lr, grad_scale, reg_lambda, eps, beta1, beta2, bias, seed, D, OPTIMIZER, REGULARIZER, COUPLED, ROUNDING,
        )  # fmt: skip
        total = tl.where(ends[:, None], 0.0, total)
        count = tl.where(ends, 0, count)
        early = early & (ends == 0)
    return total, count, early


@triton.jit(do_not_specialize=["N", "seed"])
def update_chunks(
    keys, order, grad, weight, state0, state1, occurrences, carry_in, carry_out, counts_in, counts_out, found_inf,
    N, num_rows, stride_gn, stride_gd, stride_w, lr, grad_scale, reg_lambda, eps, beta1, beta2, bias, seed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    OPTIMIZER: tl.constexpr, REGULARIZER: tl.constexpr, COUPLED: tl.constexpr, ROUNDING: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, LR_POINTER: tl.constexpr, SCALE_POINTER: tl.constexpr, BIAS_POINTER: tl.constexpr,
    SEED_POINTER: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of LANES chunks and update every row whose occurrences all lie in one chunk."""
    tl.static_assert(CHUNK % UNROLL == 0)
    first = tl.program_id(0).to(tl.int64) * LANES
    # Skipped ids sort to the end under the key num_rows: their chunks have nothing to do.
    run = tl.load(keys + first * CHUNK) < num_rows
    if HAS_FOUND_INF:
        run = run & (tl.load(found_inf) == 0.0)
    if run:
        # New names: in Triton a branch may not turn a pointer that exists outside it into a number.
        rate = _scalar(lr, LR_POINTER)
        scale = _scalar(grad_scale, SCALE_POINTER)
        correction = _scalar(bias, BIAS_POINTER)
        salt = _scalar(seed, SEED_POINTER)
        cols = tl.arange(0, BLOCK_D)
        chunk = first + tl.arange(0, LANES)
        i = chunk * CHUNK
        key = tl.load(keys + i, mask=i < N, other=num_rows).to(tl.int64)
        before = tl.load(keys + i - 1, mask=(i > 0) & (i < N), other=-1).to(tl.int64)
        early = (before == key) & (key < num_rows)
        total = tl.zeros((LANES, BLOCK_D), tl.float32)
        count = tl.zeros((LANES,), tl.int32)
        last = key
        for _ in range(0, CHUNK, UNROLL):
            # All misses of UNROLL occurrences are issued before the first of them is used: their gradient rows, and the
            # table rows of those that end a run (for a carried run in vain, at most once per chunk).
            live0 = key < num_rows
            key1 = tl.load(keys + i + 1, mask=i + 1 < N, other=num_rows).to(tl.int64)
            following = key1
            g0 = _gather(grad, order, i, live0, cols, stride_gn, stride_gd, D)
            if UNROLL >= 2:
                live1 = key1 < num_rows
                key2 = tl.load(keys + i + 2, mask=i + 2 < N, other=num_rows).to(tl.int64)
                following = key2
                g1 = _gather(grad, order, i + 1, live1, cols, stride_gn, stride_gd, D)
            if UNROLL >= 4:
                live2 = key2 < num_rows
                key3 = tl.load(keys + i + 3, mask=i + 3 < N, other=num_rows).to(tl.int64)
                live3 = key3 < num_rows
                following = tl.load(keys + i + 4, mask=i + 4 < N, other=num_rows).to(tl.int64)
                g2 = _gather(grad, order, i + 2, live2, cols, stride_gn, stride_gd, D)
                g3 = _gather(grad, order, i + 3, live3, cols, stride_gn, stride_gd, D)
            w0, a0, b0, n0 = _fetch(
                weight, state0, state1, occurrences, key, cols, live0 & (key != key1), stride_w,
                D, OPTIMIZER, REGULARIZER,
            )  # fmt: skip
            if UNROLL >= 2:
                w1, a1, b1, n1 = _fetch(
                    weight, state0, state1, occurrences, key1, cols, live1 & (key1 != key2), stride_w,
                    D, OPTIMIZER, REGULARIZER,
                )  # fmt: skip
            if UNROLL >= 4:
                w2, a2, b2, n2 = _fetch(
                    weight, state0, state1, occurrences, key2, cols, live2 & (key2 != key3), stride_w,
                    D, OPTIMIZER, REGULARIZER,
                )  # fmt: skip
                w3, a3, b3, n3 = _fetch(
                    weight, state0, state1, occurrences, key3, cols, live3 & (key3 != following), stride_w,
                    D, OPTIMIZER, REGULARIZER,
                )  # fmt: skip
            total, count, early = _visit(
                total, count, early, key, key1, live0, g0, w0, a0, b0, n0,
                weight, state0, state1, carry_in, counts_in, chunk, cols, stride_w,
                rate, scale, reg_lambda, eps, beta1, beta2, correction, salt, D, OPTIMIZER, REGULARIZER, COUPLED, ROUNDING,
            )  # fmt: skip
            last = key
            if UNROLL >= 2:
                total, count, early = _visit(
                    total, count, early, key1, key2, live1, g1, w1, a1, b1, n1,
                    weight, state0, state1, carry_in, counts_in, chunk, cols, stride_w, rate, scale,
                    reg_lambda, eps, beta1, beta2, correction, salt, D, OPTIMIZER, REGULARIZER, COUPLED, ROUNDING,
                )  # fmt: skip
                last = key1
            if UNROLL >= 4:
                total, count, early = _visit(
                    total, count, early, key2, key3, live2, g2, w2, a2, b2, n2,
                    weight, state0, state1, carry_in, counts_in, chunk, cols, stride_w, rate, scale,
                    reg_lambda, eps, beta1, beta2, correction, salt, D, OPTIMIZER, REGULARIZER, COUPLED, ROUNDING,
                )  # fmt: skip
                total, count, early = _visit(
                    total, count, early, key3, following, live3, g3, w3, a3, b3, n3,
                    weight, state0, state1, carry_in, counts_in, chunk, cols, stride_w, rate, scale,
                    reg_lambda, eps, beta1, beta2, correction, salt, D, OPTIMIZER, REGULARIZER, COUPLED, ROUNDING,
                )  # fmt: skip
                last = key3
            i += UNROLL
            key = following
        # ``key`` is now the first key of the next chunk. A run that goes on there leaves its part here.
        cut = (last == key) & (last < num_rows)
        at = chunk[:, None] * D + cols[None, :]
        inside = (cols < D)[None, :]
        tl.store(carry_in + at, total, mask=(cut & early)[:, None] & inside)
        tl.store(carry_out + at, total, mask=(cut & (early == 0))[:, None] & inside)
        if REGULARIZER == DIFACTO:
            tl.store(counts_in + chunk, count, mask=cut & early)
            tl.store(counts_out + chunk, count, mask=cut & (early == 0))


@triton.jit(do_not_specialize=["N"])
def sum_groups(
    keys, carry_in, group_sums, N, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the carries of GROUP consecutive chunks where all of them belong to one run that began earlier."""
    tl.static_assert(GROUP % ROWS == 0)
    group = tl.program_id(0).to(tl.int64)
    begin = group * (GROUP * CHUNK)
    end = tl.minimum(begin + GROUP * CHUNK, N)
    key = tl.load(keys + end - 1)
    before = tl.load(keys + begin - 1, mask=begin > 0, other=-1)
    if (before == key) & (key < num_rows):
        cols = tl.arange(0, BLOCK_D)
        rows = tl.arange(0, ROWS)
        total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for r in range(0, GROUP, ROWS):
            at = carry_in + (group * GROUP + r + rows)[:, None] * D + cols[None, :]
            total += tl.load(at, mask=(cols < D)[None, :] & (rows >= 0)[:, None], other=0.0)
        tl.store(group_sums + group * D + cols, tl.sum(total, axis=0), mask=cols < D)


@triton.jit
def _add_parts(
    total, count, part, limit, key, keys, carry_in, counts_in, N, cols,
    D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Add ``carry_in`` of the chunks part, part+1, … below ``limit`` while they begin with ``key``."""
    rows = tl.arange(0, ROWS)
    goes_on = part < limit
    while goes_on:
        p = part + rows
        mine = (p < limit) & (tl.load(keys + p * CHUNK, mask=p < limit, other=-1) == key)
        at = carry_in + p[:, None] * D + cols[None, :]
        total += tl.load(at, mask=mine[:, None] & (cols < D)[None, :], other=0.0)
        if COUNTS:
            count += tl.sum(tl.load(counts_in + p, mask=mine, other=0), axis=0)
        part += ROWS
        goes_on = (part < limit) & (tl.sum(mine.to(tl.int32), axis=0) == ROWS)
    return total, count


@triton.jit(do_not_specialize=["N", "seed"])
def finish_cut_runs(
    keys, weight, state0, state1, occurrences, carry_in, carry_out, counts_in, counts_out, group_sums, found_inf,
    N, num_rows, stride_w, lr, grad_scale, reg_lambda, eps, beta1, beta2, bias, seed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    OPTIMIZER: tl.constexpr, REGULARIZER: tl.constexpr, COUPLED: tl.constexpr, ROUNDING: tl.constexpr,
    GROUPED: tl.constexpr, HAS_FOUND_INF: tl.constexpr, LR_POINTER: tl.constexpr, SCALE_POINTER: tl.constexpr,
    BIAS_POINTER: tl.constexpr, SEED_POINTER: tl.constexpr,
):  # fmt: skip
    """One program per chunk: where a run begins in it and is cut at its end, add the run's parts and update its row."""
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    end = start + CHUNK  # the grid leaves the last chunk out, so position ``end`` exists
    key = tl.load(keys + end - 1)
    run = (tl.load(keys + end) == key) & (key < num_rows)
    if start > 0:
        run = run & (tl.load(keys + start - 1) != key)
    if HAS_FOUND_INF:
        run = run & (tl.load(found_inf) == 0.0)
    if run:
        cols = tl.arange(0, BLOCK_D)
        rows = tl.arange(0, ROWS)
        inside = cols < D
        chunks = tl.cdiv(N, CHUNK).to(tl.int64)
        total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        count = tl.zeros((1,), tl.int32)
        if REGULARIZER == DIFACTO:
            count += tl.load(counts_out + chunk)
        if GROUPED:
            border = (chunk + GROUP) // GROUP * GROUP
            total, count = _add_parts(
                total, count, chunk + 1, tl.minimum(border, chunks), key, keys, carry_in, counts_in, N, cols,
                D, CHUNK, ROWS, REGULARIZER == DIFACTO,
            )  # fmt: skip
            # Whole groups inside the run: their sums stand ready. Past the run's end no group ends with its key.
            group = border // GROUP
            groups = chunks // GROUP
            goes_on = group < groups
            while goes_on:
                j = group + rows
                tail = tl.minimum((j + 1) * (GROUP * CHUNK), N) - 1
                mine = (j < groups) & (tl.load(keys + tail, mask=j < groups, other=-1) == key)
                at = group_sums + j[:, None] * D + cols[None, :]
                total += tl.load(at, mask=mine[:, None] & inside[None, :], other=0.0)
                if REGULARIZER == DIFACTO:
                    count += tl.sum(tl.where(mine, tail + 1 - j * (GROUP * CHUNK), 0).to(tl.int32), axis=0)
                found = tl.sum(mine.to(tl.int32), axis=0)
                group += found
                goes_on = (group < groups) & (found == ROWS)
            part = group * GROUP
        else:
            part = chunk + 1
        total, count = _add_parts(
            total, count, part, chunks, key, keys, carry_in, counts_in, N, cols, D, CHUNK, ROWS, REGULARIZER == DIFACTO
        )
        opening = tl.load(carry_out + chunk * D + cols, mask=inside, other=0.0)
        summed = (opening + tl.sum(total, axis=0))[None, :]
        row = tl.zeros((1,), tl.int64) + key
        live = row >= 0
        w, s0, s1, n = _fetch(weight, state0, state1, occurrences, row, cols, live, stride_w, D, OPTIMIZER, REGULARIZER)
        _finish(
            weight, state0, state1, row, cols, live, summed, count, w, s0, s1, n, stride_w,
            _scalar(lr, LR_POINTER), _scalar(grad_scale, SCALE_POINTER), reg_lambda, eps, beta1, beta2,
            _scalar(bias, BIAS_POINTER), _scalar(seed, SEED_POINTER),
            D, OPTIMIZER, REGULARIZER, COUPLED, ROUNDING,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def make_keys(ids, keys, N, num_rows, padding_idx, BLOCK: tl.constexpr):
    """Sort keys: the row, or ``num_rows`` for ids that take no part (padding, negative, out of range)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + i, mask=i < N, other=-1).to(tl.int64)
    used = (row >= 0) & (row < num_rows) & (row != padding_idx)
    tl.store(keys + i, tl.where(used, row, num_rows).to(keys.dtype.element_ty), mask=i < N)
