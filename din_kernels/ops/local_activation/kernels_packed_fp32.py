"""Packed kernel, forward, fp32: the tile of kernels_packed_forward.py with products on the tensor cores.

Tensor cores multiply tf32, 11 bits of the 24 that fp32 has. For results as accurate as fp32, each operand is split into
two parts of 11 bits, and a product is taken as three: high · high + high · low + low · high (``dot``). Parts are cut
off, not rounded, so that no finite number becomes infinite. An infinite one has no low part but NaN: where IEEE products
of infinity would saturate a sigmoid, these give NaN.

Split operands take four times the registers of 16-bit ones. So, unlike in the 16-bit kernel, what a query row adds to the
first layer (``offset``) is not computed for each behaviour but read; blocks of the embedding are half as wide and are done
with one after the other; vectors of the output layer are read when used; keys are read again, from the cache, for the sums.
"""

import triton
import triton.language as tl

from .kernels_packed_common import (
    LN_2,
    LOG2_E,
    SEGMENTS,
    TILE,
    activate,
    load_activation,
    load_first_layer,
    load_matrix,
    load_rows,
    load_vector,
    scale_of,
    tile_borders,
)
from .kernels_packed_forward import store_sums


@triton.jit
def split(x):
    """x as (high, low): high has the 11 bits of tf32, low is the rest, exactly."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def dot(a, b, z, PRECISION: tl.constexpr):
    """z + a b. PRECISION "split": to fp32's accuracy but for 2⁻¹⁹ of a product at worst; "tf32": operands cut off.

    Splitting a weight is loop-invariant, and the compiler takes it out of the loop over tiles."""
    if PRECISION == "split":
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        z = tl.dot(a_low, b_high, z, input_precision="tf32")
        z = tl.dot(a_high, b_low, z, input_precision="tf32")
        return tl.dot(a_high, b_high, z, input_precision="tf32")
    else:
        return tl.dot(a, b, z, input_precision="tf32")


@triton.jit
def sum_segments(of_segment, weight, e, PRECISION: tl.constexpr):
    """[SEGMENTS, n]: Σ weight · e by segment. The indicator is exact in tf32, so two products do."""
    ones = tl.where(of_segment, 1.0, 0.0)
    terms = weight[:, None] * e
    if PRECISION == "split":
        high, low = split(terms)
        sums = tl.dot(ones, low, input_precision="tf32")
        return tl.dot(ones, high, sums, input_precision="tf32")
    else:
        return tl.dot(ones, terms, input_precision="tf32")


@triton.jit
def load_offset(offset, q, n, live, H: tl.constexpr, ACT: tl.constexpr):
    """What the tile's query rows add to z1 [TILE, n], scaled as the weights are."""
    return load_rows(offset, q, n, live, H, H, True) * scale_of(ACT)


