"""What the tiled kernels share: one list at a time, with its query row's first layer on chip.

A program takes a work item (query row, chunk of its list; see items.py), brings the first layer of that query row, A_q
[H1, D] and c_q [H1], into shape once, and then walks the chunk's tiles of T rows with it. A row so costs D·H1
multiplications whatever the interaction; nothing of a tile but its keys comes from memory, and its hidden
activations never leave the registers. What an item costs besides its rows is the making of A_q.

Widths are held as two blocks (``packed.split``): names end in ``_a`` and ``_r``, those of matrices in the block of the
input, then that of the output. Rows are numbered from the chunk's first, in 32 bits, and so are mask, keys and weights.

``param`` is laid out as in kernels_common.py. For sigmoid, what makes z is multiplied by −log₂e (``scale_of``).
"""

import triton
import triton.language as tl

from .kernels_common import DICE, PRELU, chunk_rows, fresh_origin
from .kernels_packed_common import LOG2_E, load_matrix, scale_of


@triton.jit
def item_rows_of(starts, ends, chunk_offsets, chunk_list, item, item_rows, candidates):
    """(list, candidate, chunk, number of the chunk within the list, chunks of the list, first row, rows) of ``item``."""
    chunk = item // candidates
    s, number, chunks, begin, end = chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows)
    return s, item - chunk * candidates, chunk, number, chunks, begin, (end - begin).to(tl.int32)


