"""Packed kernels, backward, in the order they run; all but the first are in kernels_packed_gradients.py.

* ``backward_scores`` computes a tile's forward again and goes down to dz1. It leaves, of each slot, a and dz1, with two
  layers h1 and dz2 (in the keys' dtype), and per program vectors summed over its tiles, such as Σ ds · h of the top layer.
* ``backward_inputs``: de = a g + dz1 (W_k − W_d) + (dz1 W_p) ∘ v, once per row; and sums per list, [Q, D + H1] with a
  carry as in forward: Σ (dz1 W_p) ∘ e, which is the product's part of dv, and γ = Σ dz1.
* ``first_layer_sums``, ``second_layer_sums``: Σ dz1 eᵀ, Σ dz1 (v∘e)ᵀ and Σ dz2 h1ᵀ, per program.

One kernel for all of it would need twice the registers there are, and computing the forward again in each would cost
more than reading dz1. The host hands tiles over in batches, so that the memory for what lies between the kernels is bounded
whatever the number of rows.

For sigmoid, weights come multiplied by −log₂e (``scale_of``); what passes back through those of the second layer is divided
by that, once for a row: dz2 is stored so divided. Of the two factors of φ' = h (1 − h) the first is multiplied into what
comes from above, x = h ∂L/∂h, and the second is taken as x − x h: in fp32 at the top, where x also is the term of the
output layer's gradient; below it in 16 bits, two channels to an instruction, as h there has no more.
"""

import triton
import triton.language as tl

from .kernels_common import DICE, PRELU, RELU, SIGMOID
from .kernels_packed_common import (
    LN_2,
    LOG2_E,
    SEGMENTS,
    TILE,
    activate,
    begin_layer,
    bias_columns,
    fold,
    keep_bias,
    load_activation,
    load_bias,
    load_first_layer,
    load_matrix,
    load_rows,
    load_vector,
    product,
    reciprocal,
    scale_of,
)
from .kernels_packed_forward import add_first_layer


@triton.jit
def unscale(ACT: tl.constexpr):
    return -LN_2 if ACT == SIGMOID else 1.0


@triton.jit
def less_product(a, b, FAST: tl.constexpr):
    """a − a · b in the dtype of ``a``, rounded once."""
    if FAST:
        return tl.fma(-a, b, a)
    a = a.to(tl.float32)
    return (a - a * b.to(tl.float32)).to(b.dtype)