@triton.jit
def add_first_layer(
    z_a, z_r, keys, query, row, q, live, d, k_a, p_a, k_r, p_r, key_stride,
    D: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """(z_a, z_r) plus rows [e ; v∘e] of columns ``d`` of the embedding, times their weights. All that needs e comes before
    v∘e is made: each is split, and both would be too much to hold."""
    e = load_rows(keys, row, d, live, key_stride, D, CONTIGUOUS)
    z_a = dot(e, k_a, z_a, PRECISION)
    if R > 0:
        z_r = dot(e, k_r, z_r, PRECISION)
    ve = load_rows(query, q, d, live, D, D, True) * e
    z_a = dot(ve, p_a, z_a, PRECISION)
    if R > 0:
        z_r = dot(ve, p_r, z_r, PRECISION)
    return z_a, z_r


@triton.jit
def load_rows_again(keys, row, d, live, stride, D: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """``load_rows`` for the last time: the hint is true, and keeps the compiler from holding the first load instead."""
    wanted = live[:, None] & (d < D)[None, :]
    if CONTIGUOUS:
        at = row[:, None] * D + d[None, :]
    else:
        at = row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(keys + at, mask=wanted, other=0.0, eviction_policy="evict_first")


@triton.jit
def score_of(z, alpha, mean, rstd, weight_out, n, H: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr):
    """Σ φ(z) · w over the channels ``n`` of the top layer."""
    a, slope, shift = load_activation(alpha, mean, rstd, n, H, ACT)
    return tl.sum(activate(z, a, slope, shift, ACT, FAST) * load_vector(weight_out, n, H, True)[None, :], axis=1)


@triton.jit(do_not_specialize=["candidates", "queries", "weight_row", "weight_candidate", "weight_list"])
def forward_packed_fp32(
    keys, query, offset, weight1, alpha1, mean1, rstd1, weight2, bias2, alpha2, mean2, rstd2, weight_out, bias_out,
    first_slot, tile_first, slot_query, slot_row, pooled, log_normaliser, carry, carry_softmax, attention,
    key_stride, queries, candidates, scale, weight_row, weight_candidate, weight_list,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, ACT: tl.constexpr, BIASES: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_ATTENTION: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """As ``forward_packed``; ``offset`` [Q, H1]: (W_q + W_d) v + b1. With two layers the first has one block (R1 = 0) when
    PRECISION is "split": see ``packed.fits``."""
    OUT_BIAS: tl.constexpr = 4 if H2 > 0 else 2
    d_a = tl.arange(0, AD)
    d_r = AD + tl.arange(0, RD if RD > 0 else 16)
    n_a = tl.arange(0, A1)
    n_r = A1 + tl.arange(0, R1 if R1 > 0 else 16)
    k_aa, p_aa, _ = load_first_layer(weight1, d_a, n_a, D, H1, ACT, tl.float32)
    k_ar, p_ar, k_ra, p_ra, k_rr, p_rr = k_aa, p_aa, k_aa, p_aa, k_aa, p_aa
    if R1 > 0:
        k_ar, p_ar, _ = load_first_layer(weight1, d_a, n_r, D, H1, ACT, tl.float32)
    if RD > 0:
        k_ra, p_ra, _ = load_first_layer(weight1, d_r, n_a, D, H1, ACT, tl.float32)
        if R1 > 0:
            k_rr, p_rr, _ = load_first_layer(weight1, d_r, n_r, D, H1, ACT, tl.float32)
    if H2 > 0:
        m_a = tl.arange(0, A2)
        m_r = A2 + tl.arange(0, R2 if R2 > 0 else 16)
        w2_aa = load_matrix(weight2, n_a, m_a, H1, H1, H2) * scale_of(ACT)
        if R1 > 0:
            w2_ra = load_matrix(weight2, n_r, m_a, H1, H1, H2) * scale_of(ACT)
        if R2 > 0:
            w2_ar = load_matrix(weight2, n_a, m_r, H1, H1, H2) * scale_of(ACT)
            if R1 > 0:
                w2_rr = load_matrix(weight2, n_r, m_r, H1, H1, H2) * scale_of(ACT)
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
        z_a = load_offset(offset, q, n_a, live, H1, ACT)
        z_r = z_a
        if R1 > 0:
            z_r = load_offset(offset, q, n_r, live, H1, ACT)
        z_a, z_r = add_first_layer(z_a, z_r, keys, query, row, q, live, d_a, k_aa, p_aa, k_ar, p_ar, key_stride, D, R1,
                                   PRECISION, CONTIGUOUS)  # fmt: skip
        if RD > 0:
            z_a, z_r = add_first_layer(z_a, z_r, keys, query, row, q, live, d_r, k_ra, p_ra, k_rr, p_rr, key_stride, D,
                                       R1, PRECISION, CONTIGUOUS)  # fmt: skip
        if H2 > 0:
            c0, c1, c2 = load_activation(alpha1, mean1, rstd1, n_a, H1, ACT)
            h_a = activate(z_a, c0, c1, c2, ACT, FAST)
            b2_a = load_vector(bias2, m_a, H2, (BIASES & 2) > 0) * scale_of(ACT)
            y_a = dot(h_a, w2_aa, tl.broadcast_to(b2_a[None, :], [TILE, A2]), PRECISION)
            if R1 > 0:
                c0, c1, c2 = load_activation(alpha1, mean1, rstd1, n_r, H1, ACT)
                h_r = activate(z_r, c0, c1, c2, ACT, FAST)
                y_a = dot(h_r, w2_ra, y_a, PRECISION)
            score = score_of(y_a, alpha2, mean2, rstd2, weight_out, m_a, H2, ACT, FAST)
            if R2 > 0:
                b2_r = load_vector(bias2, m_r, H2, (BIASES & 2) > 0) * scale_of(ACT)
                y_r = dot(h_a, w2_ar, tl.broadcast_to(b2_r[None, :], [TILE, R2]), PRECISION)
                if R1 > 0:
                    y_r = dot(h_r, w2_rr, y_r, PRECISION)
                score += score_of(y_r, alpha2, mean2, rstd2, weight_out, m_r, H2, ACT, FAST)
        else:
            score = score_of(z_a, alpha1, mean1, rstd1, weight_out, n_a, H1, ACT, FAST)
            if R1 > 0:
                score += score_of(z_r, alpha1, mean1, rstd1, weight_out, n_r, H1, ACT, FAST)
        score += out_bias
        if SOFTMAX:
            score = score * scale
        if HAS_ATTENTION:
            s = q // candidates
            at = row.to(tl.int64) * weight_row + (q - s * candidates).to(tl.int64) * weight_candidate
            at += s.to(tl.int64) * weight_list
            tl.store(attention + at, score, mask=live)

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
            denominator = tl.sum(tl.where(of_segment, weight[None, :], 0.0), axis=1)

        begins, ends, continued = tile_borders(first_slot, tile_first, tile, first, queries)
        whole = (segment >= begins) & (segment < ends)
        part = ((segment == 0) & (begins > 0)) | ((segment == ends) & continued)
        at_carry = 2 * tile + tl.where(segment >= begins, 1, 0)
        e = load_rows_again(keys, row, d_a, live, key_stride, D, CONTIGUOUS)
        sums = sum_segments(of_segment, weight, e, PRECISION)
        store_sums(sums, d_a, first, segment, whole, part, at_carry, denominator, pooled, carry, D, SOFTMAX)
        if RD > 0:
            e = load_rows_again(keys, row, d_r, live, key_stride, D, CONTIGUOUS)
            sums = sum_segments(of_segment, weight, e, PRECISION)
            store_sums(sums, d_r, first, segment, whole, part, at_carry, denominator, pooled, carry, D, SOFTMAX)
        if SOFTMAX:
            tl.store(carry_softmax + 2 * at_carry, top, mask=part)
            tl.store(carry_softmax + 2 * at_carry + 1, denominator, mask=part)
            nothing = denominator == 0
            log_sum = (top + tl.log2(tl.where(nothing, 1.0, denominator))) * LN_2
            tl.store(log_normaliser + first + segment, tl.where(nothing, float("-inf"), log_sum), mask=whole)
