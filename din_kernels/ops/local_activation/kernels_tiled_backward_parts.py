"""What the tiled backward kernel (kernels_tiled_backward.py) is made of: Dice's table and derivatives, sums over rows, and the
steps of the first and second layer."""

import triton
import triton.language as tl

from .kernels_common import PRELU, RELU, SIGMOID, fresh_origin
from .kernels_packed_common import LN_2, LOG2_E, load_rows, reciprocal, scale_of
from .kernels_tiled_common import live_rows, load_parameter
from .kernels_universal_backward import add_to

# Columns of the product that stands for g · e, and rows of the one that stands for a sum over rows: the least that the
# tensor cores take, on sm_90 for a left operand.
COLUMNS = tl.constexpr(16)
ONES = tl.constexpr(64)
GATES = tl.constexpr(7)  # rows of Dice's table


@triton.jit
def load_first_layer(first, product, query, n, d, H: tl.constexpr, D: tl.constexpr, OUTER: tl.constexpr):
    """Block A[n, d] of the query row's matrix, as it lies, fp32, not scaled (unlike ``load_item_matrix``): de takes it too."""
    inside = (n < H)[:, None] & (d < D)[None, :]
    at = n[:, None] * D + d[None, :]
    a = tl.load(first + at, mask=inside, other=0.0)
    if not OUTER:
        v = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
        a += tl.load(product + at, mask=inside, other=0.0) * v[None, :]
    return a


@triton.jit
def make_gates(gates, param, sums, n, H: tl.constexpr, BATCH_STATISTICS: tl.constexpr):
    """What Dice needs of each channel, as rows of ``gates`` [GATES, H], with p = 1 / (1 + 2^(slope · z + shift)):

        h = z (β p + α)      ∂h/∂z of the row alone = β p + α + steep · z · p (1 − p)

    and through the batch's statistics rstd (Σ dx̂ + x̂ Σ dx̂ x̂) / count = flat + rise · z; ``sums`` are those two, divided.
    """
    inside = n < H
    alpha = load_parameter(param, n, 1, H)
    mean = load_parameter(param, n, 2, H)
    rstd = load_parameter(param, n, 3, H)
    tl.store(gates + n, rstd * -LOG2_E, mask=inside)
    tl.store(gates + H + n, rstd * mean * LOG2_E, mask=inside)
    tl.store(gates + 2 * H + n, alpha, mask=inside)
    tl.store(gates + 3 * H + n, 1.0 - alpha, mask=inside)
    tl.store(gates + 4 * H + n, (1.0 - alpha) * rstd, mask=inside)
    if BATCH_STATISTICS:
        of_deviation = load_parameter(sums, n, 1, H) * rstd
        of_mean = load_parameter(sums, n, 0, H) - mean * of_deviation
        tl.store(gates + 5 * H + n, rstd * of_mean, mask=inside)
        tl.store(gates + 6 * H + n, rstd * of_deviation, mask=inside)


@triton.jit
def turn(z, gates, n, H: tl.constexpr):
    """−x̂ · log₂e."""
    return z * load_parameter(gates, n, 0, H)[None, :] + load_parameter(gates, n, 1, H)[None, :]


@triton.jit
def activate(z, param, gates, n, H: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr):
    """(φ(z), and of Dice p); for sigmoid z comes scaled. Comparisons are written so that NaN stays NaN."""
    if ACT == SIGMOID:
        h = reciprocal(1.0 + tl.exp2(z), FAST)
        return h, h
    elif ACT == RELU:
        h = tl.where(z <= 0, 0.0, z)
        return h, h
    elif ACT == PRELU:
        h = tl.where(z <= 0, z * load_parameter(param, n, 1, H)[None, :], z)
        return h, h
    else:
        p = reciprocal(1.0 + tl.exp2(turn(z, gates, n, H)), FAST)
        return z * (load_parameter(gates, n, 3, H)[None, :] * p + load_parameter(gates, n, 2, H)[None, :]), p


