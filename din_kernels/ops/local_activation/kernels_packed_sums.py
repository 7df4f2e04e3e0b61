"""Packed kernels: what the backward pass needs of all rows first.

* ``backward_sums``: Σ dx̂ and Σ dx̂ · x̂ of a layer with Dice in training (x̂ = (z − mean) · rstd), of the top one first, as
  with two layers what comes down to the first depends on the top's. The top one's pass may leave ds of each slot, the
  gradient of its score, to those that follow.
* ``weighted_gradients_packed``: Σ a · ∂L/∂a of each list, where softmax weights have a gradient.

They walk the tiles of slots as ``backward_scores`` does and leave a row per program, or one per list: sums are taken in an
order that lengths alone decide."""

import triton
import triton.language as tl

from .kernels_common import DICE
from .kernels_packed_backward import through_activation
from .kernels_packed_common import (
    LN_2,
    LOG2_E,
    SEGMENTS,
    TILE,
    bias_columns,
    fold,
    keep_bias,
    load_activation,
    load_rows,
    load_vector,
    reciprocal,
    tile_borders,
)
from .kernels_packed_dice import (
    begin,
    first_layer,
    hidden,
    load_channels,
    load_inputs,
    load_second_layer,
    second_layer,
)


@triton.jit
def nothing(tile, LATE: tl.constexpr):
    """0; with LATE the compiler knows only that ``tile`` may change it: vectors at an address that it is added to are loaded
    where they are used. Loaded before the loop, as those that nothing in it writes, they take the registers of a tile and
    more."""
    if LATE:
        return tl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [tile], tl.int32, is_pure=False, pack=1)
    return 0


@triton.jit
def add_terms(total, total_turned, dh, z, mean, rstd, n, H: tl.constexpr, FAST: tl.constexpr):
    """Terms dx̂ / (1 − α) and −dx̂ · x̂ · log₂e / (1 − α) of a tile: dx̂ = dh · z (1 − α) p (1 − p)."""
    _, slope, shift = load_activation(mean, mean, rstd, n, H, DICE)
    turn = z * slope[None, :] + shift[None, :]
    p = reciprocal(1.0 + tl.exp2(turn), FAST)
    term = dh * z * (p - p * p)
    return total + fold(term, 8), total_turned + fold(term * turn, 8)


@triton.jit
def store_terms(target, total, total_turned, factor, alpha, n, H: tl.constexpr):
    """Σ dx̂ and Σ dx̂ · x̂ of channels ``n`` into a row [2, H]."""
    factor = factor * (1.0 - load_vector(alpha, n, H, True))
    tl.store(target + n, tl.sum(total, axis=0) * factor, mask=n < H)
    tl.store(target + H + n, tl.sum(total_turned, axis=0) * (factor * -LN_2), mask=n < H)


