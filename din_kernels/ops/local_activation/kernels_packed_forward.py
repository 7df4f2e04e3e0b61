"""Packed kernels, forward: scores and sums over tiles, and the sums that cross tiles.

See kernels_packed_common.py for slots and tables. A list that lies within a tile is finished there. Of one that does
not, every tile it touches leaves a partial sum in ``carry`` [2 · tiles, D]: at 2·tile if it began in an earlier tile,
at 2·tile + 1 if it begins here; ``finish_packed`` adds them in the order of the tiles.
"""

import triton
import triton.language as tl

from .kernels_packed_common import (
    LN_2,
    LOG2_E,
    SEGMENTS,
    TILE,
    activate,
    begin_layer,
    bias_columns,
    keep_bias,
    load_activation,
    load_first_layer,
    load_matrix,
    load_rows,
    load_vector,
    product,
    scale_of,
    tile_borders,
)


@triton.jit
def add_first_layer(z, e, v, ve, k, p, q, PRECISION: tl.constexpr):
    """z1 [TILE, n] += rows [e ; v∘e ; v] of one block of the embedding, times their weights."""
    z = tl.dot(e, k, z, input_precision=PRECISION)
    z = tl.dot(v, q, z, input_precision=PRECISION)
    return tl.dot(ve, p, z, input_precision=PRECISION)


@triton.jit
def apply(z, kept_alpha, kept_slope, kept_shift, alpha, mean, rstd, n, H: tl.constexpr, ACT: tl.constexpr,
          FAST: tl.constexpr, HOIST: tl.constexpr):  # fmt: skip
    """φ(z) with the activation's vectors as kept, or loaded now."""
    if not HOIST:
        kept_alpha, kept_slope, kept_shift = load_activation(alpha, mean, rstd, n, H, ACT)
    return activate(z, kept_alpha, kept_slope, kept_shift, ACT, FAST)


