"""Packed kernels: what Dice in training needs of all rows before a pass, as the batch's statistics tie them together.

* ``statistics_packed``, before forward: count, mean and Σ(z − mean)² of a hidden layer.
* ``backward_sums``, before backward: Σ dx̂ and Σ dx̂ · x̂ of a layer (x̂ = (z − mean) · rstd), of the top one first, as
  with two layers what comes down to the first depends on the top's.

Both walk the tiles of slots as ``forward_packed`` and ``backward_scores`` do, compute the forward again as far as they need,
and leave a row per program, which the host adds up: sums are taken in an order that lengths alone decide.
"""

import triton
import triton.language as tl

from .kernels_common import DICE
from .kernels_packed_backward import through_activation
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
    load_bias,
    load_first_layer,
    load_matrix,
    load_rows,
    load_vector,
    product,
    reciprocal,
    tile_borders,
)
from .kernels_packed_forward import add_first_layer


@triton.jit
def load_channels(weight1, d_a, d_r, n, D: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, dtype: tl.constexpr):
    """The first layer's weights (k, p, q) of channels ``n``, for both blocks of the embedding."""
    k_a, p_a, q_a = load_first_layer(weight1, d_a, n, D, H1, DICE, dtype)
    k_r, p_r, q_r = k_a, p_a, q_a
    if RD > 0:
        k_r, p_r, q_r = load_first_layer(weight1, d_r, n, D, H1, DICE, dtype)
    return k_a, p_a, q_a, k_r, p_r, q_r


@triton.jit
def load_inputs(keys, query, row, q, d, live, key_stride, D: tl.constexpr, FAST: tl.constexpr,
                CONTIGUOUS: tl.constexpr):  # fmt: skip
    """(e, v, v∘e), columns ``d``."""
    e = load_rows(keys, row, d, live, key_stride, D, CONTIGUOUS)
    v = load_rows(query, q, d, live, D, D, True)
    return e, v, product(v, e, FAST)