@triton.jit(do_not_specialize=["queries"])
def backward_sums(
    keys, query, weight1, bias1, alpha1, mean1, rstd1, weight2, bias2, alpha2, mean2, rstd2, weight_out, bias_out,
    first_slot, tile_first, slot_query, slot_row, grad_pooled, grad_weights, log_normaliser, delta, sums2, score_gradients,
    partial,
    key_stride, queries, scale,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, BIASES: tl.constexpr, LAYER: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr, HANDS_ON: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, CONTIGUOUS: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """Σ dx̂ and Σ dx̂ · x̂ of hidden layer LAYER over each program's tiles: ``partial`` [P, 2 · H]. ``sums2``: those of the
    second layer, divided by the count, which the first needs. HANDS_ON: ``score_gradients`` get ds of every
    slot with the top layer, and have it with the one below. WGMMA: see ``begin_layer``."""
    dtype: tl.constexpr = keys.dtype.element_ty
    TWO: tl.constexpr = H2 > 0
    TOP: tl.constexpr = LAYER == (1 if TWO else 0)
    H: tl.constexpr = H2 if LAYER == 1 else H1
    A: tl.constexpr = A2 if LAYER == 1 else A1
    R: tl.constexpr = R2 if LAYER == 1 else R1
    H_OUT: tl.constexpr = H2 if TWO else H1
    R_OUT: tl.constexpr = R2 if TWO else R1
    OUT_BIAS: tl.constexpr = 4 if TWO else 2
    # Wide layers leave no registers to keep a dozen vectors in.
    CROWDED: tl.constexpr = (RD > 0) or (SOFTMAX and not WGMMA)
    LATE: tl.constexpr = FAST and (A1 + R1 + A2 + R2 > (48 if CROWDED else 64))
    d_a, d_r = tl.arange(0, AD), AD + tl.arange(0, RD if RD > 0 else 16)
    n_a, n_r = tl.arange(0, A1), A1 + tl.arange(0, R1 if R1 > 0 else 16)
    k_aa, p_aa, q_aa, k_ra, p_ra, q_ra = load_channels(weight1, d_a, d_r, n_a, D, RD, H1, dtype)
    if R1 > 0:
        k_ar, p_ar, q_ar, k_rr, p_rr, q_rr = load_channels(weight1, d_a, d_r, n_r, D, RD, H1, dtype)
    top_a, top_r = n_a, n_r
    if TWO:
        top_a, top_r = tl.arange(0, A2), A2 + tl.arange(0, R2 if R2 > 0 else 16)
        w2_aa, w2_ra, w2_ar, w2_rr = load_second_layer(weight2, n_a, n_r, top_a, top_r, H1, R1, H2, R2, dtype)
    columns = bias_columns(dtype)
    b1_a = keep_bias(bias1, n_a, H1, (BIASES & 1) > 0, DICE, WGMMA, dtype)
    b1_r = keep_bias(bias1, n_r, H1, (BIASES & 1) > 0, DICE, WGMMA, dtype)
    if TWO:
        b2_a = keep_bias(bias2, top_a, H2, (BIASES & 2) > 0, DICE, WGMMA, dtype)
        b2_r = keep_bias(bias2, top_r, H2, (BIASES & 2) > 0, DICE, WGMMA, dtype)
    out_bias = tl.full([], 0.0, tl.float32)
    if SOFTMAX and (BIASES & OUT_BIAS):
        out_bias = tl.load(bias_out).to(tl.float32)

    lane = tl.arange(0, TILE)
    segment = tl.arange(0, SEGMENTS)
    # Summed over rows only at the end.
    total_a, turned_a = tl.zeros([TILE // 2, A], tl.float32), tl.zeros([TILE // 2, A], tl.float32)
    if R > 0:
        total_r, turned_r = tl.zeros([TILE // 2, R], tl.float32), tl.zeros([TILE // 2, R], tl.float32)
    end_tile = (tl.load(first_slot + queries) + TILE - 1) // TILE
    for tile in tl.range(tl.program_id(0), end_tile, tl.num_programs(0)):
        off = nothing(tile, LATE)
        a1, m1, r1 = alpha1 + off, mean1 + off, rstd1 + off
        a2, m2, r2 = alpha2 + off, mean2 + off, rstd2 + off
        out, of_top = weight_out + off, sums2 + off
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        if TOP:
            # ∂L/∂a = g · e, with g of the tile's few lists rather than of each row.
            first = tl.load(tile_first + tile)
            its_q = first + segment
        e_a, v_a, ve_a = load_inputs(keys, query, row, q, d_a, live, key_stride, D, FAST, CONTIGUOUS)
        if TOP:
            g_a = load_rows(grad_pooled, its_q, d_a, its_q < queries, D, D, True)
            crossed = tl.dot(e_a, tl.trans(g_a), input_precision=PRECISION)  # [TILE, SEGMENTS]
        e_r, v_r, ve_r = e_a, v_a, ve_a
        if RD > 0:
            e_r, v_r, ve_r = load_inputs(keys, query, row, q, d_r, live, key_stride, D, FAST, CONTIGUOUS)
            if TOP:
                g_r = load_rows(grad_pooled, its_q, d_r, its_q < queries, D, D, True)
                crossed = tl.dot(e_r, tl.trans(g_r), crossed, input_precision=PRECISION)
        if TOP:
            ds = tl.sum(tl.where((q - first)[:, None] == segment[None, :], crossed, 0.0), axis=1)
            if HAS_GRAD_WEIGHTS:
                ds += tl.load(grad_weights + row, mask=live, other=0.0).to(tl.float32)
        else:
            ds = tl.load(score_gradients + slot)

        # Forward again.
        z_a = begin(columns, b1_a, bias1, n_a, H1, (BIASES & 1) > 0, WGMMA, PRECISION)
        z_a = first_layer(z_a, e_a, v_a, ve_a, e_r, v_r, ve_r, k_aa, p_aa, q_aa, k_ra, p_ra, q_ra, RD, PRECISION)
        z_r = z_a
        if R1 > 0:
            z_r = begin(columns, b1_r, bias1, n_r, H1, (BIASES & 1) > 0, WGMMA, PRECISION)
            z_r = first_layer(z_r, e_a, v_a, ve_a, e_r, v_r, ve_r, k_ar, p_ar, q_ar, k_rr, p_rr, q_rr, RD, PRECISION)
        y_a, y_r = z_a, z_r  # of the top layer
        alpha, mean, rstd = a1, m1, r1
        if TWO:
            h_a = hidden(z_a, a1, m1, r1, n_a, H1, FAST).to(dtype)
            h_r = h_a
            if R1 > 0:
                h_r = hidden(z_r, a1, m1, r1, n_r, H1, FAST).to(dtype)
            y_a = begin(columns, b2_a, bias2, top_a, H2, (BIASES & 2) > 0, WGMMA, PRECISION)
            y_a = second_layer(y_a, h_a, h_r, w2_aa, w2_ra, R1, PRECISION)
            y_r = y_a
            if R2 > 0:
                y_r = begin(columns, b2_r, bias2, top_r, H2, (BIASES & 2) > 0, WGMMA, PRECISION)
                y_r = second_layer(y_r, h_a, h_r, w2_ar, w2_rr, R1, PRECISION)
            alpha, mean, rstd = a2, m2, r2
        if TOP and SOFTMAX:
            t = hidden(y_a, alpha, mean, rstd, top_a, H_OUT, FAST)
            score = tl.sum(t * load_vector(out, top_a, H_OUT, True)[None, :], axis=1) + out_bias
            if R_OUT > 0:
                t = hidden(y_r, alpha, mean, rstd, top_r, H_OUT, FAST)
                score += tl.sum(t * load_vector(out, top_r, H_OUT, True)[None, :], axis=1)
            normaliser = tl.load(log_normaliser + q, mask=live, other=0.0)
            ds = ds - tl.load(delta + q, mask=live, other=0.0)
            ds = scale * tl.exp2((score * scale - normaliser) * LOG2_E) * ds

        # Down to the layer.
        if TOP:  # dh = ds · w; w and 1 − α come in at the end
            ds = tl.where(live, ds, 0.0)
            total_a, turned_a = add_terms(total_a, turned_a, ds[:, None], y_a, mean, rstd, top_a, H, FAST)
            if R > 0:
                total_r, turned_r = add_terms(total_r, turned_r, ds[:, None], y_r, mean, rstd, top_r, H, FAST)
        else:
            dt = ds[:, None] * load_vector(out, top_a, H2, True)[None, :]
            dy, _ = through_activation(dt, y_a, y_a, live, a2, m2, r2, of_top, top_a, H2, DICE, True, FAST)
            dy = dy.to(dtype)
            dh_a = tl.dot(dy, tl.trans(w2_aa), input_precision=PRECISION)
            dh_r = dh_a
            if R1 > 0:
                dh_r = tl.dot(dy, tl.trans(w2_ra), input_precision=PRECISION)
            if R2 > 0:
                dt = ds[:, None] * load_vector(out, top_r, H2, True)[None, :]
                dy, _ = through_activation(dt, y_r, y_r, live, a2, m2, r2, of_top, top_r, H2, DICE, True, FAST)
                dy = dy.to(dtype)
                dh_a = tl.dot(dy, tl.trans(w2_ar), dh_a, input_precision=PRECISION)
                if R1 > 0:
                    dh_r = tl.dot(dy, tl.trans(w2_rr), dh_r, input_precision=PRECISION)
            total_a, turned_a = add_terms(total_a, turned_a, dh_a, z_a, m1, r1, n_a, H1, FAST)
            if R1 > 0:
                total_r, turned_r = add_terms(total_r, turned_r, dh_r, z_r, m1, r1, n_r, H1, FAST)

        if TOP and HANDS_ON:
            tl.store(score_gradients + slot, ds)

    partial += tl.program_id(0) * (2 * H)
    at_a, at_r = tl.arange(0, A), A + tl.arange(0, R if R > 0 else 16)
    factor_a, factor_r = tl.full([A], 1.0, tl.float32), tl.full([at_r.shape[0]], 1.0, tl.float32)
    if TOP:
        factor_a = load_vector(weight_out, at_a, H, True)
        factor_r = load_vector(weight_out, at_r, H, True)
    alpha = alpha2 if LAYER == 1 else alpha1
    store_terms(partial, total_a, turned_a, factor_a, alpha, at_a, H)
    if R > 0:
        store_terms(partial, total_r, turned_r, factor_r, alpha, at_r, H)


@triton.jit(do_not_specialize=["queries"])
def weighted_gradients_packed(
    weights, grad_weights, first_slot, tile_first, slot_query, slot_row, sums, carry, queries,
):  # fmt: skip
    """Σ a · ∂L/∂a of each list, ``sums`` [Q], with a carry [2 · tiles] as in forward."""
    lane = tl.arange(0, TILE)
    segment = tl.arange(0, SEGMENTS)
    num_slots = tl.load(first_slot + queries)
    for tile in range(tl.program_id(0), (num_slots + TILE - 1) // TILE, tl.num_programs(0)):
        q = tl.load(slot_query + tile * TILE + lane)
        row = tl.load(slot_row + tile * TILE + lane)
        live = q >= 0
        a = tl.load(weights + row, mask=live, other=0.0).to(tl.float32)
        terms = a * tl.load(grad_weights + row, mask=live, other=0.0).to(tl.float32)
        first = tl.load(tile_first + tile)
        mine = segment[:, None] == (q - first)[None, :]
        its_sums = tl.sum(tl.where(mine, terms[None, :], 0.0), axis=1)
        begins, ends, continued = tile_borders(first_slot, tile_first, tile, first, queries)
        whole = (segment >= begins) & (segment < ends)
        part = ((segment == 0) & (begins > 0)) | ((segment == ends) & continued)
        tl.store(sums + first + segment, its_sums, mask=whole)
        tl.store(carry + 2 * tile + tl.where(segment >= begins, 1, 0), its_sums, mask=part)
