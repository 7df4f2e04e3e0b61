"""Packed kernels, backward, fp32: products on the tensor cores as in kernels_packed_fp32.py, in the order they run.

* ``backward_first_layer_fp32`` leaves, of each slot, z1 and g · e, the gradient of its weight.
* ``backward_scores_fp32`` goes from there up to the score and down again to dz1. It leaves a and dz1, with two layers h1
  and dz2, and per program the sums that ``backward_scores`` leaves; or, with GATHER, Dice's two sums of one layer.
* ``backward_inputs_fp32``, ``first_layer_sums_fp32``, ``second_layer_sums_fp32``: as their namesakes for 16 bits
  (kernels_packed_gradients.py).

Where those have one kernel of scores, here are two, and columns of the embedding are dealt out to several programs: split
operands take so many registers that nothing else can be kept beside them. A layer is one block of channels, 36 as 64:
what two blocks would save in arithmetic they lose by splitting the operand that they share twice. Between kernels,
though, only W = H rounded up to 4 columns are written and read, in fp32: that traffic to the L2 cache is what limits these
kernels next to instructions.

*Long sums.* A tensor core cuts off what it adds to an accumulator (Ootomo and Yokota, "Recovering single precision
accuracy from Tensor Cores", 2022), which over the thousands of rows of a program would be a bias. So it sums one tile at
a time, and tiles are added by ordinary instructions, which round.
"""

import triton
import triton.language as tl

from .kernels_common import DICE, PRELU
from .kernels_packed_backward import add_matrix, add_vector, store_segments, through_activation, unscale
from .kernels_packed_common import (
    LN_2,
    LOG2_E,
    SEGMENTS,
    TILE,
    activate,
    fold,
    load_activation,
    load_first_layer,
    load_matrix,
    load_rows,
    load_vector,
    reciprocal,
    scale_of,
    tile_borders,
)
from .kernels_packed_fp32 import dot, load_offset, split


@triton.jit
def load_between(matrix, here, n, W: tl.constexpr):
    """Columns ``n`` of rows ``here`` [TILE] of what another kernel left, 0 beyond W. Whoever passes z on must not mind that
    columns H … W − 1 of h are φ(0): weights and gradients there are 0."""
    return tl.load(matrix + here[:, None] * W + n[None, :], mask=(n < W)[None, :], other=0.0)