@triton.jit
def load_item_matrix(first, product, query, d, n, D: tl.constexpr, H: tl.constexpr, ACT: tl.constexpr,
                     OUTER: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Block of a query row's A, laid out [d, n], scaled, as the operand of a product.

    Outer interaction: ``first`` is the query row's own matrix [H, D], scaled already (``tiled.scaled_first_layer``).
    Product: ``first`` and ``product`` are the parts that all share, W_k − W_d and W_p, and ``query`` the query row."""
    inside = (d < D)[:, None] & (n < H)[None, :]
    at = n[None, :] * D + d[:, None]
    a = tl.load(first + at, mask=inside, other=0.0)
    if not OUTER:
        v = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32) * scale_of(ACT)
        a = a * scale_of(ACT) + tl.load(product + at, mask=inside, other=0.0) * v[:, None]
    return a.to(dtype)


@triton.jit
def load_item_offset(offset, n, H: tl.constexpr, ACT: tl.constexpr):
    """Block of a query row's c, scaled."""
    return tl.load(offset + n, mask=n < H, other=0.0) * scale_of(ACT)


@triton.jit
def load_item_layer(
    zero, first, product, query, offset, q,
    D: tl.constexpr, AD: tl.constexpr, RD: tl.constexpr, H: tl.constexpr, A: tl.constexpr, R: tl.constexpr,
    ACT: tl.constexpr, OUTER: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The first layer of query row ``q``: (A in four blocks aa, ra, ar, rr; c in two, a, r). Those that do not exist repeat
    others. ``zero``: see ``fresh_origin``, which keeps addresses of this phase out of the registers of the others. The
    barriers keep loads of one block from being scheduled before the last is out of the registers."""
    origin = fresh_origin(zero)
    d_a, d_r = origin + tl.arange(0, AD), AD + origin + tl.arange(0, RD if RD > 0 else 16)
    n_a, n_r = origin + tl.arange(0, A), A + origin + tl.arange(0, R if R > 0 else 16)
    query += q * D
    offset += q * H
    if OUTER:
        first += q * (H * D)
    aa = load_item_matrix(first, product, query, d_a, n_a, D, H, ACT, OUTER, dtype)
    ra, ar, rr = aa, aa, aa
    c_a = load_item_offset(offset, n_a, H, ACT)
    c_r = c_a
    if RD > 0:
        tl.debug_barrier()
        ra = load_item_matrix(first, product, query, d_r, n_a, D, H, ACT, OUTER, dtype)
    if R > 0:
        tl.debug_barrier()
        ar = load_item_matrix(first, product, query, d_a, n_r, D, H, ACT, OUTER, dtype)
        c_r = load_item_offset(offset, n_r, H, ACT)
        if RD > 0:
            tl.debug_barrier()
            rr = load_item_matrix(first, product, query, d_r, n_r, D, H, ACT, OUTER, dtype)
    return aa, ra, ar, rr, c_a, c_r


@triton.jit
def load_second_matrix(weight, n, m, H1: tl.constexpr, H2: tl.constexpr, ACT: tl.constexpr, dtype: tl.constexpr):
    """Block of W2 [H2, H1], laid out [n, m], scaled, as the operand of a product."""
    return (load_matrix(weight, n, m, H1, H1, H2) * scale_of(ACT)).to(dtype)


@triton.jit
def load_second_layer(
    weight, params, H1: tl.constexpr, A1: tl.constexpr, R1: tl.constexpr, H2: tl.constexpr, A2: tl.constexpr,
    R2: tl.constexpr, ACT: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """As ``load_item_layer``: W2 in four blocks, bias in two; ``params`` begins with the second layer's."""
    n_a, n_r = tl.arange(0, A1), A1 + tl.arange(0, R1 if R1 > 0 else 16)
    m_a, m_r = tl.arange(0, A2), A2 + tl.arange(0, R2 if R2 > 0 else 16)
    aa = load_second_matrix(weight, n_a, m_a, H1, H2, ACT, dtype)
    ra, ar, rr = aa, aa, aa
    b_a = load_parameter(params, m_a, 0, H2) * scale_of(ACT)
    b_r = b_a
    if R1 > 0:
        ra = load_second_matrix(weight, n_r, m_a, H1, H2, ACT, dtype)
    if R2 > 0:
        ar = load_second_matrix(weight, n_a, m_r, H1, H2, ACT, dtype)
        b_r = load_parameter(params, m_r, 0, H2) * scale_of(ACT)
        if R1 > 0:
            rr = load_second_matrix(weight, n_r, m_r, H1, H2, ACT, dtype)
    return aa, ra, ar, rr, b_a, b_r


@triton.jit
def load_parameter(param, n, KIND: tl.constexpr, H: tl.constexpr):
    """[n] of a layer's parameters, KIND 0 bias, 1 alpha, 2 mean, 3 rstd; or of a table of ``gates``, its row KIND."""
    return tl.load(param + KIND * H + n, mask=n < H, other=0.0)


@triton.jit
def load_gate(param, n, H: tl.constexpr, ACT: tl.constexpr):
    """(α, slope, shift) of a layer, as ``kernels_packed_common.activate`` takes them; those that φ has not are 0."""
    alpha = tl.zeros([n.shape[0]], tl.float32)
    slope, shift = alpha, alpha
    if (ACT == PRELU) or (ACT == DICE):
        alpha = load_parameter(param, n, 1, H)
    if ACT == DICE:
        slope = load_parameter(param, n, 3, H) * -LOG2_E
        shift = load_parameter(param, n, 2, H) * -slope
    return alpha, slope, shift


@triton.jit
def store_gate(gates, alpha, slope, shift, n, H: tl.constexpr):
    """What ``load_gate`` gave, to rows of ``gates`` [3, H] that the program alone owns."""
    tl.store(gates + n, alpha, mask=n < H)
    tl.store(gates + H + n, slope, mask=n < H)
    tl.store(gates + 2 * H + n, shift, mask=n < H)


@triton.jit
def gate(kept_alpha, kept_slope, kept_shift, gates, n, H: tl.constexpr, HOIST: tl.constexpr):
    """A layer's (α, slope, shift), as kept or read back now."""
    if HOIST:
        return kept_alpha, kept_slope, kept_shift
    return load_parameter(gates, n, 0, H), load_parameter(gates, n, 1, H), load_parameter(gates, n, 2, H)


@triton.jit
def live_rows(row, rows, row_mask, HAS_MASK: tl.constexpr):
    """Which of the chunk's rows hold a behaviour; ``row_mask`` begins with the chunk's first row."""
    live = row < rows
    if HAS_MASK:
        live = live & (tl.load(row_mask + row, mask=live, other=0) != 0)
    return live


@triton.jit
def affine(e_a, e_r, w_a, w_r, bias, RD: tl.constexpr, PRECISION: tl.constexpr):
    """bias + e W of rows and a matrix in blocks of the input; there is no second block where RD is 0."""
    z = tl.broadcast_to(bias[None, :], [e_a.shape[0], bias.shape[0]])
    z = tl.dot(e_a, w_a, z, input_precision=PRECISION)
    if RD > 0:
        z = tl.dot(e_r, w_r, z, input_precision=PRECISION)
    return z
