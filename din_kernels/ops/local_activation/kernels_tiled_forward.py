"""Tiled kernels, forward: scores and weighted sums per item, and Dice's statistics. Items of one list are added up, and
weights finished, by ``combine_items`` and ``normalise_weights`` (kernels_universal_forward.py)."""

import triton
import triton.language as tl

from .kernels_common import fresh_origin, slot_of
from .kernels_packed_common import LN_2, LOG2_E, activate, load_rows, reciprocal
from .kernels_tiled_common import (
    affine,
    gate,
    item_rows_of,
    live_rows,
    load_gate,
    load_item_layer,
    load_parameter,
    load_second_layer,
    store_gate,
)

# A tile's weighted sum is a product with a matrix that is 0 but for one row or column. This is how many it has: the least
# that the tensor cores take.
SUMS = tl.constexpr(16)


@triton.jit
def no_sum(D: tl.constexpr, TALL: tl.constexpr):
    """What ``add_weighted`` adds to. TALL: the product is [D, SUMS], else [SUMS, D]. Before sm_90 warps share the rows of
    the other products only if no product among them is wider than tall; else they share the columns, and repeat each
    other's activations in blocks of 16. On sm_90 the flat one takes fewer instructions."""
    if TALL:
        return tl.zeros([D, SUMS], tl.float32)
    else:
        return tl.zeros([SUMS, D], tl.float32)


@triton.jit
def spread(weight, dtype: tl.constexpr, TALL: tl.constexpr):
    """The weights [T] as operand of ``add_weighted``."""
    lane = tl.arange(0, SUMS)
    if TALL:
        return tl.where(lane[None, :] == 0, weight[:, None], 0.0).to(dtype)
    else:
        return tl.where(lane[:, None] == 0, weight[None, :], 0.0).to(dtype)


@triton.jit
def add_weighted(total, e, weights, TALL: tl.constexpr, PRECISION: tl.constexpr):
    """total += Σ_t weight[t] e[t]."""
    if TALL:
        return tl.dot(tl.trans(e), weights, total, input_precision=PRECISION)
    else:
        return tl.dot(weights, e, total, input_precision=PRECISION)


@triton.jit
def store_sum(total, d, shrink, target, D: tl.constexpr, TALL: tl.constexpr):
    """Columns ``d`` of an item's sum."""
    lane = tl.arange(0, SUMS)
    value = (total * shrink).to(target.dtype.element_ty)
    if TALL:
        tl.store(target + d[:, None] + lane[None, :] * 0, value, mask=(d < D)[:, None] & (lane == 0)[None, :])
    else:
        tl.store(target + d[None, :] + lane[:, None] * 0, value, mask=(d < D)[None, :] & (lane == 0)[:, None])


