"""Tiled kernel, backward: one list at a time, its first layer's matrix on chip.

A program takes items (query row, chunk of its list; items.py) and walks their tiles of T rows, in three launches, so that
each has the registers to itself; what one leaves to the next, dz1 and a of each row, with two layers h1 and dz2 too, lies
in memory by row of the keys.

1. Up through the layers again, from the loss to ds, and down to dz1, with the vectors that are sums over rows.
2. First layer: de = a g + dz1 A, and Gᵀ = Σ e dz1ᵀ, γ = Σ dz1 in registers until the item ends. For the outer
   interaction G is the result of the query row; for the product Σ_q G_q, Σ_q G_q diag(v_q) and Σ_h W_p[h] ∘ G[h]
   follow from it, once per item instead of once per row. The embedding is taken block by block.
3. Second layer: Σ dz2 h1ᵀ.

Sums over everything go to the program's row of ``private``. Dice in training needs two sums over all rows before dz of a
layer: step 1 with GATHER = layer stops there.

For sigmoid, the matrices and offsets of the way up are multiplied by −log₂e (``scale_of``), so dz2 comes divided by
that; what is added up of it is multiplied back.
"""

import triton
import triton.language as tl

from .kernels_common import DICE, PRELU, chunk_rows, fresh_origin, slot_of
from .kernels_packed_backward import unscale
from .kernels_packed_common import LOG2_E, load_rows, scale_of
from .kernels_tiled_backward_parts import (
    COLUMNS,
    GATES,
    activate,
    add_rows,
    add_vector,
    dice_terms,
    first_layer_gradients,
    load_first_layer,
    make_gates,
    no_sum,
    second_layer_gradients,
    through_activation,
)
from .kernels_tiled_common import live_rows, load_item_offset, load_parameter, load_second_matrix
from .kernels_universal_backward import add_to


