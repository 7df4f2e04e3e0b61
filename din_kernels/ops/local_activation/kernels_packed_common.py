"""What the packed kernels share: slots, tiles of slots, weights held on chip, and cheap activations.

*Slots.* Query row q (list s = q // C) takes ``max(length, MIN_SLOTS)`` consecutive slots, in the order of q; behaviour j of
its list sits in slot ``first_slot[q] + j``, and slots beyond the length stay empty. A tile is TILE consecutive slots
and so crosses the borders of lists, which leaves no gaps behind short ones; as each list takes a few slots at least,
empty ones too, a tile meets no more than SEGMENTS of them. That makes every tile the same amount of work, gives
the zeros of empty lists an owner, and lets one indicator matrix [SEGMENTS, TILE] sum a tile by list on the tensor cores.

*Tables*, all int32, made on the device from starts and ends (kernels_packed_tables.py):

    first_slot  [Q + 1 + SEGMENTS]   first slot of each query row; the number of slots; then INT_MAX
    tile_first  [tiles + 1]          query row to which the first slot of the tile belongs; Q behind the last tile
    slot_query  [tiles · TILE]       query row of each slot, −1 where it holds no behaviour
    slot_row    [tiles · TILE]       row of keys of each slot

*Widths.* A width is held as two blocks, the largest power of two within it and a remainder of at least 16: 80 = 64 + 16,
36 = 32 + 16. Padding 80 to 128 would cost 1.6 times the activations. Names end in ``_a`` and ``_r``.
"""

import triton
import triton.language as tl

from .kernels_common import DICE, PRELU, RELU, SIGMOID

TILE = tl.constexpr(64)
SEGMENTS = tl.constexpr(16)
# A list that reaches into the tile, and then one every five slots: 1 + ⌈63 / 5⌉ = 14 lists.
MIN_SLOTS = tl.constexpr(5)
INT_MAX = tl.constexpr(2147483647)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x; FAST: one instruction, to one unit in the last place, where NVIDIA's assembler is there to give it."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def product(a, b, FAST: tl.constexpr):
    """a · b rounded to the dtype of ``a``; the interpreter knows no 16-bit multiplication."""
    if FAST:
        return a * b
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def scale_of(ACT: tl.constexpr):
    """What weights and biases of a hidden layer are multiplied by when loaded: sigmoid then is 1 / (1 + 2^z)."""
    return -LOG2_E if ACT == SIGMOID else 1.0