@triton.jit(do_not_specialize=["item_rows", "num_lists", "candidates", "weight_row", "weight_candidate", "weight_list"])
def forward_tiled(
    keys, query, offset, first, product, weight2, param,
    starts, ends, row_mask, chunk_offsets, chunk_list,
    pooled, log_normaliser, partial, partial_softmax, attention, gates,
    item_rows, key_stride, num_lists, candidates, scale, weight_row, weight_candidate, weight_list,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, T: tl.constexpr, VECTORS: tl.constexpr,
    ACT: tl.constexpr, OUTER: tl.constexpr, SOFTMAX: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_ATTENTION: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, CONTIGUOUS: tl.constexpr,
    HOIST1: tl.constexpr, HOIST2: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """One or two hidden layers (H2 = 0); each program takes every P-th item. Results go where
    ``kernels_universal_forward.forward_items`` puts them. HOIST1, HOIST2: the vectors that the activation of the first or
    second layer takes fit into registers for good; else each tile reads them anew from ``gates`` [P, 3 (H1 + H2)]."""
    dtype: tl.constexpr = keys.dtype.element_ty
    TWO: tl.constexpr = H2 > 0
    TOP_H: tl.constexpr = H2 if TWO else H1
    TOP_R: tl.constexpr = R2 if TWO else R1
    params2 = param + VECTORS * H1
    params_out = param + VECTORS * (H1 + H2)
    d_a, d_r = tl.arange(0, AD), AD + tl.arange(0, RD if RD > 0 else 16)
    n_a, n_r = tl.arange(0, A1), A1 + tl.arange(0, R1 if R1 > 0 else 16)
    m_a, m_r = tl.arange(0, A2 if TWO else 16), A2 + tl.arange(0, R2 if R2 > 0 else 16)
    top_a, top_r = n_a, n_r
    alpha1_a, slope1_a, shift1_a = load_gate(param, n_a, H1, ACT)
    if R1 > 0:
        alpha1_r, slope1_r, shift1_r = load_gate(param, n_r, H1, ACT)
    if TWO:
        top_a, top_r = m_a, m_r
        w2_aa, w2_ra, w2_ar, w2_rr, b2_a, b2_r = load_second_layer(weight2, params2, H1, A1, R1, H2, A2, R2, ACT, dtype)
        alpha2_a, slope2_a, shift2_a = load_gate(params2, m_a, H2, ACT)
        if R2 > 0:
            alpha2_r, slope2_r, shift2_r = load_gate(params2, m_r, H2, ACT)
    gates1 = gates + tl.program_id(0).to(tl.int64) * (3 * (H1 + H2))
    gates2 = gates1 + 3 * H1
    if not HOIST1:
        store_gate(gates1, alpha1_a, slope1_a, shift1_a, n_a, H1)
        if R1 > 0:
            store_gate(gates1, alpha1_r, slope1_r, shift1_r, n_r, H1)
    if TWO and (not HOIST2):
        store_gate(gates2, alpha2_a, slope2_a, shift2_a, m_a, H2)
        if R2 > 0:
            store_gate(gates2, alpha2_r, slope2_r, shift2_r, m_r, H2)
    if (not HOIST1) or (TWO and (not HOIST2)):
        tl.debug_barrier()
    out_a = load_parameter(params_out, top_a, 0, TOP_H)
    if TOP_R > 0:
        out_r = load_parameter(params_out, top_r, 0, TOP_H)
    out_bias = tl.load(params_out + TOP_H)

    lane = tl.arange(0, T)
    items = tl.load(chunk_offsets + num_lists) * candidates
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0).to(tl.int64)):
        s, candidate, chunk, number, chunks, begin, rows = item_rows_of(
            starts, ends, chunk_offsets, chunk_list, item, item_rows, candidates
        )
        q = s * candidates + candidate
        chunk_keys = keys + begin * (D if CONTIGUOUS else key_stride)
        chunk_mask = row_mask + begin
        at_weight = begin * weight_row + candidate * weight_candidate + s * weight_list
        a_aa, a_ra, a_ar, a_rr, c_a, c_r = load_item_layer(
            chunk_offsets, first, product, query, offset, q, D, AD, RD, H1, A1, R1, ACT, OUTER, dtype
        )
        total_a = no_sum(AD, TALL)
        if RD > 0:
            total_r = no_sum(RD, TALL)
        top = tl.full([], float("-inf"), tl.float32)
        denominators = tl.zeros([T], tl.float32)
        # ``again`` is 0, but no compiler can know: what a tile reads again is not to be kept in registers after all.
        zero = fresh_origin(chunk_offsets)
        for row0 in tl.range(zero, rows, T):
            row = row0 + lane
            again = tl.minimum(row0, 0)
            live = live_rows(row, rows, chunk_mask, HAS_MASK)
            e_a = load_rows(chunk_keys, row, d_a, live, key_stride, D, CONTIGUOUS)
            e_r = e_a
            if RD > 0:
                e_r = load_rows(chunk_keys, row, d_r, live, key_stride, D, CONTIGUOUS)
            z_a = affine(e_a, e_r, a_aa, a_ra, c_a, RD, PRECISION)
            if R1 > 0:
                z_r = affine(e_a, e_r, a_ar, a_rr, c_r, RD, PRECISION)
            alpha, slope, shift = gate(alpha1_a, slope1_a, shift1_a, gates1, again + n_a, H1, HOIST1)
            h_a = activate(z_a, alpha, slope, shift, ACT, FAST)
            h_r = h_a
            if R1 > 0:
                alpha, slope, shift = gate(alpha1_r, slope1_r, shift1_r, gates1, again + n_r, H1, HOIST1)
                h_r = activate(z_r, alpha, slope, shift, ACT, FAST)
            if TWO:
                low_a, low_r = h_a.to(dtype), h_r.to(dtype)
                y_a = affine(low_a, low_r, w2_aa, w2_ra, b2_a, R1, PRECISION)
                alpha, slope, shift = gate(alpha2_a, slope2_a, shift2_a, gates2, again + m_a, H2, HOIST2)
                h_a = activate(y_a, alpha, slope, shift, ACT, FAST)
                if R2 > 0:
                    y_r = affine(low_a, low_r, w2_ar, w2_rr, b2_r, R1, PRECISION)
                    alpha, slope, shift = gate(alpha2_r, slope2_r, shift2_r, gates2, again + m_r, H2, HOIST2)
                    h_r = activate(y_r, alpha, slope, shift, ACT, FAST)
            if not HOIST2:
                out_a = load_parameter(params_out, again + top_a, 0, TOP_H)
            score = tl.sum(h_a * out_a[None, :], axis=1) + out_bias
            if TOP_R > 0:
                if not HOIST2:
                    out_r = load_parameter(params_out, again + top_r, 0, TOP_H)
                score += tl.sum(h_r * out_r[None, :], axis=1)
            if SOFTMAX:
                score = score * scale
            if HAS_ATTENTION:
                tl.store(attention + at_weight + row * weight_row, score.to(attention.dtype.element_ty), mask=live)
            if SOFTMAX:
                score = tl.where(live, score * LOG2_E, float("-inf"))
                new_top = tl.maximum(top, tl.max(score, axis=0))
                # A tile may hold no real row at all: −inf − (−inf) would be NaN.
                level = tl.where(new_top == float("-inf"), 0.0, new_top)
                shrink = tl.exp2(top - level)
                weight = tl.exp2(score - level)
                denominators = denominators * shrink + weight
                total_a = total_a * shrink
                if RD > 0:
                    total_r = total_r * shrink
                top = new_top
            else:
                weight = tl.where(live, score, 0.0)
            weights = spread(weight, dtype, TALL)
            total_a = add_weighted(total_a, e_a, weights, TALL, PRECISION)
            if RD > 0:
                total_r = add_weighted(total_r, e_r, weights, TALL, PRECISION)
        denominator = tl.sum(denominators, axis=0)
        origin = fresh_origin(chunk_offsets)
        i_a, i_r = origin + d_a, origin + d_r
        if chunks == 1:
            shrink = 1.0
            if SOFTMAX:
                nothing = denominator == 0
                shrink = 1.0 / tl.where(nothing, 1.0, denominator)
                log_sum = (top + tl.log2(tl.where(nothing, 1.0, denominator))) * LN_2
                tl.store(log_normaliser + q, tl.where(nothing, float("-inf"), log_sum))
            store_sum(total_a, i_a, shrink, pooled + q * D, D, TALL)
            if RD > 0:
                store_sum(total_r, i_r, shrink, pooled + q * D, D, TALL)
        else:
            slot = slot_of(s, number, chunk, candidate, candidates, num_lists)
            store_sum(total_a, i_a, 1.0, partial + slot * D, D, TALL)
            if RD > 0:
                store_sum(total_r, i_r, 1.0, partial + slot * D, D, TALL)
            if SOFTMAX:
                tl.store(partial_softmax + 2 * slot, top * LN_2)
                tl.store(partial_softmax + 2 * slot + 1, denominator)