@triton.jit(do_not_specialize=["item_rows", "num_lists", "weight_row", "weight_list"])
def backward_tiled(
    keys, query, offset, first, product, weight2, param,
    starts, ends, row_mask, chunk_offsets, chunk_list,
    grad_pooled, grad_weights, log_normaliser, delta, sums,
    private, first_slots, grad_keys, attention, dz1, h1, dz2, gates,
    item_rows, key_stride, num_lists,
    scale, weight_row, weight_list,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr, T: tl.constexpr, VECTORS: tl.constexpr,
    ACT: tl.constexpr, OUTER: tl.constexpr, SOFTMAX: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GRAD_WEIGHTS: tl.constexpr, BATCH_STATISTICS: tl.constexpr, GATHER: tl.constexpr, STEP: tl.constexpr,
    PRIVATE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """STEP of the module, one candidate a list. GATHER: −1, or the Dice layer whose two sums ``private`` [P, PRIVATE] shall
    receive. Widths are held as two blocks (kernels_packed_common.py): names end in ``_a`` and ``_r``, those of matrices
    by input, then output. ``attention`` [R], ``dz1``, ``h1`` [R, A1 + R1], ``dz2`` [R, A2 + R2] for keys [R, D];
    ``gates`` [P, GATES · (H1 + H2)]."""
    dtype: tl.constexpr = keys.dtype.element_ty
    W1: tl.constexpr = A1 + R1
    W2: tl.constexpr = A2 + R2
    TWO: tl.constexpr = H2 > 0
    TOP_H: tl.constexpr = H2 if TWO else H1
    TOP_A: tl.constexpr = A2 if TWO else A1
    TOP_R: tl.constexpr = R2 if TWO else R1
    HAS_ALPHA: tl.constexpr = (ACT == PRELU) or (ACT == DICE)
    OUT_PARAMS: tl.constexpr = VECTORS * (H1 + H2)
    # Where the parts of a row of ``private`` begin: W2, which does first, the shared and product parts, vectors.
    SHARED: tl.constexpr = H2 * H1
    VECTOR: tl.constexpr = SHARED + (0 if OUTER else 2 * H1 * D)
    ALPHA1: tl.constexpr = VECTOR + H1
    BIAS2: tl.constexpr = VECTOR + 2 * H1
    ALPHA2: tl.constexpr = VECTOR + 2 * H1 + H2
    OUT: tl.constexpr = VECTOR + 2 * (H1 + H2)
    SLOT: tl.constexpr = (H1 * D if OUTER else D) + H1  # of a row of ``first_slots``, the last H1 columns are γ
    KEPT: tl.constexpr = not TWO

    pid = tl.program_id(0).to(tl.int64)
    private += pid * PRIVATE
    params2 = param + VECTORS * H1
    params_out = param + OUT_PARAMS
    gates1 = gates + pid * (GATES * (H1 + H2))
    gates2 = gates1 + GATES * H1
    if (ACT == DICE) and (STEP == 1):
        make_gates(gates1, param, sums, tl.arange(0, A1), H1, BATCH_STATISTICS)
        if R1 > 0:
            make_gates(gates1, param, sums, A1 + tl.arange(0, R1), H1, BATCH_STATISTICS)
        if TWO:
            make_gates(gates2, params2, sums + 2 * H1, tl.arange(0, A2), H2, BATCH_STATISTICS)
            if R2 > 0:
                make_gates(gates2, params2, sums + 2 * H1, A2 + tl.arange(0, R2), H2, BATCH_STATISTICS)
        tl.debug_barrier()

    if TWO and (STEP == 1):
        origin = fresh_origin(chunk_offsets)
        n_a, n_r = origin + tl.arange(0, A1), A1 + origin + tl.arange(0, R1 if R1 > 0 else 16)
        m_a, m_r = origin + tl.arange(0, A2), A2 + origin + tl.arange(0, R2 if R2 > 0 else 16)
        w2_aa = load_second_matrix(weight2, n_a, m_a, H1, H2, ACT, dtype)
        if R1 > 0:
            w2_ra = load_second_matrix(weight2, n_r, m_a, H1, H2, ACT, dtype)
        if R2 > 0:
            w2_ar = load_second_matrix(weight2, n_a, m_r, H1, H2, ACT, dtype)
            if R1 > 0:
                w2_rr = load_second_matrix(weight2, n_r, m_r, H1, H2, ACT, dtype)
    # Sums over rows: of the output layer and of alphas, or those that GATHER is for.
    ds_total = tl.zeros([T], tl.float32)
    out_a, out_r = no_sum(T, TOP_A), no_sum(T, TOP_R if TOP_R > 0 else 16)
    alpha1_a, alpha1_r = no_sum(T, A1), no_sum(T, R1 if R1 > 0 else 16)
    alpha2_a, alpha2_r = out_a, out_r
    mean_a, mean_r, deviation_a, deviation_r = alpha1_a, alpha1_r, alpha1_a, alpha1_r
    if GATHER == 1:
        mean_a, mean_r, deviation_a, deviation_r = out_a, out_r, out_a, out_r

    for chunk in range(pid, tl.load(chunk_offsets + num_lists), tl.num_programs(0).to(tl.int64)):
        q, number, _, begin, end = chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows)
        rows = (end - begin).to(tl.int32)
        chunk_keys = keys + begin * (D if CONTIGUOUS else key_stride)
        chunk_mask = row_mask + begin
        its_attention = attention + begin
        its_dz1 = dz1 + begin * W1
        its_h1 = h1 + begin * W1
        its_dz2 = dz2 + begin * W2
        query_q = query + q * D
        first_q = first
        if OUTER:
            first_q = first + q * (H1 * D)
        grad_q = grad_pooled + q * D
        offset_q = offset + q * H1

        if STEP == 1:
            # ---- 1: up through the layers, and down to dz1 -----------------------------------------------------------
            origin = fresh_origin(chunk_offsets)
            lane = origin + tl.arange(0, T)
            column = origin + tl.arange(0, COLUMNS)
            d_a, d_r = origin + tl.arange(0, AD), AD + origin + tl.arange(0, RD if RD > 0 else 16)
            n_a, n_r = origin + tl.arange(0, A1), A1 + origin + tl.arange(0, R1 if R1 > 0 else 16)
            top_a, top_r = n_a, n_r
            if TWO:
                m_a, m_r = origin + tl.arange(0, A2), A2 + origin + tl.arange(0, R2 if R2 > 0 else 16)
                top_a, top_r = m_a, m_r
            a_aa = (load_first_layer(first_q, product, query_q, n_a, d_a, H1, D, OUTER) * scale_of(ACT)).to(dtype)
            c_a = load_item_offset(offset_q, n_a, H1, ACT)
            only = (column == 0)[None, :]
            g_a = tl.load(grad_q + d_a[:, None] + column[None, :] * 0, mask=(d_a < D)[:, None] & only, other=0.0)
            if R1 > 0:
                a_ar = (load_first_layer(first_q, product, query_q, n_r, d_a, H1, D, OUTER) * scale_of(ACT)).to(dtype)
                c_r = load_item_offset(offset_q, n_r, H1, ACT)
            if RD > 0:
                a_ra = (load_first_layer(first_q, product, query_q, n_a, d_r, H1, D, OUTER) * scale_of(ACT)).to(dtype)
                g_r = tl.load(grad_q + d_r[:, None] + column[None, :] * 0, mask=(d_r < D)[:, None] & only, other=0.0)
                if R1 > 0:
                    a_rr = (load_first_layer(first_q, product, query_q, n_r, d_r, H1, D, OUTER) * scale_of(ACT)).to(
                        dtype
                    )
            if SOFTMAX:
                normaliser = tl.load(log_normaliser + q)
                delta_q = tl.load(delta + q)
            out_bias = tl.load(params_out + TOP_H)
            at_weight = begin * weight_row + q * weight_list
            # Nothing is fetched ahead here: what registers there are hold the layers, and vectors would be fetched too.
            for row0 in tl.range(0, rows, T, num_stages=1):
                row = row0 + lane
                live = live_rows(row, rows, chunk_mask, HAS_MASK)
                e_a = load_rows(chunk_keys, row, d_a, live, key_stride, D, CONTIGUOUS)
                crossed = tl.dot(e_a, g_a, input_precision=PRECISION)
                z_a = tl.dot(e_a, tl.trans(a_aa), tl.broadcast_to(c_a[None, :], [T, A1]), input_precision=PRECISION)
                z_r = z_a
                if R1 > 0:
                    z_r = tl.dot(e_a, tl.trans(a_ar), tl.broadcast_to(c_r[None, :], [T, R1]), input_precision=PRECISION)
                if RD > 0:
                    e_r = load_rows(chunk_keys, row, d_r, live, key_stride, D, CONTIGUOUS)
                    crossed = tl.dot(e_r, g_r, crossed, input_precision=PRECISION)
                    z_a = tl.dot(e_r, tl.trans(a_ra), z_a, input_precision=PRECISION)
                    if R1 > 0:
                        z_r = tl.dot(e_r, tl.trans(a_rr), z_r, input_precision=PRECISION)
                h_a, p_a = activate(z_a, param, gates1, n_a, H1, ACT, FAST)
                h_r, p_r = h_a, p_a
                if R1 > 0:
                    h_r, p_r = activate(z_r, param, gates1, n_r, H1, ACT, FAST)
                t_a, t_r = h_a, h_r
                at = row[:, None] * W1
                inside = (row < rows)[:, None]
                if TWO:
                    low_a = h_a.to(dtype)
                    h_a = low_a
                    if GATHER < 0:
                        tl.store(its_h1 + at + n_a[None, :], low_a, mask=inside)
                    b_a = load_parameter(params2, m_a, 0, H2) * scale_of(ACT)
                    y_a = tl.dot(low_a, w2_aa, tl.broadcast_to(b_a[None, :], [T, A2]), input_precision=PRECISION)
                    if R1 > 0:
                        low_r = h_r.to(dtype)
                        h_r = low_r
                        if GATHER < 0:
                            tl.store(its_h1 + at + n_r[None, :], low_r, mask=inside)
                        y_a = tl.dot(low_r, w2_ra, y_a, input_precision=PRECISION)
                    t_a, pt_a = activate(y_a, params2, gates2, m_a, H2, ACT, FAST)
                    y_r, t_r, pt_r = y_a, t_a, pt_a
                    if R2 > 0:
                        b_r = load_parameter(params2, m_r, 0, H2) * scale_of(ACT)
                        y_r = tl.dot(low_a, w2_ar, tl.broadcast_to(b_r[None, :], [T, R2]), input_precision=PRECISION)
                        if R1 > 0:
                            y_r = tl.dot(low_r, w2_rr, y_r, input_precision=PRECISION)
                        t_r, pt_r = activate(y_r, params2, gates2, m_r, H2, ACT, FAST)
                w_a = load_parameter(params_out, top_a, 0, TOP_H)[None, :]
                w_r = load_parameter(params_out, top_r, 0, TOP_H)[None, :]
                a = tl.sum(t_a * w_a, axis=1) + out_bias
                if TOP_R > 0:
                    a += tl.sum(t_r * w_r, axis=1)

                # From the loss to the score.
                ds = tl.sum(crossed, axis=1)
                if HAS_GRAD_WEIGHTS:
                    at_row = at_weight + row.to(tl.int64) * weight_row
                    ds += tl.load(grad_weights + at_row, mask=live, other=0.0).to(tl.float32)
                if SOFTMAX:
                    # Rows outside the list may overflow here; they are dropped below.
                    a = tl.exp2((a * scale - normaliser) * LOG2_E)
                    ds = scale * a * (ds - delta_q)
                a = tl.where(live, a, 0.0)
                ds = tl.where(live, ds, 0.0)
                if GATHER < 0:
                    ds_total += ds
                    tl.store(its_attention + row, a, mask=row < rows)
                    out_a = add_rows(out_a, t_a * ds[:, None])
                    if TOP_R > 0:
                        out_r = add_rows(out_r, t_r * ds[:, None])

                # Down through the layers.
                dh_a = ds[:, None] * w_a
                dh_r = ds[:, None] * w_r
                if TWO:
                    if GATHER == 1:
                        dx, dx_x = dice_terms(dh_a, y_a, gates2, m_a, H2, FAST)
                        mean_a, deviation_a = add_rows(mean_a, dx), add_rows(deviation_a, dx_x)
                        if R2 > 0:
                            dx, dx_x = dice_terms(dh_r, y_r, gates2, m_r, H2, FAST)
                            mean_r, deviation_r = add_rows(mean_r, dx), add_rows(deviation_r, dx_x)
                    else:
                        dy_a, of_alpha = through_activation(dh_a * unscale(ACT), y_a, t_a, pt_a, live, params2, gates2,
                                                            m_a, H2, ACT, BATCH_STATISTICS, KEPT, FAST)  # fmt: skip
                        if HAS_ALPHA and (GATHER < 0):
                            alpha2_a = add_rows(alpha2_a, of_alpha)
                        dy_a = dy_a.to(dtype)
                        if GATHER < 0:
                            tl.store(its_dz2 + row[:, None] * W2 + m_a[None, :], dy_a, mask=inside)
                        dh_a = tl.dot(dy_a, tl.trans(w2_aa), input_precision=PRECISION)
                        below_r = dh_a
                        if R1 > 0:
                            below_r = tl.dot(dy_a, tl.trans(w2_ra), input_precision=PRECISION)
                        if R2 > 0:
                            dy_r, of_alpha = through_activation(
                                dh_r * unscale(ACT), y_r, t_r, pt_r, live, params2, gates2, m_r, H2, ACT,
                                BATCH_STATISTICS, KEPT, FAST,
                            )  # fmt: skip
                            if HAS_ALPHA and (GATHER < 0):
                                alpha2_r = add_rows(alpha2_r, of_alpha)
                            dy_r = dy_r.to(dtype)
                            if GATHER < 0:
                                tl.store(its_dz2 + row[:, None] * W2 + m_r[None, :], dy_r, mask=inside)
                            dh_a = tl.dot(dy_r, tl.trans(w2_ar), dh_a, input_precision=PRECISION)
                            if R1 > 0:
                                below_r = tl.dot(dy_r, tl.trans(w2_rr), below_r, input_precision=PRECISION)
                        dh_r = below_r
                if GATHER == 0:
                    dx, dx_x = dice_terms(dh_a, z_a, gates1, n_a, H1, FAST)
                    mean_a, deviation_a = add_rows(mean_a, dx), add_rows(deviation_a, dx_x)
                    if R1 > 0:
                        dx, dx_x = dice_terms(dh_r, z_r, gates1, n_r, H1, FAST)
                        mean_r, deviation_r = add_rows(mean_r, dx), add_rows(deviation_r, dx_x)
                if GATHER < 0:
                    dz_a, of_alpha = through_activation(dh_a, z_a, h_a, p_a, live, param, gates1, n_a, H1, ACT,
                                                        BATCH_STATISTICS, KEPT, FAST)  # fmt: skip
                    tl.store(its_dz1 + at + n_a[None, :], dz_a.to(dtype), mask=inside)
                    if HAS_ALPHA:
                        alpha1_a = add_rows(alpha1_a, of_alpha)
                    if R1 > 0:
                        dz_r, of_alpha = through_activation(dh_r, z_r, h_r, p_r, live, param, gates1, n_r, H1, ACT,
                                                            BATCH_STATISTICS, KEPT, FAST)  # fmt: skip
                        tl.store(its_dz1 + at + n_r[None, :], dz_r.to(dtype), mask=inside)
                        if HAS_ALPHA:
                            alpha1_r = add_rows(alpha1_r, of_alpha)
        if STEP == 2:
            # ---- 2: the first layer, block by block of the embedding -------------------------------------------------
            slot = slot_of(q, number, chunk, 0, 1, num_lists)
            first_slot = first_slots + slot * SLOT
            offset_slot = first_slot + (SLOT - H1)
            its_keys = grad_keys + begin * D
            first_layer_gradients(
                tl.arange(0, AD), chunk_offsets, chunk_keys, key_stride, chunk_mask, rows, its_dz1, its_attention,
                query_q, first_q, product, grad_q, its_keys, first_slot, offset_slot, private + SHARED,
                D, H1, A1, R1, T, OUTER, HAS_MASK, True, PRECISION, CONTIGUOUS,
            )  # fmt: skip
            if RD > 0:
                first_layer_gradients(
                    AD + tl.arange(0, RD), chunk_offsets, chunk_keys, key_stride, chunk_mask, rows, its_dz1,
                    its_attention, query_q, first_q, product, grad_q, its_keys, first_slot, offset_slot,
                    private + SHARED, D, H1, A1, R1, T, OUTER, HAS_MASK, False, PRECISION, CONTIGUOUS,
                )  # fmt: skip
        if STEP == 3:
            # ---- 3: the second layer ---------------------------------------------------------------------------------
            second_layer_gradients(chunk_offsets, its_dz2, its_h1, rows, private, private + BIAS2,
                                       H1, A1, R1, H2, A2, R2, T, ACT, PRECISION)  # fmt: skip
        if STEP > 1:
            tl.debug_barrier()  # between two visits to the program's sums

    if GATHER >= 0:
        GATHERED: tl.constexpr = H2 if GATHER == 1 else H1
        GATHERED_A: tl.constexpr = A2 if GATHER == 1 else A1
        GATHERED_R: tl.constexpr = R2 if GATHER == 1 else R1
        add_vector(private, mean_a, tl.arange(0, GATHERED_A), GATHERED)
        add_vector(private + GATHERED, deviation_a, tl.arange(0, GATHERED_A), GATHERED)
        if GATHERED_R > 0:
            add_vector(private, mean_r, GATHERED_A + tl.arange(0, GATHERED_R), GATHERED)
            add_vector(private + GATHERED, deviation_r, GATHERED_A + tl.arange(0, GATHERED_R), GATHERED)
    elif STEP == 1:
        one = tl.arange(0, 1)
        add_to(private + OUT + TOP_H + one, tl.sum(ds_total[:, None], axis=0), one < 1)
        add_vector(private + OUT, out_a, tl.arange(0, TOP_A), TOP_H)
        if TOP_R > 0:
            add_vector(private + OUT, out_r, TOP_A + tl.arange(0, TOP_R), TOP_H)
        if HAS_ALPHA:
            add_vector(private + ALPHA1, alpha1_a, tl.arange(0, A1), H1)
            if R1 > 0:
                add_vector(private + ALPHA1, alpha1_r, A1 + tl.arange(0, R1), H1)
            if TWO:
                add_vector(private + ALPHA2, alpha2_a, tl.arange(0, A2), H2)
                if R2 > 0:
                    add_vector(private + ALPHA2, alpha2_r, A2 + tl.arange(0, R2), H2)
