"""Universal kernels, forward: scores and weighted sums per item, the sum over a list's items, weights, Dice's
statistics."""

import triton
import triton.language as tl

from .kernels_common import activate, chunk_rows, fresh_origin, layer, layers_below, load_rows, slot_of


@triton.jit
def log_of_sum(top, denominator):
    """log Σ exp from the maximum and Σ exp(· − maximum); −inf where nothing was summed."""
    nothing = denominator == 0
    return tl.where(nothing, float("-inf"), top + tl.log(tl.where(nothing, 1.0, denominator)))


@triton.jit(do_not_specialize=["item_rows", "num_lists", "candidates", "weight_row", "weight_candidate", "weight_list"])
def forward_items(
    keys, query, offset, first, product, weight2, weight3, param,
    starts, ends, row_mask, chunk_offsets, chunk_list,
    pooled, log_normaliser, partial, partial_softmax, attention, scratch,
    item_rows, key_stride, num_lists, candidates, scale, weight_row, weight_candidate, weight_list,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr,
    BD: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr,
    DEPTH: tl.constexpr, VECTORS: tl.constexpr, ACT: tl.constexpr, OUTER: tl.constexpr, SOFTMAX: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ATTENTION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program takes every P-th item. An item that is its whole list writes ``pooled`` (and ``log_normaliser``);
    others leave (Σ, and for softmax its maximum and denominator) in their slot of ``partial`` for ``combine_items``.
    ``attention`` receives the weights, or scale · s with softmax (``normalise_weights`` finishes them)."""
    PAD1: tl.constexpr = (H1 + B1 - 1) // B1 * B1
    PAD2: tl.constexpr = (H2 + B2 - 1) // B2 * B2
    TOP_H: tl.constexpr = H1 if DEPTH == 1 else (H2 if DEPTH == 2 else H3)
    TOP_B: tl.constexpr = B1 if DEPTH == 1 else (B2 if DEPTH == 2 else B3)
    TOP_PARAMS: tl.constexpr = VECTORS * (0 if DEPTH == 1 else (H1 if DEPTH == 2 else H1 + H2))
    OUT: tl.constexpr = VECTORS * (H1 + H2 + H3)
    SCRATCH: tl.constexpr = T * ((PAD1 if DEPTH > 1 else 0) + (PAD2 if DEPTH > 2 else 0))

    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    hidden = scratch + pid * SCRATCH
    items = tl.load(chunk_offsets + num_lists) * candidates
    t = tl.arange(0, T)
    columns = tl.arange(0, BLOCK_D)
    for item in range(pid, items, programs):
        chunk = item // candidates
        candidate = item - chunk * candidates
        s, number, chunks, begin, end = chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows)
        q = s * candidates + candidate
        query_q = query + q * D
        offset_q = offset + q * H1
        first_q = first
        if OUTER:
            first_q = first + q * (H1 * D)
        total = tl.zeros([BLOCK_D], tl.float32)
        top = tl.full([], float("-inf"), tl.float32)
        denominator = tl.zeros([], tl.float32)
        for row0 in range(begin, end, T):
            rows = row0 + t.to(tl.int64)  # row · stride may need more than 31 bits
            live = rows < end
            if HAS_MASK:
                live = live & (tl.load(row_mask + rows, mask=live, other=0) != 0)
            layers_below(DEPTH - 1, keys, rows, live, key_stride, query_q, offset_q, first_q, product, weight2, weight3,
                         param, hidden, hidden, chunk_offsets, D, H1, H2, H3, BD, B1, B2, VECTORS, ACT, OUTER,
                         PRECISION, False)  # fmt: skip
            origin = fresh_origin(chunk_offsets)
            score = tl.zeros([T], tl.float32) + tl.load(param + OUT + TOP_H)
            for n0 in range(0, TOP_H, TOP_B):
                n = n0 + origin + tl.arange(0, TOP_B)
                z = layer(DEPTH - 1, keys, rows, live, key_stride, query_q, offset_q, first_q, product, weight2,
                          weight3, param, hidden, n, origin, D, H1, H2, H3, BD, B1, B2, VECTORS, OUTER,
                          PRECISION)  # fmt: skip
                w = tl.load(param + OUT + n, mask=n < TOP_H, other=0.0)
                score += tl.sum(activate(z, param + TOP_PARAMS, n, TOP_H, ACT) * w[None, :], axis=1)
            if SOFTMAX:
                score = score * scale
            if HAS_ATTENTION:
                at = rows * weight_row + (candidate * weight_candidate + s * weight_list)
                tl.store(attention + at, score.to(attention.dtype.element_ty), mask=live)
            if SOFTMAX:
                score = tl.where(live, score, float("-inf"))
                new_top = tl.maximum(top, tl.max(score, axis=0))
                # A tile may hold no real row at all: −inf − (−inf) would be NaN.
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                shrink = tl.exp(top - shift)
                weight = tl.exp(score - shift)
                denominator = denominator * shrink + tl.sum(weight, axis=0)
                total = total * shrink
                top = new_top
            else:
                weight = tl.where(live, score, 0.0)
            e = load_rows(keys, rows, live, columns, key_stride, D).to(tl.float32)
            total += tl.sum(weight[:, None] * e, axis=0)
            if DEPTH > 1:
                tl.debug_barrier()  # the next tile overwrites the scratch that this one has just read
        if chunks == 1:
            if SOFTMAX:
                total = total / tl.where(denominator == 0, 1.0, denominator)
                tl.store(log_normaliser + q, log_of_sum(top, denominator))
            tl.store(pooled + q * D + columns, total.to(pooled.dtype.element_ty), mask=columns < D)
        else:
            slot = slot_of(s, number, chunk, candidate, candidates, num_lists)
            tl.store(partial + slot * D + columns, total, mask=columns < D)
            if SOFTMAX:
                tl.store(partial_softmax + 2 * slot, top)
                tl.store(partial_softmax + 2 * slot + 1, denominator)


@triton.jit(do_not_specialize=["num_lists", "candidates"])
def combine_items(
    partial, partial_softmax, chunk_offsets, pooled, log_normaliser, num_lists, candidates,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Add up the slots of query rows whose list has more than one chunk, in the order of the chunks."""
    num_queries = tl.cast(num_lists, tl.int64) * candidates
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for q in range(tl.program_id(0).to(tl.int64), num_queries, tl.num_programs(0).to(tl.int64)):
        s = q // candidates
        before = tl.load(chunk_offsets + s)
        chunks = tl.load(chunk_offsets + s + 1) - before
        if chunks > 1:
            top = tl.full([BLOCK_K], float("-inf"), tl.float32)
            if SOFTMAX:
                for k0 in range(0, chunks, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    slot = slot_of(s, k, before + k, q - s * candidates, candidates, num_lists)
                    top = tl.maximum(top, tl.load(partial_softmax + 2 * slot, mask=k < chunks, other=float("-inf")))
            highest = tl.max(top, axis=0)
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
            denominators = tl.zeros([BLOCK_K], tl.float32)
            for k0 in range(0, chunks, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                slot = slot_of(s, k, before + k, q - s * candidates, candidates, num_lists)
                inside = (k < chunks)[:, None] & (columns < D)[None, :]
                part = tl.load(partial + slot[:, None] * D + columns[None, :], mask=inside, other=0.0)
                if SOFTMAX:
                    its_top = tl.load(partial_softmax + 2 * slot, mask=k < chunks, other=float("-inf"))
                    shrink = tl.exp(its_top - shift)
                    denominators += shrink * tl.load(partial_softmax + 2 * slot + 1, mask=k < chunks, other=0.0)
                    part = part * shrink[:, None]
                total += part
            result = tl.sum(total, axis=0)
            if SOFTMAX:
                denominator = tl.sum(denominators, axis=0)
                result = result / tl.where(denominator == 0, 1.0, denominator)
                if tl.program_id(1) == 0:
                    tl.store(log_normaliser + q, log_of_sum(highest, denominator))
            tl.store(pooled + q * D + columns, result.to(pooled.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["item_rows", "num_lists", "candidates", "weight_row", "weight_candidate", "weight_list"])
def normalise_weights(
    scores, log_normaliser, weights, starts, ends, row_mask, chunk_offsets, chunk_list,
    item_rows, num_lists, candidates, weight_row, weight_candidate, weight_list,
    T: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """weights = exp(scale · s − log_normaliser) at real rows, from the ``scores`` that ``forward_items`` left."""
    items = tl.load(chunk_offsets + num_lists) * candidates
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0).to(tl.int64)):
        chunk = item // candidates
        candidate = item - chunk * candidates
        s, _, _, begin, end = chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows)
        normaliser = tl.load(log_normaliser + s * candidates + candidate)
        for row0 in range(begin, end, T):
            rows = row0 + tl.arange(0, T).to(tl.int64)
            live = rows < end
            if HAS_MASK:
                live = live & (tl.load(row_mask + rows, mask=live, other=0) != 0)
            at = rows * weight_row + (candidate * weight_candidate + s * weight_list)
            score = tl.load(scores + at, mask=live, other=0.0)
            tl.store(weights + at, tl.exp(score - normaliser).to(weights.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["item_rows", "num_lists", "candidates"])
def statistics_items(
    keys, query, offset, first, product, weight2, weight3, param,
    starts, ends, row_mask, chunk_offsets, chunk_list,
    counts, means, m2s, scratch,
    item_rows, key_stride, num_lists, candidates,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr,
    BD: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, T: tl.constexpr,
    LAYER: tl.constexpr, VECTORS: tl.constexpr, ACT: tl.constexpr, OUTER: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Moments of z of hidden layer LAYER over each program's items: ``counts`` [P] int64, ``means`` and ``m2s`` [P, H].

    A tile's mean is taken before its squared deviations, and tiles are merged by Chan's formula, because Σz² −
    (Σz)²/n cancels. The running moments of a program rest in its own row of the result."""
    PAD1: tl.constexpr = (H1 + B1 - 1) // B1 * B1
    PAD2: tl.constexpr = (H2 + B2 - 1) // B2 * B2
    H: tl.constexpr = H1 if LAYER == 0 else (H2 if LAYER == 1 else H3)
    B: tl.constexpr = B1 if LAYER == 0 else (B2 if LAYER == 1 else B3)
    SCRATCH: tl.constexpr = T * ((PAD1 if LAYER > 0 else 0) + (PAD2 if LAYER > 1 else 0))

    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    hidden = scratch + pid * SCRATCH
    items = tl.load(chunk_offsets + num_lists) * candidates
    t = tl.arange(0, T)
    for n0 in range(0, H, B):
        n = n0 + tl.arange(0, B)
        tl.store(means + pid * H + n, tl.zeros([B], tl.float32), mask=n < H)
        tl.store(m2s + pid * H + n, tl.zeros([B], tl.float32), mask=n < H)
    tl.debug_barrier()
    count = tl.zeros([], tl.int64)
    for item in range(pid, items, programs):
        chunk = item // candidates
        s, _, _, begin, end = chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows)
        q = s * candidates + (item - chunk * candidates)
        query_q = query + q * D
        offset_q = offset + q * H1
        first_q = first
        if OUTER:
            first_q = first + q * (H1 * D)
        for row0 in range(begin, end, T):
            rows = row0 + t.to(tl.int64)  # row · stride may need more than 31 bits
            live = rows < end
            if HAS_MASK:
                live = live & (tl.load(row_mask + rows, mask=live, other=0) != 0)
            here = tl.sum(live.to(tl.int32), axis=0)
            total = count + here
            # Shares of this tile in the merged moments; all are 0 while nothing has been counted.
            size = tl.maximum(here, 1).to(tl.float32)
            share = here.to(tl.float32) / tl.maximum(total, 1).to(tl.float32)
            cross = count.to(tl.float32) * share
            layers_below(LAYER, keys, rows, live, key_stride, query_q, offset_q, first_q, product, weight2, weight3,
                         param, hidden, hidden, chunk_offsets, D, H1, H2, H3, BD, B1, B2, VECTORS, ACT, OUTER,
                         PRECISION, False)  # fmt: skip
            origin = fresh_origin(chunk_offsets)
            for n0 in range(0, H, B):
                n = n0 + origin + tl.arange(0, B)
                z = layer(LAYER, keys, rows, live, key_stride, query_q, offset_q, first_q, product, weight2, weight3,
                          param, hidden, n, origin, D, H1, H2, H3, BD, B1, B2, VECTORS, OUTER, PRECISION)  # fmt: skip
                mean = tl.sum(tl.where(live[:, None], z, 0.0), axis=0) / size
                deviation = tl.where(live[:, None], z - mean[None, :], 0.0)
                m2 = tl.sum(deviation * deviation, axis=0)
                at = pid * H + n
                before = tl.load(means + at, mask=n < H, other=0.0)
                m2 += tl.load(m2s + at, mask=n < H, other=0.0)
                delta = mean - before
                # So short a vector is held, and so read, by several warps: all must have read before one of them writes.
                tl.debug_barrier()
                tl.store(means + at, before + delta * share, mask=n < H)
                tl.store(m2s + at, m2 + delta * delta * cross, mask=n < H)
            count = total
            tl.debug_barrier()
    tl.store(counts + pid, count)
