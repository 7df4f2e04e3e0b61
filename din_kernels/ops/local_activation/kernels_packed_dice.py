"""Packed kernels: the layers of a unit with Dice, for the passes over all rows that its training needs before forward and
backward (kernels_packed_statistics.py, kernels_packed_sums.py). They compute the forward as ``forward_packed`` does, as far
as they go."""

import triton
import triton.language as tl

from .kernels_common import DICE
from .kernels_packed_common import (
    activate,
    begin_layer,
    load_activation,
    load_bias,
    load_first_layer,
    load_matrix,
    load_rows,
    product,
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
def load_second_layer(weight2, n_a, n_r, m_a, m_r, H1: tl.constexpr, R1: tl.constexpr, H2: tl.constexpr,
                      R2: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The second layer's weights, from either block of the first layer's channels to either of its own: aa, ra, ar, rr."""
    w_aa = load_matrix(weight2, n_a, m_a, H1, H1, H2).to(dtype)
    w_ra, w_ar, w_rr = w_aa, w_aa, w_aa
    if R1 > 0:
        w_ra = load_matrix(weight2, n_r, m_a, H1, H1, H2).to(dtype)
    if R2 > 0:
        w_ar = load_matrix(weight2, n_a, m_r, H1, H1, H2).to(dtype)
        if R1 > 0:
            w_rr = load_matrix(weight2, n_r, m_r, H1, H1, H2).to(dtype)
    return w_aa, w_ra, w_ar, w_rr