@triton.jit
def store_sums(
    sums, d, first, segment, whole, part, at_carry, denominator, pooled, carry,
    D: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Columns ``d`` of the sums of a tile's segments: finished ones to ``pooled``, parts to the carry."""
    inside = (d < D)[None, :]
    tl.store(carry + at_carry[:, None] * D + d[None, :], sums, mask=part[:, None] & inside)
    if SOFTMAX:
        sums = sums / tl.where(denominator == 0, 1.0, denominator)[:, None]
    tl.store(pooled + (first + segment)[:, None] * D + d[None, :], sums.to(pooled.dtype.element_ty),
             mask=whole[:, None] & inside)  # fmt: skip


@triton.jit(do_not_specialize=["candidates", "queries", "weight_row", "weight_candidate", "weight_list"])
def forward_packed(
    keys, query, weight1, bias1, alpha1, mean1, rstd1, weight2, bias2, alpha2, mean2, rstd2, weight_out, bias_out,
    first_slot, tile_first, slot_query, slot_row, pooled, log_normaliser, carry, carry_softmax, attention,
    key_stride, queries, candidates, scale, weight_row, weight_candidate, weight_list,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, ACT: tl.constexpr, BIASES: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_ATTENTION: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    CONTIGUOUS: tl.constexpr, WGMMA: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """One or two hidden layers (H2 = 0), product interaction; each program takes every P-th tile.

    BIASES: bit l set where layer l has a bias. The weights are brought into shape once per program: keys meet
    W_k − W_d, queries W_q + W_d, both together W_p. Blocks of the first layer's weights are named by input (k, p, q),
    then by block of the embedding and of the hidden layer. HOIST: vectors of the activations fit into registers for good;
    else each tile loads them anew."""
    dtype: tl.constexpr = keys.dtype.element_ty
    OUT_BIAS: tl.constexpr = 4 if H2 > 0 else 2
    d_a = tl.arange(0, AD)
    d_r = AD + tl.arange(0, RD if RD > 0 else 16)
    n_a = tl.arange(0, A1)
    k_aa, p_aa, q_aa = load_first_layer(weight1, d_a, n_a, D, H1, ACT, dtype)
    k_ra, p_ra, q_ra = k_aa, p_aa, q_aa
    if RD > 0:
        k_ra, p_ra, q_ra = load_first_layer(weight1, d_r, n_a, D, H1, ACT, dtype)
    columns = bias_columns(dtype)
    b1_a = keep_bias(bias1, n_a, H1, (BIASES & 1) > 0, ACT, WGMMA, dtype)
    alpha1_a, slope1_a, shift1_a = load_activation(alpha1, mean1, rstd1, n_a, H1, ACT)
    if R1 > 0:
        n_r = A1 + tl.arange(0, R1)
        k_ar, p_ar, q_ar = load_first_layer(weight1, d_a, n_r, D, H1, ACT, dtype)
        k_rr, p_rr, q_rr = k_ar, p_ar, q_ar
        if RD > 0:
            k_rr, p_rr, q_rr = load_first_layer(weight1, d_r, n_r, D, H1, ACT, dtype)
        b1_r = keep_bias(bias1, n_r, H1, (BIASES & 1) > 0, ACT, WGMMA, dtype)
        alpha1_r, slope1_r, shift1_r = load_activation(alpha1, mean1, rstd1, n_r, H1, ACT)
    if H2 > 0:
        m_a = tl.arange(0, A2)
        w2_aa = (load_matrix(weight2, n_a, m_a, H1, H1, H2) * scale_of(ACT)).to(dtype)
        b2_a = keep_bias(bias2, m_a, H2, (BIASES & 2) > 0, ACT, WGMMA, dtype)
        alpha2_a, slope2_a, shift2_a = load_activation(alpha2, mean2, rstd2, m_a, H2, ACT)
        out_a = load_vector(weight_out, m_a, H2, True)
        if R1 > 0:
            w2_ra = (load_matrix(weight2, n_r, m_a, H1, H1, H2) * scale_of(ACT)).to(dtype)
        if R2 > 0:
            m_r = A2 + tl.arange(0, R2)
            w2_ar = (load_matrix(weight2, n_a, m_r, H1, H1, H2) * scale_of(ACT)).to(dtype)
            b2_r = keep_bias(bias2, m_r, H2, (BIASES & 2) > 0, ACT, WGMMA, dtype)
            alpha2_r, slope2_r, shift2_r = load_activation(alpha2, mean2, rstd2, m_r, H2, ACT)
            out_r = load_vector(weight_out, m_r, H2, True)
            if R1 > 0:
                w2_rr = (load_matrix(weight2, n_r, m_r, H1, H1, H2) * scale_of(ACT)).to(dtype)
    else:
        out_a = load_vector(weight_out, n_a, H1, True)
        if R1 > 0:
            out_r = load_vector(weight_out, n_r, H1, True)
    out_bias = tl.full([], 0.0, tl.float32)
    if BIASES & OUT_BIAS:
        out_bias = tl.load(bias_out).to(tl.float32)

    lane = tl.arange(0, TILE)
    segment = tl.arange(0, SEGMENTS)
    num_slots = tl.load(first_slot + queries)
    for tile in tl.range(tl.program_id(0), (num_slots + TILE - 1) // TILE, tl.num_programs(0)):
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        e_a = load_rows(keys, row, d_a, live, key_stride, D, CONTIGUOUS)
        v_a = load_rows(query, q, d_a, live, D, D, True)
        ve_a = product(v_a, e_a, FAST)
        z_a = begin_layer(columns, b1_a, n_a, (BIASES & 1) > 0, WGMMA, PRECISION)
        z_a = add_first_layer(z_a, e_a, v_a, ve_a, k_aa, p_aa, q_aa, PRECISION)
        if R1 > 0:
            z_r = begin_layer(columns, b1_r, n_r, (BIASES & 1) > 0, WGMMA, PRECISION)
            z_r = add_first_layer(z_r, e_a, v_a, ve_a, k_ar, p_ar, q_ar, PRECISION)
        if RD > 0:
            e_r = load_rows(keys, row, d_r, live, key_stride, D, CONTIGUOUS)
            v_r = load_rows(query, q, d_r, live, D, D, True)
            ve_r = product(v_r, e_r, FAST)
            z_a = add_first_layer(z_a, e_r, v_r, ve_r, k_ra, p_ra, q_ra, PRECISION)
            if R1 > 0:
                z_r = add_first_layer(z_r, e_r, v_r, ve_r, k_rr, p_rr, q_rr, PRECISION)
        h_a = apply(z_a, alpha1_a, slope1_a, shift1_a, alpha1, mean1, rstd1, n_a, H1, ACT, FAST, HOIST)
        if R1 > 0:
            h_r = apply(z_r, alpha1_r, slope1_r, shift1_r, alpha1, mean1, rstd1, n_r, H1, ACT, FAST, HOIST)
        if H2 > 0:
            y_a = begin_layer(columns, b2_a, m_a, (BIASES & 2) > 0, WGMMA, PRECISION)
            y_a = tl.dot(h_a.to(dtype), w2_aa, y_a, input_precision=PRECISION)
            if R1 > 0:
                y_a = tl.dot(h_r.to(dtype), w2_ra, y_a, input_precision=PRECISION)
            score = tl.sum(
                apply(y_a, alpha2_a, slope2_a, shift2_a, alpha2, mean2, rstd2, m_a, H2, ACT, FAST, HOIST)
                * out_a[None, :],
                axis=1,
            )
            if R2 > 0:
                y_r = begin_layer(columns, b2_r, m_r, (BIASES & 2) > 0, WGMMA, PRECISION)
                y_r = tl.dot(h_a.to(dtype), w2_ar, y_r, input_precision=PRECISION)
                if R1 > 0:
                    y_r = tl.dot(h_r.to(dtype), w2_rr, y_r, input_precision=PRECISION)
                score += tl.sum(
                    apply(y_r, alpha2_r, slope2_r, shift2_r, alpha2, mean2, rstd2, m_r, H2, ACT, FAST, HOIST)
                    * out_r[None, :],
                    axis=1,
                )
        else:
            score = tl.sum(h_a * out_a[None, :], axis=1)
            if R1 > 0:
                score += tl.sum(h_r * out_r[None, :], axis=1)
        score += out_bias
        if SOFTMAX:
            score = score * scale
        if HAS_ATTENTION:
            s = q // candidates
            at = row.to(tl.int64) * weight_row + (q - s * candidates).to(tl.int64) * weight_candidate
            at += s.to(tl.int64) * weight_list
            tl.store(attention + at, score.to(attention.dtype.element_ty), mask=live)

        first = tl.load(tile_first + tile)
        of_segment = segment[:, None] == (q - first)[None, :]  # [SEGMENTS, TILE]
        top = tl.full([SEGMENTS], 0.0, tl.float32)
        denominator = tl.full([SEGMENTS], 1.0, tl.float32)
        weight = score
        if SOFTMAX:
            score = score * LOG2_E
            top = tl.max(tl.where(of_segment, score[None, :], float("-inf")), axis=1)
            own_top = tl.max(tl.where(of_segment, top[:, None], float("-inf")), axis=0)
            weight = tl.exp2(score - tl.where(live, own_top, 0.0))
        parts = tl.where(of_segment, weight[None, :], 0.0)
        if SOFTMAX:
            denominator = tl.sum(parts, axis=1)

        begins, ends, continued = tile_borders(first_slot, tile_first, tile, first, queries)
        whole = (segment >= begins) & (segment < ends)
        part = ((segment == 0) & (begins > 0)) | ((segment == ends) & continued)
        at_carry = 2 * tile + tl.where(segment >= begins, 1, 0)
        sums = tl.dot(parts.to(dtype), e_a, input_precision=PRECISION)  # [SEGMENTS, D]
        store_sums(sums, d_a, first, segment, whole, part, at_carry, denominator, pooled, carry, D, SOFTMAX)
        if RD > 0:
            sums = tl.dot(parts.to(dtype), e_r, input_precision=PRECISION)
            store_sums(sums, d_r, first, segment, whole, part, at_carry, denominator, pooled, carry, D, SOFTMAX)
        if SOFTMAX:
            tl.store(carry_softmax + 2 * at_carry, top, mask=part)
            tl.store(carry_softmax + 2 * at_carry + 1, denominator, mask=part)
            nothing = denominator == 0
            log_sum = (top + tl.log2(tl.where(nothing, 1.0, denominator))) * LN_2
            tl.store(log_normaliser + first + segment, tl.where(nothing, float("-inf"), log_sum), mask=whole)


@triton.jit
def _merge(top, denominator, total, its_top, its_denominator, its_total, SOFTMAX: tl.constexpr):
    """Two partial results of the same lists, [LISTS] and [LISTS, BLOCK_D], into one."""
    if SOFTMAX:
        new_top = tl.maximum(top, its_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, its_shrink = tl.exp2(top - shift), tl.exp2(its_top - shift)
        denominator = denominator * shrink + its_denominator * its_shrink
        return new_top, denominator, total * shrink[:, None] + its_total * its_shrink[:, None]
    return top, denominator, total + its_total


@triton.jit
def _load_carry(carry, carry_softmax, at, wanted, d, D: tl.constexpr, SOFTMAX: tl.constexpr):
    """(maximum, denominator, sum) at rows ``at`` of the carry; neutral where not ``wanted``."""
    total = tl.load(
        carry + at.to(tl.int64)[:, None] * D + d[None, :], mask=wanted[:, None] & (d < D)[None, :], other=0.0
    )
    top = tl.full([at.shape[0]], float("-inf"), tl.float32)
    denominator = tl.zeros([at.shape[0]], tl.float32)
    if SOFTMAX:
        top = tl.load(carry_softmax + 2 * at, mask=wanted, other=float("-inf"))
        denominator = tl.load(carry_softmax + 2 * at + 1, mask=wanted, other=0.0)
    return top, denominator, total


@triton.jit(do_not_specialize=["queries"])
def finish_packed(
    carry, carry_softmax, first_slot, pooled, log_normaliser, queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LISTS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Add up what lists left in several tiles. LISTS query rows a program: those of few tiles side by side, those of
    many one after another, LISTS of their tiles at a time."""
    FEW: tl.constexpr = 4
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, LISTS)
    q = tl.program_id(0) * LISTS + lane
    inside = q < queries
    begin = tl.load(first_slot + q, mask=inside, other=0)
    end = tl.load(first_slot + q + 1, mask=inside, other=0)
    tile = begin // TILE
    more = tl.where(inside, (end - 1) // TILE - tile, 0)  # tiles after the first
    crosses = more > 0
    top, denominator, total = _load_carry(carry, carry_softmax, 2 * tile + 1, crosses, d, D, SOFTMAX)
    most = tl.max(more, axis=0)
    for i in range(1, tl.minimum(most, FEW) + 1):
        found = _load_carry(carry, carry_softmax, 2 * (tile + i), i <= more, d, D, SOFTMAX)
        top, denominator, total = _merge(top, denominator, total, found[0], found[1], found[2], SOFTMAX)
    if most > FEW:
        for j in range(0, LISTS):
            mine = lane == j
            its_tile = tl.sum(tl.where(mine, tile, 0), axis=0)
            its_more = tl.sum(tl.where(mine, more, 0), axis=0)
            if its_more > FEW:
                tops, denominators, totals = _load_carry(
                    carry, carry_softmax, 2 * (its_tile + 1 + FEW + lane), 1 + FEW + lane <= its_more, d, D, SOFTMAX
                )
                for i0 in range(1 + FEW + LISTS, its_more + 1, LISTS):
                    at = i0 + lane
                    found = _load_carry(carry, carry_softmax, 2 * (its_tile + at), at <= its_more, d, D, SOFTMAX)
                    tops, denominators, totals = _merge(
                        tops, denominators, totals, found[0], found[1], found[2], SOFTMAX
                    )
                its_top = tl.max(tops, axis=0)
                if SOFTMAX:
                    shrink = tl.exp2(tops - tl.where(its_top == float("-inf"), 0.0, its_top))
                    denominators = denominators * shrink
                    totals = totals * shrink[:, None]
                top, denominator, total = _merge(
                    top, denominator, total, tl.where(mine, its_top, float("-inf")),
                    tl.where(mine, tl.sum(denominators, axis=0), 0.0),
                    tl.where(mine[:, None], tl.sum(totals, axis=0)[None, :], 0.0), SOFTMAX,
                )  # fmt: skip
    if SOFTMAX:
        nothing = denominator == 0
        log_sum = (top + tl.log2(tl.where(nothing, 1.0, denominator))) * LN_2
        tl.store(log_normaliser + q, tl.where(nothing, float("-inf"), log_sum), mask=crosses)
        total = total / tl.where(nothing, 1.0, denominator)[:, None]
    tl.store(pooled + q.to(tl.int64)[:, None] * D + d[None, :], total.to(pooled.dtype.element_ty),
             mask=crosses[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["candidates", "queries", "weight_row", "weight_candidate", "weight_list"])
def normalise_packed(
    scores, log_normaliser, weights, first_slot, tile_first, slot_query, slot_row,
    queries, candidates, weight_row, weight_candidate, weight_list,
):  # fmt: skip
    """weights = exp(scale · s − log_normaliser), from the ``scores`` that ``forward_packed`` left; a tile a program."""
    lane = tl.arange(0, TILE)
    num_slots = tl.load(first_slot + queries)
    for tile in range(tl.program_id(0), (num_slots + TILE - 1) // TILE, tl.num_programs(0)):
        q = tl.load(slot_query + tile * TILE + lane)
        row = tl.load(slot_row + tile * TILE + lane)
        live = q >= 0
        s = q // candidates
        at = row.to(tl.int64) * weight_row + (q - s * candidates).to(tl.int64) * weight_candidate
        at += s.to(tl.int64) * weight_list
        score = tl.load(scores + at, mask=live, other=0.0)
        weight = tl.exp(score - tl.load(log_normaliser + q, mask=live, other=0.0))
        tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=live)
