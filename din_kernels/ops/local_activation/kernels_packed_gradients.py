"""Packed kernels, backward, after ``backward_scores`` has left dz1 and what else it says (kernels_packed_backward.py, where all
of them are described): gradients of the rows and sums per list, then sums of the layers."""

import triton
import triton.language as tl

from .kernels_common import RELU
from .kernels_packed_backward import add_matrix, add_vector, store_segments
from .kernels_packed_common import (
    SEGMENTS,
    TILE,
    load_first_layer,
    load_rows,
    product,
    tile_borders,
)


@triton.jit
def input_gradients(
    dz_a, dz_r, weights, k_a, p_a, k_r, p_r, of_segment, d, queries, row, live, keys, query, grad_pooled, grad_keys,
    first, segment, whole, part, at_carry, list_sums, carry, key_stride,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Columns ``d`` of de, and of the sums Σ (dz1 W_p) ∘ e. ``of_segment``, ``weights`` [SEGMENTS, TILE]: 1, and a, where
    the slot belongs to the segment: what they hand out to rows are v and a g of the tile's few lists."""
    its_q = first + segment
    v = load_rows(query, its_q, d, its_q < queries, D, D, True)
    g = load_rows(grad_pooled, its_q, d, its_q < queries, D, D, True)
    e = load_rows(keys, row, d, live, key_stride, D, CONTIGUOUS)
    back = tl.dot(dz_a, p_a, input_precision=PRECISION)
    if R > 0:
        back = tl.dot(dz_r, p_r, back, input_precision=PRECISION)
    terms = product(back.to(e.dtype), e, FAST)
    sums = tl.dot(of_segment, terms, input_precision=PRECISION)
    store_segments(sums, d, first, segment, whole, part, at_carry, 0, list_sums, carry, D, D + H)
    de = back * tl.dot(tl.trans(of_segment), v, input_precision=PRECISION)
    de = tl.dot(dz_a, k_a, de, input_precision=PRECISION)
    if R > 0:
        de = tl.dot(dz_r, k_r, de, input_precision=PRECISION)
    de = tl.dot(tl.trans(weights), g, de, input_precision=PRECISION)
    tl.store(grad_keys + row.to(tl.int64)[:, None] * D + d[None, :], de.to(grad_keys.dtype.element_ty),
             mask=live[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit
def load_first_layer_rows(weight, d, n, D: tl.constexpr, H: tl.constexpr, dtype: tl.constexpr):
    """(W_k − W_d, W_p) as they lie, [n, d], and not scaled."""
    k, p, _ = load_first_layer(weight, d, n, D, H, RELU, dtype)
    return tl.trans(k), tl.trans(p)


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def backward_inputs(
    dz1, attention, keys, query, weight1, first_slot, tile_first, slot_query, slot_row, grad_pooled, grad_keys,
    list_sums, carry, key_stride, queries, first_tile, end_tile,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """grad_keys, and the sums per list, of tiles first_tile … end_tile − 1 from what ``backward_scores`` left of them."""
    dtype: tl.constexpr = keys.dtype.element_ty
    d_a = tl.arange(0, AD)
    d_r = AD + tl.arange(0, RD if RD > 0 else 16)
    n_a = tl.arange(0, A1)
    n_r = A1 + tl.arange(0, R1 if R1 > 0 else 16)
    k_aa, p_aa = load_first_layer_rows(weight1, d_a, n_a, D, H1, dtype)
    k_ar, p_ar = k_aa, p_aa
    if R1 > 0:
        k_ar, p_ar = load_first_layer_rows(weight1, d_a, n_r, D, H1, dtype)
    if RD > 0:
        k_ra, p_ra = load_first_layer_rows(weight1, d_r, n_a, D, H1, dtype)
        k_rr, p_rr = k_ra, p_ra
        if R1 > 0:
            k_rr, p_rr = load_first_layer_rows(weight1, d_r, n_r, D, H1, dtype)
    lane = tl.arange(0, TILE)
    segment = tl.arange(0, SEGMENTS)
    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        here = slot - first_tile * TILE
        a = tl.load(attention + here)
        dz_a = tl.load(dz1 + here[:, None] * (A1 + R1) + n_a[None, :])
        dz_r = dz_a
        if R1 > 0:
            dz_r = tl.load(dz1 + here[:, None] * (A1 + R1) + n_r[None, :])
        first = tl.load(tile_first + tile)
        mine = segment[:, None] == (q - first)[None, :]
        of_segment = tl.where(mine, 1.0, 0.0).to(dtype)
        weights = tl.where(mine, a[None, :], 0.0).to(dtype)
        begins, ends, continued = tile_borders(first_slot, tile_first, tile, first, queries)
        whole = (segment >= begins) & (segment < ends)
        part = ((segment == 0) & (begins > 0)) | ((segment == ends) & continued)
        at_carry = 2 * tile + tl.where(segment >= begins, 1, 0)
        gamma = tl.dot(of_segment, dz_a, input_precision=PRECISION)
        store_segments(gamma, n_a, first, segment, whole, part, at_carry, D, list_sums, carry, H1, D + H1)
        if R1 > 0:
            gamma = tl.dot(of_segment, dz_r, input_precision=PRECISION)
            store_segments(gamma, n_r, first, segment, whole, part, at_carry, D, list_sums, carry, H1, D + H1)
        input_gradients(dz_a, dz_r, weights, k_aa, p_aa, k_ar, p_ar, of_segment, d_a, queries, row, live, keys, query,
                        grad_pooled, grad_keys, first, segment, whole, part, at_carry, list_sums, carry, key_stride,
                        D, H1, R1, PRECISION, FAST, CONTIGUOUS)  # fmt: skip
        if RD > 0:
            input_gradients(dz_a, dz_r, weights, k_ra, p_ra, k_rr, p_rr, of_segment, d_r, queries, row, live, keys, query,
                            grad_pooled, grad_keys, first, segment, whole, part, at_carry, list_sums, carry, key_stride,
                            D, H1, R1, PRECISION, FAST, CONTIGUOUS)  # fmt: skip


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def first_layer_sums(
    dz1, keys, query, first_slot, slot_query, slot_row, totals, key_stride, queries, first_tile, end_tile,
    D: tl.constexpr, BLOCK_D: tl.constexpr, H: tl.constexpr, A: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """totals [P, 2, H, D] += Σ dz1 eᵀ and Σ dz1 (v∘e)ᵀ over the program's tiles; program (p, i): block i of columns."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n_a = tl.arange(0, A)
    n_r = A + tl.arange(0, R if R > 0 else 16)
    lane = tl.arange(0, TILE)
    shared_a = tl.zeros([A, BLOCK_D], tl.float32)
    product_a = tl.zeros([A, BLOCK_D], tl.float32)
    if R > 0:
        shared_r = tl.zeros([R, BLOCK_D], tl.float32)
        product_r = tl.zeros([R, BLOCK_D], tl.float32)
    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        slot = tile * TILE + lane
        q = tl.load(slot_query + slot)
        row = tl.load(slot_row + slot)
        live = q >= 0
        e = load_rows(keys, row, d, live, key_stride, D, CONTIGUOUS)
        ve = product(load_rows(query, q, d, live, D, D, True), e, FAST)
        at = (slot - first_tile * TILE)[:, None] * (A + R)
        dz_a = tl.trans(tl.load(dz1 + at + n_a[None, :]))
        shared_a = tl.dot(dz_a, e, shared_a, input_precision=PRECISION)
        product_a = tl.dot(dz_a, ve, product_a, input_precision=PRECISION)
        if R > 0:
            dz_r = tl.trans(tl.load(dz1 + at + n_r[None, :]))
            shared_r = tl.dot(dz_r, e, shared_r, input_precision=PRECISION)
            product_r = tl.dot(dz_r, ve, product_r, input_precision=PRECISION)
    totals += tl.program_id(0).to(tl.int64) * (2 * H * D)
    add_matrix(shared_a, n_a, d, totals, H, D)
    add_matrix(product_a, n_a, d, totals + H * D, H, D)
    if R > 0:
        add_matrix(shared_r, n_r, d, totals, H, D)
        add_matrix(product_r, n_r, d, totals + H * D, H, D)


@triton.jit(do_not_specialize=["queries", "first_tile", "end_tile"])
def second_layer_sums(
    dz2, h1, first_slot, totals, vectors, queries, first_tile, end_tile,
    H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr, H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """totals [P, H2, H1] += Σ dz2 h1ᵀ, vectors [P, H2] += Σ dz2, over the program's tiles."""
    n_a, n_r = tl.arange(0, A1), A1 + tl.arange(0, R1 if R1 > 0 else 16)
    m_a, m_r = tl.arange(0, A2), A2 + tl.arange(0, R2 if R2 > 0 else 16)
    lane = tl.arange(0, TILE)
    vector_a = tl.zeros([TILE, A2], tl.float32)
    vector_r = tl.zeros([TILE, R2 if R2 > 0 else 16], tl.float32)
    total_aa = tl.zeros([A2, A1], tl.float32)
    if R1 > 0:
        total_ar = tl.zeros([A2, R1], tl.float32)
    if R2 > 0:
        total_ra = tl.zeros([R2, A1], tl.float32)
        if R1 > 0:
            total_rr = tl.zeros([R2, R1], tl.float32)
    end_tile = tl.minimum(end_tile, (tl.load(first_slot + queries) + TILE - 1) // TILE)
    for tile in tl.range(first_tile + tl.program_id(0), end_tile, tl.num_programs(0)):
        at = ((tile - first_tile) * TILE + lane)[:, None]
        h_a = tl.load(h1 + at * (A1 + R1) + n_a[None, :])
        dz_a = tl.load(dz2 + at * (A2 + R2) + m_a[None, :])
        vector_a += dz_a.to(tl.float32)
        dz_a = tl.trans(dz_a)
        total_aa = tl.dot(dz_a, h_a, total_aa, input_precision=PRECISION)
        if R1 > 0:
            h_r = tl.load(h1 + at * (A1 + R1) + n_r[None, :])
            total_ar = tl.dot(dz_a, h_r, total_ar, input_precision=PRECISION)
        if R2 > 0:
            dz_r = tl.load(dz2 + at * (A2 + R2) + m_r[None, :])
            vector_r += dz_r.to(tl.float32)
            dz_r = tl.trans(dz_r)
            total_ra = tl.dot(dz_r, h_a, total_ra, input_precision=PRECISION)
            if R1 > 0:
                total_rr = tl.dot(dz_r, h_r, total_rr, input_precision=PRECISION)
    vectors += tl.program_id(0) * H2
    add_vector(vector_a, m_a, vectors, H2)
    if R2 > 0:
        add_vector(vector_r, m_r, vectors, H2)
    totals += tl.program_id(0).to(tl.int64) * (H2 * H1)
    add_matrix(total_aa, m_a, n_a, totals, H2, H1)
    if R1 > 0:
        add_matrix(total_ar, m_a, n_r, totals, H2, H1)
    if R2 > 0:
        add_matrix(total_ra, m_r, n_a, totals, H2, H1)
        if R1 > 0:
            add_matrix(total_rr, m_r, n_r, totals, H2, H1)