@triton.jit
def through_activation(dh, z, h, p, live, param, gates, n, H: tl.constexpr, ACT: tl.constexpr,
                       BATCH_STATISTICS: tl.constexpr, KEPT: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """(dz, terms of α's gradient or dz again where there is no α). KEPT: ``p`` is Dice's; else it is computed again, which
    costs less than to keep it where registers are short."""
    if ACT == SIGMOID:
        h = h.to(tl.float32)
        dz = dh * (h - h * h)
        return dz, dz
    elif ACT == RELU:
        dz = tl.where(h.to(tl.float32) == 0, 0.0, dh)  # of z and h, h may be held in half the registers
        return dz, dz
    elif ACT == PRELU:
        alpha = load_parameter(param, n, 1, H)[None, :]
        return tl.where(z <= 0, dh * alpha, dh), tl.where(z <= 0, dh * z, 0.0)
    else:
        if not KEPT:
            p = reciprocal(1.0 + tl.exp2(turn(z, gates, n, H)), FAST)
        slope = load_parameter(gates, n, 3, H)[None, :] * p + load_parameter(gates, n, 2, H)[None, :]
        slope += (load_parameter(gates, n, 4, H)[None, :] * z) * (p - p * p)
        dz = dh * slope
        if BATCH_STATISTICS:
            dz -= load_parameter(gates, n, 6, H)[None, :] * z + load_parameter(gates, n, 5, H)[None, :]
            dz = tl.where(live[:, None], dz, 0.0)  # dh is 0 outside the list, a share of the means is not
        dh_z = dh * z
        return dz, dh_z - dh_z * p


@triton.jit
def dice_terms(dh, z, gates, n, H: tl.constexpr, FAST: tl.constexpr):
    """dx̂ and dx̂ · x̂."""
    turned = turn(z, gates, n, H)
    p = reciprocal(1.0 + tl.exp2(turned), FAST)
    dx = (load_parameter(gates, n, 3, H)[None, :] * (dh * z)) * (p - p * p)
    return dx, dx * (turned * -LN_2)


@triton.jit
def no_sum(T: tl.constexpr, N: tl.constexpr):
    """What ``add_rows`` adds to."""
    return tl.zeros([T // 16, 8, N], tl.float32)


@triton.jit
def add_rows(total, x):
    """total [T / 16, 8, N] += x [T, N]: rows that the layout of a product gives to one thread, eight apart, are added up
    at once, which halves the registers of a sum over rows."""
    T: tl.constexpr = x.shape[0]
    return total + tl.sum(tl.reshape(x, [T // 16, 2, 8, x.shape[1]]), axis=1)


@triton.jit
def add_vector(target, total, n, N: tl.constexpr):
    """target [N] += Σ over rows of a sum that ``add_rows`` made; memory that this program alone owns."""
    column = tl.sum(tl.reshape(total, [total.shape[0] * 8, total.shape[2]]), axis=0)
    add_to(target + n, column, n < N)


@triton.jit
def sum_rows(x, total, PRECISION: tl.constexpr):
    """total [ONES, N] += Σ over rows of x [T, N], in each of its rows: of an operand of a product, which is no registers
    of the thread's."""
    ones = tl.full([ONES, x.shape[0]], 1.0, x.dtype)
    return tl.dot(ones, x, total, input_precision=PRECISION)


@triton.jit
def add_first_row(target, total, n, N: tl.constexpr):
    """target [N] += any row of ``total`` [ONES, n]; memory that this program alone owns."""
    row = tl.arange(0, ONES)[:, None]
    add_to(target + row * 0 + n[None, :], total, (row == 0) & (n < N)[None, :])


@triton.jit
def add_matrix(target, total, n, d, N: tl.constexpr, D: tl.constexpr):
    """target [N, D] += ``total`` [n, d]; memory that this program alone owns."""
    add_to(target + n[:, None] * D + d[None, :], total, (n < N)[:, None] & (d < D)[None, :])


@triton.jit
def first_layer_gradients(
    d, zero, keys, key_stride, row_mask, rows, dz1, attention, query, first, product, grad_pooled,
    grad_keys, first_slot, offset_slot, private,
    D: tl.constexpr, H: tl.constexpr, A: tl.constexpr, R: tl.constexpr, T: tl.constexpr, OUTER: tl.constexpr,
    HAS_MASK: tl.constexpr, WITH_OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Columns ``d`` of step 2, with γ where WITH_OFFSET. ``keys``, ``grad_keys`` and the rest begin with the item's first
    row; ``private`` points at the shared part."""
    dtype: tl.constexpr = keys.dtype.element_ty
    origin = fresh_origin(zero)
    d = origin + d
    n_a = origin + tl.arange(0, A)
    n_r = A + origin + tl.arange(0, R if R > 0 else 16)
    lane = origin + tl.arange(0, T)
    matrix_a = load_first_layer(first, product, query, n_a, d, H, D, OUTER).to(dtype)
    sum_a = tl.zeros([d.shape[0], A], tl.float32)
    gamma_a = tl.zeros([ONES, A], tl.float32)
    if R > 0:
        matrix_r = load_first_layer(first, product, query, n_r, d, H, D, OUTER).to(dtype)
        sum_r = tl.zeros([d.shape[0], R], tl.float32)
        gamma_r = tl.zeros([ONES, R], tl.float32)
    g = tl.load(grad_pooled + d, mask=d < D, other=0.0).to(tl.float32)
    for row0 in tl.range(0, rows, T):
        row = row0 + lane
        e = load_rows(keys, row, d, live_rows(row, rows, row_mask, HAS_MASK), key_stride, D, CONTIGUOUS)
        its = (row < rows)[:, None]
        dz_a = tl.load(dz1 + row[:, None] * (A + R) + n_a[None, :], mask=its, other=0.0)
        de = tl.load(attention + row, mask=row < rows, other=0.0)[:, None] * g[None, :]
        de = tl.dot(dz_a, matrix_a, de, input_precision=PRECISION)
        sum_a = tl.dot(tl.trans(e), dz_a, sum_a, input_precision=PRECISION)
        if WITH_OFFSET:
            gamma_a = sum_rows(dz_a, gamma_a, PRECISION)
        if R > 0:
            dz_r = tl.load(dz1 + row[:, None] * (A + R) + n_r[None, :], mask=its, other=0.0)
            de = tl.dot(dz_r, matrix_r, de, input_precision=PRECISION)
            sum_r = tl.dot(tl.trans(e), dz_r, sum_r, input_precision=PRECISION)
            if WITH_OFFSET:
                gamma_r = sum_rows(dz_r, gamma_r, PRECISION)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        tl.store(grad_keys + at, de.to(grad_keys.dtype.element_ty), mask=inside)
    if WITH_OFFSET:
        row = tl.arange(0, ONES)[:, None]
        tl.store(offset_slot + row * 0 + n_a[None, :], gamma_a, mask=(row == 0) & (n_a < H)[None, :])
        if R > 0:
            tl.store(offset_slot + row * 0 + n_r[None, :], gamma_r, mask=(row == 0) & (n_r < H)[None, :])
    dv = finish_first_layer(tl.trans(sum_a), n_a, d, query, product, first_slot, private, D, H, OUTER)
    if R > 0:
        dv += finish_first_layer(tl.trans(sum_r), n_r, d, query, product, first_slot, private, D, H, OUTER)
    if not OUTER:
        tl.store(first_slot + d, dv, mask=d < D)


@triton.jit
def finish_first_layer(total, n, d, query, product, first_slot, private, D: tl.constexpr, H: tl.constexpr,
                       OUTER: tl.constexpr):  # fmt: skip
    """Block G[n, d] to where its interaction wants it; returns Σ_h W_p[h] ∘ G[h] over the block (product)."""
    inside = (n < H)[:, None] & (d < D)[None, :]
    at = n[:, None] * D + d[None, :]
    if OUTER:
        tl.store(first_slot + at, total, mask=inside)
        return 0.0
    else:
        v = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
        add_to(private + at, total, inside)
        add_to(private + H * D + at, total * v[None, :], inside)
        return tl.sum(tl.load(product + at, mask=inside, other=0.0) * total, axis=0)


@triton.jit
def second_layer_gradients(
    zero, dz2, h1, rows, weight, bias,
    H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr, H2: tl.constexpr, A2: tl.constexpr, R2: tl.constexpr,
    T: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step 3: ``weight`` [H2, H1] += Σ dz2 h1ᵀ and ``bias`` [H2] += Σ dz2, of the program's own."""
    origin = fresh_origin(zero)
    n_a, n_r = origin + tl.arange(0, A1), A1 + origin + tl.arange(0, R1 if R1 > 0 else 16)
    m_a, m_r = origin + tl.arange(0, A2), A2 + origin + tl.arange(0, R2 if R2 > 0 else 16)
    lane = origin + tl.arange(0, T)
    bias_a = tl.zeros([ONES, A2], tl.float32)
    sum_aa = tl.zeros([A1, A2], tl.float32)
    if R1 > 0:
        sum_ra = tl.zeros([R1, A2], tl.float32)
    if R2 > 0:
        bias_r = tl.zeros([ONES, R2], tl.float32)
        sum_ar = tl.zeros([A1, R2], tl.float32)
        if R1 > 0:
            sum_rr = tl.zeros([R1, R2], tl.float32)
    for row0 in tl.range(0, rows, T):
        row = (row0 + lane)[:, None]
        its = row < rows
        h_a = tl.trans(tl.load(h1 + row * (A1 + R1) + n_a[None, :], mask=its, other=0.0))
        dz_a = tl.load(dz2 + row * (A2 + R2) + m_a[None, :], mask=its, other=0.0)
        sum_aa = tl.dot(h_a, dz_a, sum_aa, input_precision=PRECISION)
        bias_a = sum_rows(dz_a, bias_a, PRECISION)
        if R1 > 0:
            h_r = tl.trans(tl.load(h1 + row * (A1 + R1) + n_r[None, :], mask=its, other=0.0))
            sum_ra = tl.dot(h_r, dz_a, sum_ra, input_precision=PRECISION)
        if R2 > 0:
            dz_r = tl.load(dz2 + row * (A2 + R2) + m_r[None, :], mask=its, other=0.0)
            sum_ar = tl.dot(h_a, dz_r, sum_ar, input_precision=PRECISION)
            bias_r = sum_rows(dz_r, bias_r, PRECISION)
            if R1 > 0:
                sum_rr = tl.dot(h_r, dz_r, sum_rr, input_precision=PRECISION)
    scale = scale_of(ACT)
    add_first_row(bias, bias_a * scale, m_a, H2)
    add_matrix(weight, tl.trans(sum_aa) * scale, m_a, n_a, H2, H1)
    if R1 > 0:
        add_matrix(weight, tl.trans(sum_ra) * scale, m_a, n_r, H2, H1)
    if R2 > 0:
        add_first_row(bias, bias_r * scale, m_r, H2)
        add_matrix(weight, tl.trans(sum_ar) * scale, m_r, n_a, H2, H1)
        if R1 > 0:
            add_matrix(weight, tl.trans(sum_rr) * scale, m_r, n_r, H2, H1)