@triton.jit
def begin(columns, kept, bias, n, H: tl.constexpr, PRESENT: tl.constexpr, WGMMA: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """``begin_layer``; where the tensor core does not add the bias, it is loaded anew, which takes no registers to keep it."""
    return begin_layer(columns, kept if WGMMA else load_bias(bias, n, H, PRESENT, DICE), n, PRESENT, WGMMA, PRECISION)


@triton.jit
def first_layer(z, e_a, v_a, ve_a, e_r, v_r, ve_r, k_a, p_a, q_a, k_r, p_r, q_r, RD: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """z1 [TILE, n] from ``z``, which has the bias in it or nothing."""
    z = add_first_layer(z, e_a, v_a, ve_a, k_a, p_a, q_a, PRECISION)
    if RD > 0:
        z = add_first_layer(z, e_r, v_r, ve_r, k_r, p_r, q_r, PRECISION)
    return z


@triton.jit
def second_layer(z, h_a, h_r, w_a, w_r, R1: tl.constexpr, PRECISION: tl.constexpr):
    """z2 [TILE, n], likewise."""
    z = tl.dot(h_a, w_a, z, input_precision=PRECISION)
    if R1 > 0:
        z = tl.dot(h_r, w_r, z, input_precision=PRECISION)
    return z


@triton.jit
def hidden(z, alpha, mean, rstd, n, H: tl.constexpr, FAST: tl.constexpr):
    a, slope, shift = load_activation(alpha, mean, rstd, n, H, DICE)
    return activate(z, a, slope, shift, DICE, FAST)


@triton.jit
def fold(x):
    """Sums of rows that lie in the same thread where a product's result has the layout of the tensor cores (r and r + 8):
    as many numbers less to keep."""
    return tl.sum(tl.reshape(x, [TILE // 16, 2, 8, x.shape[1]]), axis=1)


@triton.jit
def add_terms(total, total_turned, dh, z, mean, rstd, n, H: tl.constexpr, FAST: tl.constexpr):
    """Terms dx̂ / (1 − α) and −dx̂ · x̂ · log₂e / (1 − α) of a tile: dx̂ = dh · z (1 − α) p (1 − p)."""
    _, slope, shift = load_activation(mean, mean, rstd, n, H, DICE)
    turn = z * slope[None, :] + shift[None, :]
    p = reciprocal(1.0 + tl.exp2(turn), FAST)
    term = dh * z * (p - p * p)
    return total + fold(term), total_turned + fold(term * turn)


@triton.jit
def store_terms(target, total, total_turned, factor, alpha, n, H: tl.constexpr):
    """Σ dx̂ and Σ dx̂ · x̂ of channels ``n`` into a row [2, H]."""
    factor = factor * (1.0 - load_vector(alpha, n, H, True))
    tl.store(target + n, tl.sum(tl.sum(total, axis=0), axis=0) * factor, mask=n < H)
    tl.store(target + H + n, tl.sum(tl.sum(total_turned, axis=0), axis=0) * (factor * -LN_2), mask=n < H)


@triton.jit(do_not_specialize=["queries"])
def backward_sums(
    keys, query, weight1, bias1, alpha1, mean1, rstd1, weight2, bias2, alpha2, mean2, rstd2, weight_out, bias_out,
    first_slot, tile_first, slot_query, slot_row, grad_pooled, grad_weights, log_normaliser, delta, sums2, partial,
    key_stride, queries, scale,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, BIASES: tl.constexpr, LAYER: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    CONTIGUOUS: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """Σ dx̂ and Σ dx̂ · x̂ of hidden layer LAYER over each program's tiles: ``partial`` [P, 2 · H]. ``sums2``: those of the
    second layer, divided by the count, which the first needs. WGMMA: see ``begin_layer``."""
    dtype: tl.constexpr = keys.dtype.element_ty
    TWO: tl.constexpr = H2 > 0
    TOP: tl.constexpr = LAYER == (1 if TWO else 0)
    H: tl.constexpr = H2 if LAYER == 1 else H1
    A: tl.constexpr = A2 if LAYER == 1 else A1
    R: tl.constexpr = R2 if LAYER == 1 else R1
    H_OUT: tl.constexpr = H2 if TWO else H1
    R_OUT: tl.constexpr = R2 if TWO else R1
    OUT_BIAS: tl.constexpr = 4 if TWO else 2
    d_a, d_r = tl.arange(0, AD), AD + tl.arange(0, RD if RD > 0 else 16)
    n_a, n_r = tl.arange(0, A1), A1 + tl.arange(0, R1 if R1 > 0 else 16)
    k_aa, p_aa, q_aa, k_ra, p_ra, q_ra = load_channels(weight1, d_a, d_r, n_a, D, RD, H1, dtype)
    if R1 > 0:
        k_ar, p_ar, q_ar, k_rr, p_rr, q_rr = load_channels(weight1, d_a, d_r, n_r, D, RD, H1, dtype)
    top_a, top_r = n_a, n_r
    if TWO:
        top_a, top_r = tl.arange(0, A2), A2 + tl.arange(0, R2 if R2 > 0 else 16)
        w2_aa = load_matrix(weight2, n_a, top_a, H1, H1, H2).to(dtype)
        w2_ra, w2_ar, w2_rr = w2_aa, w2_aa, w2_aa
        if R1 > 0:
            w2_ra = load_matrix(weight2, n_r, top_a, H1, H1, H2).to(dtype)
        if R2 > 0:
            w2_ar = load_matrix(weight2, n_a, top_r, H1, H1, H2).to(dtype)
            if R1 > 0:
                w2_rr = load_matrix(weight2, n_r, top_r, H1, H1, H2).to(dtype)
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
    total_a, turned_a = tl.zeros([TILE // 16, 8, A], tl.float32), tl.zeros([TILE // 16, 8, A], tl.float32)
    if R > 0:
        total_r, turned_r = tl.zeros([TILE // 16, 8, R], tl.float32), tl.zeros([TILE // 16, 8, R], tl.float32)
    end_tile = (tl.load(first_slot + queries) + TILE - 1) // TILE
    for tile in tl.range(tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        # ∂L/∂a = g · e, with g of the tile's few lists rather than of each row.
        first = tl.load(tile_first + tile)
        its_q = first + segment
        e_a, v_a, ve_a = load_inputs(keys, query, row, q, d_a, live, key_stride, D, FAST, CONTIGUOUS)
        g_a = load_rows(grad_pooled, its_q, d_a, its_q < queries, D, D, True)
        crossed = tl.dot(e_a, tl.trans(g_a), input_precision=PRECISION)  # [TILE, SEGMENTS]
        e_r, v_r, ve_r = e_a, v_a, ve_a
        if RD > 0:
            e_r, v_r, ve_r = load_inputs(keys, query, row, q, d_r, live, key_stride, D, FAST, CONTIGUOUS)
            g_r = load_rows(grad_pooled, its_q, d_r, its_q < queries, D, D, True)
            crossed = tl.dot(e_r, tl.trans(g_r), crossed, input_precision=PRECISION)
        ds = tl.sum(tl.where((q - first)[:, None] == segment[None, :], crossed, 0.0), axis=1)
        if HAS_GRAD_WEIGHTS:
            ds += tl.load(grad_weights + row, mask=live, other=0.0).to(tl.float32)

        # Forward again.
        z_a = begin(columns, b1_a, bias1, n_a, H1, (BIASES & 1) > 0, WGMMA, PRECISION)
        z_a = first_layer(z_a, e_a, v_a, ve_a, e_r, v_r, ve_r, k_aa, p_aa, q_aa, k_ra, p_ra, q_ra, RD, PRECISION)
        z_r = z_a
        if R1 > 0:
            z_r = begin(columns, b1_r, bias1, n_r, H1, (BIASES & 1) > 0, WGMMA, PRECISION)
            z_r = first_layer(z_r, e_a, v_a, ve_a, e_r, v_r, ve_r, k_ar, p_ar, q_ar, k_rr, p_rr, q_rr, RD, PRECISION)
        y_a, y_r = z_a, z_r  # of the top layer
        alpha, mean, rstd = alpha1, mean1, rstd1
        if TWO:
            h_a = hidden(z_a, alpha1, mean1, rstd1, n_a, H1, FAST).to(dtype)
            h_r = h_a
            if R1 > 0:
                h_r = hidden(z_r, alpha1, mean1, rstd1, n_r, H1, FAST).to(dtype)
            y_a = begin(columns, b2_a, bias2, top_a, H2, (BIASES & 2) > 0, WGMMA, PRECISION)
            y_a = second_layer(y_a, h_a, h_r, w2_aa, w2_ra, R1, PRECISION)
            y_r = y_a
            if R2 > 0:
                y_r = begin(columns, b2_r, bias2, top_r, H2, (BIASES & 2) > 0, WGMMA, PRECISION)
                y_r = second_layer(y_r, h_a, h_r, w2_ar, w2_rr, R1, PRECISION)
            alpha, mean, rstd = alpha2, mean2, rstd2
        if SOFTMAX:
            t = hidden(y_a, alpha, mean, rstd, top_a, H_OUT, FAST)
            score = tl.sum(t * load_vector(weight_out, top_a, H_OUT, True)[None, :], axis=1) + out_bias
            if R_OUT > 0:
                t = hidden(y_r, alpha, mean, rstd, top_r, H_OUT, FAST)
                score += tl.sum(t * load_vector(weight_out, top_r, H_OUT, True)[None, :], axis=1)
            normaliser = tl.load(log_normaliser + q, mask=live, other=0.0)
            ds = ds - tl.load(delta + q, mask=live, other=0.0)
            ds = scale * tl.exp2((score * scale - normaliser) * LOG2_E) * ds
        ds = tl.where(live, ds, 0.0)

        # Down to the layer.
        if TOP:  # dh = ds · w; w and 1 − α come in at the end
            total_a, turned_a = add_terms(total_a, turned_a, ds[:, None], y_a, mean, rstd, top_a, H, FAST)
            if R > 0:
                total_r, turned_r = add_terms(total_r, turned_r, ds[:, None], y_r, mean, rstd, top_r, H, FAST)
        else:
            dt = ds[:, None] * load_vector(weight_out, top_a, H2, True)[None, :]
            dy, _ = through_activation(dt, y_a, y_a, live, alpha2, mean2, rstd2, sums2, top_a, H2, DICE, True, FAST)
            dy = dy.to(dtype)
            dh_a = tl.dot(dy, tl.trans(w2_aa), input_precision=PRECISION)
            dh_r = dh_a
            if R1 > 0:
                dh_r = tl.dot(dy, tl.trans(w2_ra), input_precision=PRECISION)
            if R2 > 0:
                dt = ds[:, None] * load_vector(weight_out, top_r, H2, True)[None, :]
                dy, _ = through_activation(dt, y_r, y_r, live, alpha2, mean2, rstd2, sums2, top_r, H2, DICE, True, FAST)
                dy = dy.to(dtype)
                dh_a = tl.dot(dy, tl.trans(w2_ar), dh_a, input_precision=PRECISION)
                if R1 > 0:
                    dh_r = tl.dot(dy, tl.trans(w2_rr), dh_r, input_precision=PRECISION)
            total_a, turned_a = add_terms(total_a, turned_a, dh_a, z_a, mean1, rstd1, n_a, H1, FAST)
            if R1 > 0:
                total_r, turned_r = add_terms(total_r, turned_r, dh_r, z_r, mean1, rstd1, n_r, H1, FAST)

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


@triton.jit
def halves(x):
    """Rows of x [TILE, n] as two sets of places [TILE / 16, 8, n], divided as in ``fold``."""
    return tl.split(tl.permute(tl.reshape(x, [TILE // 16, 2, 8, x.shape[1]]), (0, 2, 3, 1)))


@triton.jit
def add_places(mean, m2, z, share, cross):
    """(mean, Σ(z − mean)²) of each place with one row more; ``share`` = 1/n and ``cross`` = (n − 1)/n, 0 where a slot is not
    live: z is finite there."""
    delta = z - mean
    return mean + delta * share[:, :, None], m2 + delta * (delta * cross[:, :, None])


@triton.jit
def add_tile(mean, m2, z, share0, cross0, share1, cross1):
    z0, z1 = halves(z)
    mean, m2 = add_places(mean, m2, z0, share0, cross0)
    return add_places(mean, m2, z1, share1, cross1)


@triton.jit
def count_in(count, live, FAST: tl.constexpr):
    """(count of each place with one slot more, share, cross)."""
    total = count + live
    share = live * reciprocal(tl.maximum(total, 1.0), FAST)
    return total, share, count * share


@triton.jit
def store_packed_moments(means, m2s, mean, m2, count, share, bias, n, H: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Merge the places; ``bias`` of the layer was left out of z."""
    merged = tl.sum(tl.sum(mean * share[:, :, None], axis=0), axis=0)
    delta = mean - merged[None, None, :]
    tl.store(means + n, merged + load_vector(bias, n, H, HAS_BIAS), mask=n < H)
    m2 = tl.sum(tl.sum(m2 + delta * (delta * count[:, :, None]), axis=0), axis=0)
    tl.store(m2s + n, m2, mask=n < H)


@triton.jit(do_not_specialize=["queries"])
def statistics_packed(
    keys, query, weight1, bias1, alpha1, mean1, rstd1, weight2, bias2, first_slot, slot_query, slot_row,
    counts, means, m2s, key_stride, queries,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, BIASES: tl.constexpr, LAYER: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, CONTIGUOUS: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """Moments of z of hidden layer LAYER over each program's tiles: ``counts`` [P] int64, ``means`` and ``m2s`` [P, H].

    As in ``statistics_tiled``, each place of half a tile keeps the count, mean and Σ(z − mean)² of the rows it has seen
    (Welford), and Chan's formula merges places, then programs: Σz² − (Σz)²/n would cancel."""
    dtype: tl.constexpr = keys.dtype.element_ty
    TWO: tl.constexpr = LAYER == 1
    H: tl.constexpr = H2 if TWO else H1
    A: tl.constexpr = A2 if TWO else A1
    R: tl.constexpr = R2 if TWO else R1
    d_a, d_r = tl.arange(0, AD), AD + tl.arange(0, RD if RD > 0 else 16)
    n_a, n_r = tl.arange(0, A1), A1 + tl.arange(0, R1 if R1 > 0 else 16)
    at_a, at_r = tl.arange(0, A), A + tl.arange(0, R if R > 0 else 16)
    k_aa, p_aa, q_aa, k_ra, p_ra, q_ra = load_channels(weight1, d_a, d_r, n_a, D, RD, H1, dtype)
    if R1 > 0:
        k_ar, p_ar, q_ar, k_rr, p_rr, q_rr = load_channels(weight1, d_a, d_r, n_r, D, RD, H1, dtype)
    if TWO:
        w2_aa = load_matrix(weight2, n_a, at_a, H1, H1, H2).to(dtype)
        w2_ra, w2_ar, w2_rr = w2_aa, w2_aa, w2_aa
        if R1 > 0:
            w2_ra = load_matrix(weight2, n_r, at_a, H1, H1, H2).to(dtype)
        if R2 > 0:
            w2_ar = load_matrix(weight2, n_a, at_r, H1, H1, H2).to(dtype)
            if R1 > 0:
                w2_rr = load_matrix(weight2, n_r, at_r, H1, H1, H2).to(dtype)

    # The layer's own bias moves the mean alone: it is added at the end.
    BIASED: tl.constexpr = TWO and ((BIASES & 1) > 0)
    columns = bias_columns(dtype)
    b1_a = keep_bias(bias1, n_a, H1, BIASED, DICE, WGMMA, dtype)
    b1_r = keep_bias(bias1, n_r, H1, BIASED, DICE, WGMMA, dtype)

    lane = tl.arange(0, TILE)
    count = tl.zeros([TILE // 16, 8], tl.float32)
    mean_a, m2_a = tl.zeros([TILE // 16, 8, A], tl.float32), tl.zeros([TILE // 16, 8, A], tl.float32)
    if R > 0:
        mean_r, m2_r = tl.zeros([TILE // 16, 8, R], tl.float32), tl.zeros([TILE // 16, 8, R], tl.float32)
    end_tile = (tl.load(first_slot + queries) + TILE - 1) // TILE
    for tile in tl.range(tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        e_a, v_a, ve_a = load_inputs(keys, query, row, q, d_a, live, key_stride, D, FAST, CONTIGUOUS)
        e_r, v_r, ve_r = e_a, v_a, ve_a
        if RD > 0:
            e_r, v_r, ve_r = load_inputs(keys, query, row, q, d_r, live, key_stride, D, FAST, CONTIGUOUS)
        z_a = begin(columns, b1_a, bias1, n_a, H1, BIASED, WGMMA, PRECISION)
        z_a = first_layer(z_a, e_a, v_a, ve_a, e_r, v_r, ve_r, k_aa, p_aa, q_aa, k_ra, p_ra, q_ra, RD, PRECISION)
        z_r = z_a
        if R1 > 0:
            z_r = begin(columns, b1_r, bias1, n_r, H1, BIASED, WGMMA, PRECISION)
            z_r = first_layer(z_r, e_a, v_a, ve_a, e_r, v_r, ve_r, k_ar, p_ar, q_ar, k_rr, p_rr, q_rr, RD, PRECISION)
        if TWO:
            h_a = hidden(z_a, alpha1, mean1, rstd1, n_a, H1, FAST).to(dtype)
            h_r = h_a
            if R1 > 0:
                h_r = hidden(z_r, alpha1, mean1, rstd1, n_r, H1, FAST).to(dtype)
            z_a = second_layer(tl.zeros([TILE, A], tl.float32), h_a, h_r, w2_aa, w2_ra, R1, PRECISION)
            if R2 > 0:
                z_r = second_layer(tl.zeros([TILE, R], tl.float32), h_a, h_r, w2_ar, w2_rr, R1, PRECISION)
        live0, live1 = tl.split(tl.permute(tl.reshape(live.to(tl.float32), [TILE // 16, 2, 8]), (0, 2, 1)))
        count, share0, cross0 = count_in(count, live0, FAST)
        count, share1, cross1 = count_in(count, live1, FAST)
        mean_a, m2_a = add_tile(mean_a, m2_a, z_a, share0, cross0, share1, cross1)
        if R > 0:
            mean_r, m2_r = add_tile(mean_r, m2_r, z_r, share0, cross0, share1, cross1)
    seen = tl.sum(tl.sum(count.to(tl.int32), axis=0), axis=0)
    tl.store(counts + tl.program_id(0), seen.to(tl.int64))
    means += tl.program_id(0) * H
    m2s += tl.program_id(0) * H
    share = count / tl.maximum(seen, 1)
    bias = bias2 if TWO else bias1
    HAS_BIAS: tl.constexpr = (BIASES & (2 if TWO else 1)) > 0
    store_packed_moments(means, m2s, mean_a, m2_a, count, share, bias, at_a, H, HAS_BIAS)
    if R > 0:
        store_packed_moments(means, m2s, mean_r, m2_r, count, share, bias, at_r, H, HAS_BIAS)


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