@triton.jit
def load_between_again(matrix, here, n, W: tl.constexpr):
    """For the last time: the hint is true, and keeps the compiler from holding the first load instead."""
    at = matrix + here[:, None] * W + n[None, :]
    return tl.load(at, mask=(n < W)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def store_between(matrix, values, here, n, W: tl.constexpr):
    tl.store(matrix + here[:, None] * W + n[None, :], values, mask=(n < W)[None, :])


@triton.jit
def add_columns(
    z, da, keys, query, grad_pooled, row, q, live, d, k, p, key_stride,
    D: tl.constexpr, PRECISION: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """(z, da) plus what columns ``d`` of the embedding add: rows [e ; v∘e] times their weights, and g · e."""
    e = load_rows(keys, row, d, live, key_stride, D, CONTIGUOUS)
    z = dot(e, k, z, PRECISION)
    da += tl.sum(load_rows(grad_pooled, q, d, live, D, D, True) * e, axis=1)
    ve = load_rows(query, q, d, live, D, D, True) * e
    return dot(ve, p, z, PRECISION), da


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def backward_first_layer_fp32(
    keys, query, offset, weight1, first_slot, slot_query, slot_row, grad_pooled, z1, grad_attention,
    key_stride, queries, first_tile, end_tile,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, W1: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """z1 [·, W1], scaled as the weights are (``scale_of``), and ``grad_attention`` [·] of tiles first_tile … end_tile − 1.
    ``offset`` [Q, H1]: (W_q + W_d) v + b1."""
    d_a = tl.arange(0, AD)
    d_r = AD + tl.arange(0, RD if RD > 0 else 16)
    n = tl.arange(0, A1)
    k_a, p_a, _ = load_first_layer(weight1, d_a, n, D, H1, ACT, tl.float32)
    if RD > 0:
        k_r, p_r, _ = load_first_layer(weight1, d_r, n, D, H1, ACT, tl.float32)
    lane = tl.arange(0, TILE)
    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        here = slot - first_tile * TILE
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        z = load_offset(offset, q, n, live, H1, ACT)
        da = tl.zeros([TILE], tl.float32)
        z, da = add_columns(z, da, keys, query, grad_pooled, row, q, live, d_a, k_a, p_a, key_stride, D, PRECISION,
                            CONTIGUOUS)  # fmt: skip
        if RD > 0:
            z, da = add_columns(z, da, keys, query, grad_pooled, row, q, live, d_r, k_r, p_r, key_stride, D, PRECISION,
                                CONTIGUOUS)  # fmt: skip
        tl.store(grad_attention + here, da)
        store_between(z1, z, here, n, W1)


@triton.jit
def statistics_terms(dh, z, alpha, mean, rstd, n, H: tl.constexpr, FAST: tl.constexpr):
    """(dx̂, dx̂ · x̂) of Dice."""
    a, slope, shift = load_activation(alpha, mean, rstd, n, H, DICE)
    turn = z * slope[None, :] + shift[None, :]  # −x̂ · log₂e
    p = reciprocal(1.0 + tl.exp2(turn), FAST)
    dx = dh * z * (1.0 - a)[None, :] * (p * (1.0 - p))
    return dx, dx * turn * -LN_2


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def backward_scores_fp32(
    z1, grad_attention, alpha1, mean1, rstd1, weight2, bias2, alpha2, mean2, rstd2, weight_out, bias_out,
    first_slot, slot_query, slot_row, grad_weights, log_normaliser, delta, sums1, sums2,
    attention, vectors, dz1, h1, dz2,
    queries, scale, first_tile, end_tile,
    H1: tl.constexpr, A1: tl.constexpr, W1: tl.constexpr, H2: tl.constexpr, A2: tl.constexpr, W2: tl.constexpr,
    ACT: tl.constexpr, BIASES: tl.constexpr, SOFTMAX: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Memory of slots begins with those of first_tile. A program's row of ``vectors``, zero at first and added to: as in
    ``backward_scores``; with GATHER = layer instead [Σ dx̂, Σ dx̂ · x̂] of that layer, and nothing else is left."""
    OUT_BIAS: tl.constexpr = 4 if H2 > 0 else 2
    TOP: tl.constexpr = H2 if H2 > 0 else H1
    HAS_ALPHA: tl.constexpr = (ACT == PRELU) or (ACT == DICE)
    AT_ALPHA: tl.constexpr = TOP + 1
    WIDTH: tl.constexpr = AT_ALPHA + (H1 + H2 if HAS_ALPHA else 0)
    S: tl.constexpr = 8 if H2 > 0 else 32
    n = tl.arange(0, A1)
    top = n
    if H2 > 0:
        top = tl.arange(0, A2)
        w2 = load_matrix(weight2, n, top, H1, H1, H2) * scale_of(ACT)
    out_bias = tl.full([], 0.0, tl.float32)
    if BIASES & OUT_BIAS:
        out_bias = tl.load(bias_out).to(tl.float32)

    lane = tl.arange(0, TILE)
    # Of layer 1 and of the top layer: terms of α's gradient, or of Dice's sums. Summed over rows only at the end.
    total1 = tl.zeros([TILE // 2, A1], tl.float32)
    total2 = tl.zeros([TILE // 2, top.shape[0]], tl.float32)
    out_total = tl.zeros([TILE // 2, top.shape[0]], tl.float32)
    deviation_total = tl.zeros([TILE // 2, A1 if GATHER == 0 else top.shape[0]], tl.float32)
    ds_total = tl.zeros([TILE], tl.float32)

    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        here = slot - first_tile * TILE
        q = tl.load(slot_query + slot)
        live = q >= 0
        z = load_between(z1, here, n, W1)
        c0, c1, c2 = load_activation(alpha1, mean1, rstd1, n, H1, ACT)
        h = activate(z, c0, c1, c2, ACT, FAST)
        t, y = h, z  # of the top layer: h and z
        if H2 > 0:
            if GATHER < 0:
                store_between(h1, h, here, n, W1)
            b2 = load_vector(bias2, top, H2, (BIASES & 2) > 0) * scale_of(ACT)
            y = dot(h, w2, tl.broadcast_to(b2[None, :], [TILE, A2]), PRECISION)
            c0, c1, c2 = load_activation(alpha2, mean2, rstd2, top, H2, ACT)
            t = activate(y, c0, c1, c2, ACT, FAST)
        a = tl.sum(t * load_vector(weight_out, top, TOP, True)[None, :], axis=1) + out_bias

        # From the loss to the score.
        ds = tl.load(grad_attention + here)
        if HAS_GRAD_WEIGHTS:
            row = tl.load(slot_row + slot)
            ds += tl.load(grad_weights + row, mask=live, other=0.0)
        if SOFTMAX:
            normaliser = tl.load(log_normaliser + q, mask=live, other=0.0)
            a = tl.exp2((a * scale - normaliser) * LOG2_E)
            ds = scale * a * (ds - tl.load(delta + q, mask=live, other=0.0))
        a = tl.where(live, a, 0.0)
        ds = tl.where(live, ds, 0.0)

        # Down through the layers.
        if GATHER < 0:
            tl.store(attention + here, a)
            ds_total += ds
            out_total += fold(t * ds[:, None], S)
        dh = ds[:, None] * load_vector(weight_out, top, TOP, True)[None, :]
        if H2 > 0:
            if GATHER == 1:
                dx, dx_x = statistics_terms(dh, y, alpha2, mean2, rstd2, top, H2, FAST)
                total2 += fold(dx, S)
                deviation_total += fold(dx_x, S)
            else:
                dy, of_alpha = through_activation(dh * unscale(ACT), y, t, live, alpha2, mean2, rstd2, sums2, top, H2,
                                                  ACT, BATCH_STATISTICS, FAST)  # fmt: skip
                store_between(dz2, dy, here, top, W2)
                if GATHER < 0 and HAS_ALPHA:
                    total2 += fold(of_alpha, S)
                dh = dot(dy, tl.trans(w2), tl.zeros([TILE, A1], tl.float32), PRECISION)
                # Not kept: through the second layer registers are too few.
                z = load_between_again(z1, here, n, W1)
                c0, c1, c2 = load_activation(alpha1, mean1, rstd1, n, H1, ACT)
                h = activate(z, c0, c1, c2, ACT, FAST)
        if GATHER == 0:
            dx, dx_x = statistics_terms(dh, z, alpha1, mean1, rstd1, n, H1, FAST)
            total1 += fold(dx, S)
            deviation_total += fold(dx_x, S)
        elif GATHER < 0:
            dz, of_alpha = through_activation(dh, z, h, live, alpha1, mean1, rstd1, sums1, n, H1, ACT, BATCH_STATISTICS,
                                              FAST)  # fmt: skip
            store_between(dz1, dz, here, n, W1)
            if HAS_ALPHA:
                total1 += fold(of_alpha, S)

    if GATHER == 0:
        vectors += tl.program_id(0) * (2 * H1)
        add_vector(total1, n, vectors, H1)
        add_vector(deviation_total, n, vectors + H1, H1)
    elif GATHER == 1:
        vectors += tl.program_id(0) * (2 * H2)
        add_vector(total2, top, vectors, H2)
        add_vector(deviation_total, top, vectors + H2, H2)
    else:
        vectors += tl.program_id(0) * WIDTH
        add_vector(out_total, top, vectors, TOP)
        tl.store(vectors + TOP, tl.load(vectors + TOP) + tl.sum(ds_total, axis=0))
        if HAS_ALPHA:
            add_vector(total1, n, vectors + AT_ALPHA, H1)
            if H2 > 0:
                add_vector(total2, top, vectors + AT_ALPHA + H1, H2)


@triton.jit
def sum_segments(of_segment, terms, PRECISION: tl.constexpr):
    """[SEGMENTS, n]: Σ terms by segment. The indicator is exact in tf32, so two products do."""
    if PRECISION == "split":
        high, low = split(terms)
        sums = tl.dot(of_segment, low, input_precision="tf32")
        return tl.dot(of_segment, high, sums, input_precision="tf32")
    else:
        return tl.dot(of_segment, terms, input_precision="tf32")


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def backward_inputs_fp32(
    dz1, attention, keys, query, weight1, first_slot, tile_first, slot_query, slot_row, grad_pooled, grad_keys,
    list_sums, carry, key_stride, queries, first_tile, end_tile,
    D: tl.constexpr, BLOCK_D: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, W1: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """grad_keys, and the sums per list, of tiles first_tile … end_tile − 1; program (p, i): block i of columns."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, A1)
    k, p, _ = load_first_layer(weight1, d, n, D, H1, ACT, tl.float32)
    k, p = tl.trans(k), tl.trans(p)
    lane = tl.arange(0, TILE)
    segment = tl.arange(0, SEGMENTS)
    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        here = slot - first_tile * TILE
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        a = tl.load(attention + here)
        dz = load_between(dz1, here, n, W1)
        first = tl.load(tile_first + tile)
        of_segment = tl.where(segment[:, None] == (q - first)[None, :], 1.0, 0.0)
        begins, ends, continued = tile_borders(first_slot, tile_first, tile, first, queries)
        whole = (segment >= begins) & (segment < ends)
        part = ((segment == 0) & (begins > 0)) | ((segment == ends) & continued)
        at_carry = 2 * tile + tl.where(segment >= begins, 1, 0)
        if tl.program_id(1) == 0:
            gamma = sum_segments(of_segment, dz, PRECISION)
            store_segments(gamma, n, first, segment, whole, part, at_carry, D, list_sums, carry, H1, D + H1)
        back = dot(dz, p, tl.zeros([TILE, BLOCK_D], tl.float32), PRECISION)
        e = load_rows(keys, row, d, live, key_stride, D, CONTIGUOUS)
        sums = sum_segments(of_segment, back * e, PRECISION) * unscale(ACT)
        store_segments(sums, d, first, segment, whole, part, at_carry, 0, list_sums, carry, D, D + H1)
        de = dot(dz, k, back * load_rows(query, q, d, live, D, D, True), PRECISION)
        de = de * unscale(ACT) + a[:, None] * load_rows(grad_pooled, q, d, live, D, D, True)
        tl.store(grad_keys + row.to(tl.int64)[:, None] * D + d[None, :], de, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def first_layer_sums_fp32(
    dz1, keys, query, first_slot, slot_query, slot_row, totals, key_stride, queries, first_tile, end_tile,
    D: tl.constexpr, BLOCK_D: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, W1: tl.constexpr,
    PRECISION: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """totals [P, 2, H1, D] += Σ dz1 eᵀ and Σ dz1 (v∘e)ᵀ over the program's tiles; program (p, i): block i of columns."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, A1)
    lane = tl.arange(0, TILE)
    shared = tl.zeros([A1, BLOCK_D], tl.float32)
    of_product = tl.zeros([A1, BLOCK_D], tl.float32)
    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        e = load_rows(keys, row, d, live, key_stride, D, CONTIGUOUS)
        ve = load_rows(query, q, d, live, D, D, True) * e
        dz = tl.trans(load_between(dz1, slot - first_tile * TILE, n, W1))
        nothing = tl.zeros([A1, BLOCK_D], tl.float32)
        shared += dot(dz, e, nothing, PRECISION)
        of_product += dot(dz, ve, nothing, PRECISION)
    totals += tl.program_id(0).to(tl.int64) * (2 * H1 * D)
    add_matrix(shared, n, d, totals, H1, D)
    add_matrix(of_product, n, d, totals + H1 * D, H1, D)


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def second_layer_sums_fp32(
    dz2, h1, first_slot, totals, vectors, queries, first_tile, end_tile,
    H1: tl.constexpr, A1: tl.constexpr, W1: tl.constexpr, H2: tl.constexpr, A2: tl.constexpr, W2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """totals [P, H2, H1] += Σ dz2 h1ᵀ, vectors [P, H2] += Σ dz2, over the program's tiles."""
    n = tl.arange(0, A1)
    m = tl.arange(0, A2)
    lane = tl.arange(0, TILE)
    vector = tl.zeros([TILE, A2], tl.float32)
    total = tl.zeros([A2, A1], tl.float32)
    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        here = (tile - first_tile) * TILE + lane
        dz = load_between(dz2, here, m, W2)
        vector += dz
        h = load_between(h1, here, n, W1)
        total += dot(tl.trans(dz), h, tl.zeros([A2, A1], tl.float32), PRECISION)
    add_vector(vector, m, vectors + tl.program_id(0) * H2, H2)
    add_matrix(total, m, n, totals + tl.program_id(0).to(tl.int64) * (H2 * H1), H2, H1)