@triton.jit
def add_rows(mean, m2, z, live, share, cross, HAS_MASK: tl.constexpr):
    """(mean, Σ(z − mean)²) of each place with one row more where it is live; ``share`` = 1/n and ``cross`` = (n − 1)/n
    there, else 0. Rows that are not live have z = c, finite or the list's own NaN; only where a mask may leave
    nothing of the list does that not do."""
    delta = z - mean
    if HAS_MASK:
        delta = tl.where(live[:, None], delta, 0.0)
    return mean + delta * share[:, None], m2 + delta * (delta * cross[:, None])


@triton.jit
def store_moments(means, m2s, mean, m2, count, share, n, H: tl.constexpr):
    """Merge the places."""
    merged = tl.sum(mean * share[:, None], axis=0)
    delta = mean - merged[None, :]
    tl.store(means + n, merged, mask=n < H)
    tl.store(m2s + n, tl.sum(m2 + delta * (delta * count[:, None]), axis=0), mask=n < H)


@triton.jit(do_not_specialize=["item_rows", "num_lists", "candidates"])
def statistics_tiled(
    keys, query, offset, first, product, weight2, param,
    starts, ends, row_mask, chunk_offsets, chunk_list, counts, means, m2s, gates,
    item_rows, key_stride, num_lists, candidates,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, T: tl.constexpr, LAYER: tl.constexpr, VECTORS: tl.constexpr,
    ACT: tl.constexpr, OUTER: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    CONTIGUOUS: tl.constexpr, HOIST1: tl.constexpr,
):  # fmt: skip
    """Moments of z of hidden layer LAYER over each program's items: ``counts`` [P] int64, ``means`` and ``m2s`` [P, H].

    Each of the T places of a tile keeps the count, mean and Σ(z − mean)² of the rows it has seen (Welford), through all
    items of the program, so that no sum over the rows of a tile is needed before the end; there Chan's formula merges
    the places. Σz² − (Σz)²/n would cancel."""
    dtype: tl.constexpr = keys.dtype.element_ty
    TWO: tl.constexpr = LAYER == 1
    H: tl.constexpr = H2 if TWO else H1
    A: tl.constexpr = A2 if TWO else A1
    R: tl.constexpr = R2 if TWO else R1
    params2 = param + VECTORS * H1
    d_a, d_r = tl.arange(0, AD), AD + tl.arange(0, RD if RD > 0 else 16)
    n_a, n_r = tl.arange(0, A1), A1 + tl.arange(0, R1 if R1 > 0 else 16)
    gates += tl.program_id(0).to(tl.int64) * (3 * H1)
    if TWO:
        w2_aa, w2_ra, w2_ar, w2_rr, b2_a, b2_r = load_second_layer(weight2, params2, H1, A1, R1, H2, A2, R2, ACT, dtype)
        alpha1_a, slope1_a, shift1_a = load_gate(param, n_a, H1, ACT)
        if R1 > 0:
            alpha1_r, slope1_r, shift1_r = load_gate(param, n_r, H1, ACT)
        if not HOIST1:
            store_gate(gates, alpha1_a, slope1_a, shift1_a, n_a, H1)
            if R1 > 0:
                store_gate(gates, alpha1_r, slope1_r, shift1_r, n_r, H1)
            tl.debug_barrier()

    lane = tl.arange(0, T)
    count = tl.zeros([T], tl.float32)
    mean_a, m2_a = tl.zeros([T, A], tl.float32), tl.zeros([T, A], tl.float32)
    if R > 0:
        mean_r, m2_r = tl.zeros([T, R], tl.float32), tl.zeros([T, R], tl.float32)
    items = tl.load(chunk_offsets + num_lists) * candidates
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0).to(tl.int64)):
        s, candidate, _, _, _, begin, rows = item_rows_of(
            starts, ends, chunk_offsets, chunk_list, item, item_rows, candidates
        )
        q = s * candidates + candidate
        chunk_keys = keys + begin * (D if CONTIGUOUS else key_stride)
        chunk_mask = row_mask + begin
        a_aa, a_ra, a_ar, a_rr, c_a, c_r = load_item_layer(
            chunk_offsets, first, product, query, offset, q, D, AD, RD, H1, A1, R1, ACT, OUTER, dtype
        )
        zero = fresh_origin(chunk_offsets)
        for row0 in tl.range(zero, rows, T):
            row = row0 + lane
            again = tl.minimum(row0, 0)
            live = live_rows(row, rows, chunk_mask, HAS_MASK)
            e_a = load_rows(chunk_keys, row, d_a, live, key_stride, D, CONTIGUOUS)
            e_r = e_a
            if RD > 0:
                e_r = load_rows(chunk_keys, row, d_r, live, key_stride, D, CONTIGUOUS)
            z_a = affine(e_a, e_r, a_aa, a_ra, c_a, RD, PRECISION)
            z_r = z_a
            if R1 > 0:
                z_r = affine(e_a, e_r, a_ar, a_rr, c_r, RD, PRECISION)
            if TWO:
                alpha, slope, shift = gate(alpha1_a, slope1_a, shift1_a, gates, again + n_a, H1, HOIST1)
                low_a = activate(z_a, alpha, slope, shift, ACT, FAST).to(dtype)
                low_r = low_a
                if R1 > 0:
                    alpha, slope, shift = gate(alpha1_r, slope1_r, shift1_r, gates, again + n_r, H1, HOIST1)
                    low_r = activate(z_r, alpha, slope, shift, ACT, FAST).to(dtype)
                z_a = affine(low_a, low_r, w2_aa, w2_ra, b2_a, R1, PRECISION)
                if R2 > 0:
                    z_r = affine(low_a, low_r, w2_ar, w2_rr, b2_r, R1, PRECISION)
            total = count + live.to(tl.float32)
            share = live.to(tl.float32) * reciprocal(tl.maximum(total, 1.0), FAST)
            cross = count * share
            count = total
            mean_a, m2_a = add_rows(mean_a, m2_a, z_a, live, share, cross, HAS_MASK)
            if R > 0:
                mean_r, m2_r = add_rows(mean_r, m2_r, z_r, live, share, cross, HAS_MASK)
    seen = tl.sum(count.to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0), seen.to(tl.int64))
    means += tl.program_id(0).to(tl.int64) * H
    m2s += tl.program_id(0).to(tl.int64) * H
    share = count / tl.maximum(seen, 1)
    store_moments(means, m2s, mean_a, m2_a, count, share, tl.arange(0, A), H)
    if R > 0:
        store_moments(means, m2s, mean_r, m2_r, count, share, A + tl.arange(0, R), H)
