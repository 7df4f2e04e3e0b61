"""Packed kernels: moments of a hidden layer's pre-activation over all rows, which Dice in training needs before forward.

They walk the tiles of slots as ``forward_packed`` does and leave a row per program: sums are taken in an order that
lengths alone decide."""

import triton
import triton.language as tl

from .kernels_common import DICE
from .kernels_packed_common import TILE, bias_columns, keep_bias, load_vector, reciprocal
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
def halves(x):
    """Rows of x [TILE, n] as two sets of places [TILE / 16, 8, n], rows i and i + 8, which one thread has of a product."""
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
        w2_aa, w2_ra, w2_ar, w2_rr = load_second_layer(weight2, n_a, n_r, at_a, at_r, H1, R1, H2, R2, dtype)

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
