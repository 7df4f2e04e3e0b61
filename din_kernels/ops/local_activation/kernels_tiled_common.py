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

from .kernels_common import DICE, PRELU, chunk_rows
from .kernels_packed_common import LOG2_E, scale_of


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

    Outer interaction: ``first`` is the query row's own matrix [H, D], scaled already (``tiled.first_operands``). Product:
    ``first`` and ``product`` are the parts that all share, W_k − W_d and W_p, and ``query`` the query row."""
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
def load_second_matrix(weight, n, m, H1: tl.constexpr, H2: tl.constexpr, ACT: tl.constexpr, dtype: tl.constexpr):
    """Block of W2 [H2, H1], laid out [n, m], scaled, as the operand of a product."""
    inside = (n < H1)[:, None] & (m < H2)[None, :]
    return (tl.load(weight + m[None, :] * H1 + n[:, None], mask=inside, other=0.0) * scale_of(ACT)).to(dtype)


@triton.jit
def load_parameter(param, n, KIND: tl.constexpr, H: tl.constexpr):
    """[n] of a layer's parameters: KIND 0 bias, 1 alpha, 2 mean, 3 rstd."""
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