@triton.jit
def through_activation(dh, z, h, live, alpha, mean, rstd, sums, n, H: tl.constexpr, ACT: tl.constexpr,
                       BATCH_STATISTICS: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """(dz, terms of α's gradient or dz again where there is no α). ``sums``: Dice's two, divided by the count."""
    if ACT == SIGMOID:
        dh_h = product(dh.to(h.dtype), h, FAST)
        dz = less_product(dh_h, h, FAST)
        return dz, dz
    elif ACT == RELU:
        dz = tl.where(h.to(tl.float32) == 0, 0.0, dh)  # of z and h, h takes half the registers
        return dz, dz
    elif ACT == PRELU:
        a = load_vector(alpha, n, H, True)[None, :]
        return tl.where(z <= 0, dh * a, dh), tl.where(z <= 0, dh * z, 0.0)
    else:
        a, slope, shift = load_activation(alpha, mean, rstd, n, H, ACT)
        a = a[None, :]
        turn = z * slope[None, :] + shift[None, :]  # −x̂ · log₂e
        p = reciprocal(1.0 + tl.exp2(turn), FAST)
        dh_z = dh * z
        dx = dh_z * (1.0 - a) * (p * (1.0 - p))
        if BATCH_STATISTICS:
            of_mean = load_vector(sums, n, H, True)[None, :]
            of_deviation = load_vector(sums + H, n, H, True)[None, :]
            dx = dx - of_mean + turn * (LN_2 * of_deviation)
        dz = dh * (p + a * (1.0 - p)) - (slope * LN_2)[None, :] * dx
        if BATCH_STATISTICS:
            dz = tl.where(live[:, None], dz, 0.0)  # dh is 0 in an empty slot, a share of the means is not
        return dz, dh_z * (1.0 - p)


@triton.jit
def row_pairs(x, ROWS: tl.constexpr):
    """[ROWS, n]; ROWS = TILE / 2: sums of the two rows that one thread has of a product; ROWS = TILE: x itself."""
    if ROWS == TILE:
        return x
    else:
        return fold(x, 8)


@triton.jit
def from_score(ds, t, y, out, total, live, alpha, mean, rstd, sums, n, H: tl.constexpr, ACT: tl.constexpr,
               BATCH_STATISTICS: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """(dz of the top layer, total + ``row_pairs`` of ds · t, terms of α's gradient or dz again where there is no α)."""
    of_out = t * ds[:, None]
    if ACT == SIGMOID:
        dh_h = of_out * out[None, :]
        dz = dh_h - dh_h * t
        return dz, total + row_pairs(of_out, total.shape[0]), dz
    else:
        dz, of_alpha = through_activation(ds[:, None] * out[None, :], y, t, live, alpha, mean, rstd, sums, n, H, ACT,
                                          BATCH_STATISTICS, FAST)  # fmt: skip
        return dz, total + row_pairs(of_out, total.shape[0]), of_alpha


@triton.jit
def store_segments(sums, n, first, segment, whole, part, at_carry, at, target, carry, N: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """Sums of a tile's segments into columns ``at`` + n of rows WIDTH wide."""
    inside = (n < N)[None, :]
    columns = (at + n)[None, :]
    tl.store(carry + at_carry.to(tl.int64)[:, None] * WIDTH + columns, sums, mask=part[:, None] & inside)
    tl.store(target + (first + segment).to(tl.int64)[:, None] * WIDTH + columns, sums, mask=whole[:, None] & inside)


@triton.jit
def add_vector(totals, n, target, N: tl.constexpr):
    """target [N] += Σ over rows of ``totals`` [TILE, n]; memory that this program alone owns."""
    wanted = n < N
    tl.store(target + n, tl.load(target + n, mask=wanted, other=0.0) + tl.sum(totals, axis=0), mask=wanted)


@triton.jit
def add_matrix(totals, n, d, target, N: tl.constexpr, D: tl.constexpr):
    """target [N, D] += ``totals`` [n, d]; memory that this program alone owns."""
    at = target + n[:, None] * D + d[None, :]
    wanted = (n < N)[:, None] & (d < D)[None, :]
    tl.store(at, tl.load(at, mask=wanted, other=0.0) + totals, mask=wanted)


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def backward_scores(
    keys, query, weight1, bias1, alpha1, mean1, rstd1, weight2, bias2, alpha2, mean2, rstd2, weight_out, bias_out,
    first_slot, tile_first, slot_query, slot_row, grad_pooled, grad_weights, log_normaliser, delta, score_gradients, sums1,
    sums2, attention, vectors, dz1, h1, dz2,
    key_stride, queries, scale, first_tile, end_tile,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, ACT: tl.constexpr, BIASES: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr, BATCH_STATISTICS: tl.constexpr, HANDS_ON: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, CONTIGUOUS: tl.constexpr, WGMMA: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Tiles first_tile … end_tile − 1, each program every P-th. ``attention`` [·], ``dz1``, ``h1`` [·, A1 + R1] and
    ``dz2`` [·, A2 + R2] begin with the slots of first_tile. A program's row of ``vectors``, zero at first and added to:
    [Σ ds · h_top, Σ ds, α1, α2], of widths [H_top, 1, H1 and H2 with PReLU and Dice]. HANDS_ON:
    ``score_gradients`` have ds of every slot, from ``backward_sums``. WGMMA: see ``begin_layer``. HOIST:
    narrow layers, which leave registers to keep the output layer's weights in; so does a narrow embedding."""
    dtype: tl.constexpr = keys.dtype.element_ty
    OUT_BIAS: tl.constexpr = 4 if H2 > 0 else 2
    TOP: tl.constexpr = H2 if H2 > 0 else H1
    HAS_ALPHA: tl.constexpr = (ACT == PRELU) or (ACT == DICE)
    W1: tl.constexpr = A1 + R1
    W2: tl.constexpr = A2 + R2
    AT_ALPHA: tl.constexpr = TOP + 1
    KEEP: tl.constexpr = HOIST or (RD == 0)
    ROWS: tl.constexpr = TILE // 2 if (FAST or WGMMA) else TILE  # AMD's threads have other rows
    d_a = tl.arange(0, AD)
    d_r = AD + tl.arange(0, RD if RD > 0 else 16)
    n_a = tl.arange(0, A1)
    k_aa, p_aa, q_aa = load_first_layer(weight1, d_a, n_a, D, H1, ACT, dtype)
    k_ra, p_ra, q_ra = k_aa, p_aa, q_aa
    if RD > 0:
        k_ra, p_ra, q_ra = load_first_layer(weight1, d_r, n_a, D, H1, ACT, dtype)
    n_r, k_ar, p_ar, q_ar, k_rr, p_rr, q_rr = n_a, k_aa, p_aa, q_aa, k_ra, p_ra, q_ra
    if R1 > 0:
        n_r = A1 + tl.arange(0, R1)
        k_ar, p_ar, q_ar = load_first_layer(weight1, d_a, n_r, D, H1, ACT, dtype)
        k_rr, p_rr, q_rr = k_ar, p_ar, q_ar
        if RD > 0:
            k_rr, p_rr, q_rr = load_first_layer(weight1, d_r, n_r, D, H1, ACT, dtype)
    top_a = n_a
    top_r = n_r
    if H2 > 0:
        m_a = tl.arange(0, A2)
        m_r = m_a
        w2_aa = (load_matrix(weight2, n_a, m_a, H1, H1, H2) * scale_of(ACT)).to(dtype)
        if R1 > 0:
            w2_ra = (load_matrix(weight2, n_r, m_a, H1, H1, H2) * scale_of(ACT)).to(dtype)
        if R2 > 0:
            m_r = A2 + tl.arange(0, R2)
            w2_ar = (load_matrix(weight2, n_a, m_r, H1, H1, H2) * scale_of(ACT)).to(dtype)
            if R1 > 0:
                w2_rr = (load_matrix(weight2, n_r, m_r, H1, H1, H2) * scale_of(ACT)).to(dtype)
        top_a = m_a
        top_r = m_r
    columns = bias_columns(dtype)
    b1_a = keep_bias(bias1, n_a, H1, (BIASES & 1) > 0, ACT, WGMMA, dtype)
    b1_r = b1_a
    if R1 > 0:
        b1_r = keep_bias(bias1, n_r, H1, (BIASES & 1) > 0, ACT, WGMMA, dtype)
    if H2 > 0:
        b2_a = keep_bias(bias2, m_a, H2, (BIASES & 2) > 0, ACT, WGMMA, dtype)
        if R2 > 0:
            b2_r = keep_bias(bias2, m_r, H2, (BIASES & 2) > 0, ACT, WGMMA, dtype)
    out_bias = tl.full([], 0.0, tl.float32)
    if BIASES & OUT_BIAS:
        out_bias = tl.load(bias_out).to(tl.float32)
    TOP_R: tl.constexpr = R2 if H2 > 0 else R1

    lane = tl.arange(0, TILE)
    segment = tl.arange(0, SEGMENTS)
    # Summed over rows only at the end.
    out_total_a = tl.zeros([ROWS, top_a.shape[0]], tl.float32)
    out_total_r = tl.zeros([ROWS, top_r.shape[0]], tl.float32)
    alpha_top_a = tl.zeros([ROWS, top_a.shape[0]], tl.float32)
    alpha_top_r = tl.zeros([ROWS, top_r.shape[0]], tl.float32)
    alpha, mean, rstd, sums = alpha1, mean1, rstd1, sums1  # of the top layer
    if H2 > 0:
        alpha_low_a = tl.zeros([ROWS, A1], tl.float32)
        alpha_low_r = tl.zeros([ROWS, n_r.shape[0]], tl.float32)
        alpha, mean, rstd, sums = alpha2, mean2, rstd2, sums2
    if KEEP:
        out_a = load_vector(weight_out, top_a, TOP, True)
        out_r = load_vector(weight_out, top_r, TOP, True)
    ds_total = tl.zeros([TILE], tl.float32)

    num_slots = tl.load(first_slot + queries)
    end_tile = tl.minimum(end_tile, (num_slots + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        e_a = load_rows(keys, row, d_a, live, key_stride, D, CONTIGUOUS)
        v_a = load_rows(query, q, d_a, live, D, D, True)
        ve_a = product(v_a, e_a, FAST)
        if HANDS_ON:
            ds = tl.load(score_gradients + slot)
        else:
            # ∂L/∂a = g · e, with g of the tile's few lists rather than of each row.
            first = tl.load(tile_first + tile)
            its_q = first + segment
            g_a = load_rows(grad_pooled, its_q, d_a, its_q < queries, D, D, True)
            crossed = tl.dot(e_a, tl.trans(g_a), input_precision=PRECISION)  # [TILE, SEGMENTS]
        # Forward again. Vectors are loaded where they are used: to keep them would take the registers of a tile.
        c = b1_a if WGMMA else load_bias(bias1, n_a, H1, (BIASES & 1) > 0, ACT)
        z_a = begin_layer(columns, c, n_a, (BIASES & 1) > 0, WGMMA, PRECISION)
        z_a = add_first_layer(z_a, e_a, v_a, ve_a, k_aa, p_aa, q_aa, PRECISION)
        z_r = z_a
        if R1 > 0:
            c = b1_r if WGMMA else load_bias(bias1, n_r, H1, (BIASES & 1) > 0, ACT)
            z_r = begin_layer(columns, c, n_r, (BIASES & 1) > 0, WGMMA, PRECISION)
            z_r = add_first_layer(z_r, e_a, v_a, ve_a, k_ar, p_ar, q_ar, PRECISION)
        if RD > 0:
            e_r = load_rows(keys, row, d_r, live, key_stride, D, CONTIGUOUS)
            v_r = load_rows(query, q, d_r, live, D, D, True)
            ve_r = product(v_r, e_r, FAST)
            if not HANDS_ON:
                g_r = load_rows(grad_pooled, its_q, d_r, its_q < queries, D, D, True)
                crossed = tl.dot(e_r, tl.trans(g_r), crossed, input_precision=PRECISION)
            z_a = add_first_layer(z_a, e_r, v_r, ve_r, k_ra, p_ra, q_ra, PRECISION)
            if R1 > 0:
                z_r = add_first_layer(z_r, e_r, v_r, ve_r, k_rr, p_rr, q_rr, PRECISION)
        if not HANDS_ON:
            ds = tl.sum(tl.where((q - first)[:, None] == segment[None, :], crossed, 0.0), axis=1)
        c0, c1, c2 = load_activation(alpha1, mean1, rstd1, n_a, H1, ACT)
        h_a = activate(z_a, c0, c1, c2, ACT, FAST)
        if H2 > 0:
            h_a = h_a.to(dtype)  # what the next layer sees; half the registers
        h_r = h_a
        if R1 > 0:
            c0, c1, c2 = load_activation(alpha1, mean1, rstd1, n_r, H1, ACT)
            h_r = activate(z_r, c0, c1, c2, ACT, FAST)
            if H2 > 0:
                h_r = h_r.to(dtype)
        t_a, t_r, y_a, y_r = h_a, h_r, z_a, z_r  # of the top layer: h and z
        if H2 > 0:
            here = (slot - first_tile * TILE)[:, None]
            tl.store(h1 + here * W1 + n_a[None, :], h_a)
            c = b2_a if WGMMA else load_bias(bias2, m_a, H2, (BIASES & 2) > 0, ACT)
            y_a = begin_layer(columns, c, m_a, (BIASES & 2) > 0, WGMMA, PRECISION)
            y_a = tl.dot(h_a, w2_aa, y_a, input_precision=PRECISION)
            if R1 > 0:
                tl.store(h1 + here * W1 + n_r[None, :], h_r)
                y_a = tl.dot(h_r, w2_ra, y_a, input_precision=PRECISION)
            c0, c1, c2 = load_activation(alpha2, mean2, rstd2, m_a, H2, ACT)
            t_a = activate(y_a, c0, c1, c2, ACT, FAST)
            y_r, t_r = y_a, t_a
            if R2 > 0:
                c = b2_r if WGMMA else load_bias(bias2, m_r, H2, (BIASES & 2) > 0, ACT)
                y_r = begin_layer(columns, c, m_r, (BIASES & 2) > 0, WGMMA, PRECISION)
                y_r = tl.dot(h_a, w2_ar, y_r, input_precision=PRECISION)
                if R1 > 0:
                    y_r = tl.dot(h_r, w2_rr, y_r, input_precision=PRECISION)
                c0, c1, c2 = load_activation(alpha2, mean2, rstd2, m_r, H2, ACT)
                t_r = activate(y_r, c0, c1, c2, ACT, FAST)
        if not KEEP:
            out_a = load_vector(weight_out, top_a, TOP, True)
            out_r = load_vector(weight_out, top_r, TOP, True)
        a = tl.sum(t_a * out_a[None, :], axis=1) + out_bias
        if TOP_R > 0:
            a += tl.sum(t_r * out_r[None, :], axis=1)

        # From the loss to the score.
        if SOFTMAX:
            normaliser = tl.load(log_normaliser + q, mask=live, other=0.0)
            a = tl.exp2((a * scale - normaliser) * LOG2_E)
        if not HANDS_ON:
            if HAS_GRAD_WEIGHTS:
                ds += tl.load(grad_weights + row, mask=live, other=0.0).to(tl.float32)
            if SOFTMAX:
                ds = scale * a * (ds - tl.load(delta + q, mask=live, other=0.0))
            ds = tl.where(live, ds, 0.0)
        a = tl.where(live, a, 0.0)
        ds_total += ds
        tl.store(attention + slot - first_tile * TILE, a)

        # Down through the layers.
        top_ds = ds * unscale(ACT) if H2 > 0 else ds
        if not KEEP:  # loaded a second time, which costs less than to keep it
            out_a = load_vector(weight_out, top_a, TOP, True)
            out_r = load_vector(weight_out, top_r, TOP, True)
        dy_a, out_total_a, of_alpha = from_score(top_ds, t_a, y_a, out_a, out_total_a, live, alpha, mean, rstd, sums,
                                                 top_a, TOP, ACT, BATCH_STATISTICS, FAST)  # fmt: skip
        dy_a = dy_a.to(dtype)
        if HAS_ALPHA:
            alpha_top_a += row_pairs(of_alpha, ROWS)
        dy_r = dy_a
        if TOP_R > 0:
            dy_r, out_total_r, of_alpha = from_score(top_ds, t_r, y_r, out_r, out_total_r, live, alpha, mean, rstd, sums,
                                                     top_r, TOP, ACT, BATCH_STATISTICS, FAST)  # fmt: skip
            dy_r = dy_r.to(dtype)
            if HAS_ALPHA:
                alpha_top_r += row_pairs(of_alpha, ROWS)
        dz_a, dz_r = dy_a, dy_r
        if H2 > 0:
            tl.store(dz2 + here * W2 + m_a[None, :], dy_a)
            dh_a = tl.dot(dy_a, tl.trans(w2_aa), input_precision=PRECISION)
            if R1 > 0:
                dh_r1 = tl.dot(dy_a, tl.trans(w2_ra), input_precision=PRECISION)
            if R2 > 0:
                tl.store(dz2 + here * W2 + m_r[None, :], dy_r)
                dh_a = tl.dot(dy_r, tl.trans(w2_ar), dh_a, input_precision=PRECISION)
                if R1 > 0:
                    dh_r1 = tl.dot(dy_r, tl.trans(w2_rr), dh_r1, input_precision=PRECISION)
            dz_a, of_alpha = through_activation(dh_a, z_a, h_a, live, alpha1, mean1, rstd1, sums1, n_a, H1, ACT,
                                                BATCH_STATISTICS, FAST)  # fmt: skip
            dz_a = dz_a.to(dtype)
            if HAS_ALPHA:
                alpha_low_a += row_pairs(of_alpha, ROWS)
            if R1 > 0:
                dz_r, of_alpha = through_activation(dh_r1, z_r, h_r, live, alpha1, mean1, rstd1, sums1, n_r, H1, ACT,
                                                    BATCH_STATISTICS, FAST)  # fmt: skip
                dz_r = dz_r.to(dtype)
                if HAS_ALPHA:
                    alpha_low_r += row_pairs(of_alpha, ROWS)
        at = (slot - first_tile * TILE)[:, None] * W1
        tl.store(dz1 + at + n_a[None, :], dz_a)
        if R1 > 0:
            tl.store(dz1 + at + n_r[None, :], dz_r)

    WIDTH: tl.constexpr = AT_ALPHA + (H1 + H2 if HAS_ALPHA else 0)
    vectors += tl.program_id(0) * WIDTH
    of_out = 1.0 / unscale(ACT) if H2 > 0 else 1.0
    add_vector(out_total_a * of_out, top_a, vectors, TOP)
    if TOP_R > 0:
        add_vector(out_total_r * of_out, top_r, vectors, TOP)
    tl.store(vectors + TOP, tl.load(vectors + TOP) + tl.sum(ds_total, axis=0))
    if HAS_ALPHA:
        AT_TOP: tl.constexpr = AT_ALPHA + (H1 if H2 > 0 else 0)
        add_vector(alpha_top_a, top_a, vectors + AT_TOP, TOP)
        if TOP_R > 0:
            add_vector(alpha_top_r, top_r, vectors + AT_TOP, TOP)
        if H2 > 0:
            add_vector(alpha_low_a, n_a, vectors + AT_ALPHA, H1)
            if R1 > 0:
                add_vector(alpha_low_r, n_r, vectors + AT_ALPHA, H1)