@triton.jit
def load_matrix(weight, k, n, stride, K: tl.constexpr, N: tl.constexpr):
    """Block W[n, k] of a row-major [N, ·] matrix, laid out [k, n], fp32."""
    return tl.load(weight + n[None, :] * stride + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def load_first_layer(weight, d, n, D: tl.constexpr, H: tl.constexpr, ACT: tl.constexpr,
                     dtype: tl.constexpr):  # fmt: skip
    """(W_k − W_d, W_p, W_q + W_d) from columns [query, key, query − key, query ∘ key], laid out [d, n]."""
    of_query = load_matrix(weight, d, n, 4 * D, D, H)
    of_key = load_matrix(weight + D, d, n, 4 * D, D, H)
    of_difference = load_matrix(weight + 2 * D, d, n, 4 * D, D, H)
    of_product = load_matrix(weight + 3 * D, d, n, 4 * D, D, H)
    scale = scale_of(ACT)
    of_key = ((of_key - of_difference) * scale).to(dtype)
    return of_key, (of_product * scale).to(dtype), ((of_query + of_difference) * scale).to(dtype)


@triton.jit
def load_vector(vector, n, H: tl.constexpr, PRESENT: tl.constexpr):
    """[n] fp32 of a vector [H]; 0 where it is absent."""
    if PRESENT:
        return tl.load(vector + n, mask=n < H, other=0.0).to(tl.float32)
    return tl.zeros([n.shape[0]], tl.float32)


@triton.jit
def load_bias(bias, n, H: tl.constexpr, PRESENT: tl.constexpr, ACT: tl.constexpr):
    """[n] fp32 of a hidden layer's bias, scaled as its weights are."""
    return load_vector(bias, n, H, PRESENT) * scale_of(ACT)


@triton.jit
def keep_bias(bias, n, H: tl.constexpr, PRESENT: tl.constexpr, ACT: tl.constexpr, WGMMA: tl.constexpr,
              dtype: tl.constexpr):  # fmt: skip
    """What ``begin_layer`` needs of a bias: its vector; WGMMA: three rows of ``dtype`` that add up to it, on top of a matrix
    [16, n] of zeros."""
    b = load_bias(bias, n, H, PRESENT, ACT)
    if WGMMA:
        high = b.to(dtype)
        rest = b - high.to(tl.float32)
        middle = rest.to(dtype)
        low = (rest - middle.to(tl.float32)).to(dtype)
        k = tl.arange(0, 16)[:, None]
        return tl.where(k == 0, high[None, :], tl.where(k == 1, middle[None, :], tl.where(k == 2, low[None, :], 0.0)))
    else:
        return b


@triton.jit
def bias_columns(dtype: tl.constexpr):
    """[TILE, 16]: what the three rows are multiplied by."""
    return tl.broadcast_to(tl.where(tl.arange(0, 16) < 3, 1.0, 0.0).to(dtype)[None, :], [TILE, 16])


@triton.jit
def begin_layer(columns, bias, n, PRESENT: tl.constexpr, WGMMA: tl.constexpr, PRECISION: tl.constexpr):
    """z [TILE, n] with nothing but the bias in it. WGMMA: by the tensor core, which leaves no copies to make, one for
    every element, and no registers to copy from. (The products of older GPUs do not depend on the tile, and compilers
    take them out of the loop, with all else that they find in registers then.)"""
    if not PRESENT:
        return tl.zeros([TILE, n.shape[0]], tl.float32)
    elif WGMMA:
        return tl.dot(columns, bias, input_precision=PRECISION)
    else:
        return tl.broadcast_to(bias[None, :], [TILE, n.shape[0]])


@triton.jit
def fold(x, S: tl.constexpr):
    """[TILE / 2, n]: rows i and i + S of x added, for totals of half the registers. S is such that a thread has both: 8 in
    what comes from the tensor cores (NVIDIA's; AMD's threads have other rows), 32 in what was loaded row by row."""
    pairs = tl.reshape(x, [TILE // (2 * S), 2, S, x.shape[1]])
    return tl.reshape(tl.sum(pairs, axis=1), [TILE // 2, x.shape[1]])


@triton.jit
def load_activation(alpha, mean, rstd, n, H: tl.constexpr, ACT: tl.constexpr):
    """(α, slope, shift): Dice's p = 1 / (1 + 2^(slope · z + shift))."""
    a = load_vector(alpha, n, H, (ACT == PRELU) or (ACT == DICE))
    slope = load_vector(rstd, n, H, ACT == DICE) * -LOG2_E
    shift = load_vector(mean, n, H, ACT == DICE) * -slope
    return a, slope, shift


@triton.jit
def activate(z, alpha, slope, shift, ACT: tl.constexpr, FAST: tl.constexpr):
    """φ(z); for sigmoid z comes scaled (``scale_of``). Comparisons are written so that NaN stays NaN."""
    if ACT == SIGMOID:
        return reciprocal(1.0 + tl.exp2(z), FAST)
    elif ACT == RELU:
        return tl.where(z <= 0, 0.0, z)
    elif ACT == PRELU:
        return tl.where(z <= 0, z * alpha[None, :], z)
    else:
        p = reciprocal(1.0 + tl.exp2(z * slope[None, :] + shift[None, :]), FAST)
        return z * ((1.0 - alpha)[None, :] * p + alpha[None, :])


@triton.jit
def load_rows(matrix, row, d, live, stride, D: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Columns ``d`` of rows [TILE]; 0 where a slot is not live: what lies there may be NaN. CONTIGUOUS: the rows lie D
    apart, and fewer than 2³¹ elements in all, so that addresses need no 64-bit products."""
    wanted = live[:, None] & (d < D)[None, :]
    if CONTIGUOUS:
        return tl.load(matrix + row[:, None] * D + d[None, :], mask=wanted, other=0.0)
    return tl.load(matrix + row.to(tl.int64)[:, None] * stride + d[None, :], mask=wanted, other=0.0)


@triton.jit
def tile_borders(first_slot, tile_first, tile, first, queries):
    """(begins, ends, continued): segments begins … ends − 1 of the tile lie wholly in it. A segment before ``begins``
    comes from the tile before, and segment ``ends``, where ``continued``, goes on in the next one."""
    follower = tl.load(tile_first + tile + 1)
    begins = (tl.load(first_slot + first) < tile * TILE).to(tl.int32)
    continued = (follower < queries) & (tl.load(first_slot + follower) < (tile + 1) * TILE)
    return begins, follower - first, continued
