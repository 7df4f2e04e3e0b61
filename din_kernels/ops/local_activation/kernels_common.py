"""What the universal kernels share: finding an item's rows, the layers of the scoring network, and their activations.

A program handles one tile of T rows at a time. A layer is computed in blocks of B columns, each the sum over
blocks of the layer below. Hidden activations of the tile rest between layers in scratch memory of the program's own
(it stays in the L2 cache), not in registers: so no width makes a kernel spill, and one kernel serves every width up
to 256. The price is a trip through the cache and a barrier per layer, which the kernels for common shapes do not pay.

Layout of ``param`` (fp32, one flat vector): per hidden layer VECTORS vectors of its width: bias; alpha (PReLU,
Dice); mean and rstd (Dice); after the last layer the output layer's weight, then its bias. The first layer's bias
slot is unused: its bias is part of ``offset``. (No argument of a kernel may be called ``params``: the launcher of
Triton has a variable of that name, and takes it for the argument.)
"""

import triton
import triton.language as tl

# Values of the constexpr ACT.
SIGMOID = tl.constexpr(0)
RELU = tl.constexpr(1)
PRELU = tl.constexpr(2)
DICE = tl.constexpr(3)


@triton.jit
def fresh_origin(zero):
    """0, but no compiler can know: ``zero`` points at one. Added to the indices of a phase (between two barriers),
    it keeps their address arithmetic, hundreds of registers of it, from being hoisted out of all loops or shared
    with other phases."""
    return tl.multiple_of(tl.load(zero).to(tl.int32), 128)


@triton.jit
def sum_of_first(numbers, count, BLOCK: tl.constexpr):
    """Σ numbers[: count], BLOCK at a time."""
    total = tl.zeros([BLOCK], numbers.dtype.element_ty)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(numbers + i, mask=i < count, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows):
    """(list, number of the chunk within it, chunks of the list, first row, end) of ``chunk``, all int64."""
    s = tl.load(chunk_list + chunk).to(tl.int64)
    before = tl.load(chunk_offsets + s)
    chunks = tl.load(chunk_offsets + s + 1) - before
    number = chunk - before
    first = tl.load(starts + s).to(tl.int64) + number * item_rows
    end = tl.minimum(first + item_rows, tl.load(ends + s).to(tl.int64))
    return s, number, chunks, first, end


@triton.jit
def slot_of(s, number, chunk, candidate, candidates, num_lists):
    """Where the item's contribution to its query row goes (see items.py)."""
    extra = (num_lists + chunk - s - 1) * candidates + candidate
    return tl.where(number == 0, s * candidates + candidate, extra)


@triton.jit
def load_rows(keys, rows, live, d, key_stride, D: tl.constexpr):
    """Columns ``d`` of ``rows``; 0 where a row is not live: what lies there may be NaN. ``keys`` may be a tuple of tables
    and ids instead of rows in memory: see ``load_gathered``."""
    inside = live[:, None] & (d < D)[None, :]
    if hasattr(keys, "__len__"):  # a tuple, compiled or interpreted, in every version of Triton that takes tuples
        return load_gathered(keys, rows, live, d, key_stride, inside)
    else:
        return tl.load(keys + rows[:, None] * key_stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_gathered(keys, rows, live, d, strides, inside):
    """[item ; category] of ``rows``, straight from ``keys`` = (item table, category table, item ids, category ids);
    ``strides`` = (of the item table's rows, of the category table's, columns of an item)."""
    item = tl.load(keys[2] + rows, mask=live, other=0).to(tl.int64)
    category = tl.load(keys[3] + rows, mask=live, other=0).to(tl.int64)
    of_item = (d < strides[2])[None, :]
    x = tl.load(keys[0] + item[:, None] * strides[0] + d[None, :], mask=inside & of_item, other=0.0)
    at = category[:, None] * strides[1] + (d - strides[2])[None, :]
    y = tl.load(keys[1] + at, mask=inside & (of_item == 0), other=0.0)
    return tl.where(of_item, x, y)


@triton.jit
def load_first(first, product, query, n, d, H: tl.constexpr, D: tl.constexpr, OUTER: tl.constexpr):
    """Block A[n, d] of the first layer's matrix, laid out [d, n], fp32: of the query row itself for the outer
    interaction, put together from shared and product parts for the other."""
    inside = (d < D)[:, None] & (n < H)[None, :]
    at = n[None, :] * D + d[:, None]
    a = tl.load(first + at, mask=inside, other=0.0)
    if not OUTER:
        v = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
        a += tl.load(product + at, mask=inside, other=0.0) * v[:, None]
    return a


@triton.jit
def first_layer(
    keys, rows, live, key_stride, query, offset, first, product, n, origin,
    D: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z1 [T, B] = c + e Aᵀ for columns ``n``."""
    z = tl.zeros([rows.shape[0], n.shape[0]], tl.float32)
    z += tl.load(offset + n, mask=n < H, other=0.0)[None, :]
    for d0 in range(0, D, BD):
        d = d0 + origin + tl.arange(0, BD)
        e = load_rows(keys, rows, live, d, key_stride, D)
        a = load_first(first, product, query, n, d, H, D, OUTER)
        z = tl.dot(e, a.to(e.dtype), z, input_precision=PRECISION)
    return z


@triton.jit
def upper_layer(
    below, weight, bias, t, n, origin,
    H: tl.constexpr, H_BELOW: tl.constexpr, B_BELOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [T, B] = b + h Wᵀ for columns ``n``; ``below`` is the tile of h in scratch, whole blocks of B_BELOW wide."""
    PAD: tl.constexpr = (H_BELOW + B_BELOW - 1) // B_BELOW * B_BELOW
    z = tl.zeros([t.shape[0], n.shape[0]], tl.float32)
    z += tl.load(bias + n, mask=n < H, other=0.0)[None, :]
    for k0 in range(0, H_BELOW, B_BELOW):
        k = k0 + origin + tl.arange(0, B_BELOW)
        h = tl.load(below + t[:, None] * PAD + k[None, :])
        inside = (k < H_BELOW)[:, None] & (n < H)[None, :]
        w = tl.load(weight + n[None, :] * H_BELOW + k[:, None], mask=inside, other=0.0)
        z = tl.dot(h, w, z, input_precision=PRECISION)
    return z


@triton.jit
def load_vector(param, n, KIND: tl.constexpr, H: tl.constexpr):
    """Row vector [1, B] of a layer's parameters: KIND 0 bias, 1 alpha, 2 mean, 3 rstd."""
    return tl.load(param + KIND * H + n, mask=n < H, other=0.0)[None, :]


@triton.jit
def activate(z, param, n, H: tl.constexpr, ACT: tl.constexpr):
    """φ(z). Comparisons are written so that NaN stays NaN."""
    if ACT == SIGMOID:
        return tl.sigmoid(z)
    elif ACT == RELU:
        return tl.where(z <= 0, 0.0, z)
    elif ACT == PRELU:
        return tl.where(z <= 0, z * load_vector(param, n, 1, H), z)
    else:
        alpha = load_vector(param, n, 1, H)
        p = tl.sigmoid((z - load_vector(param, n, 2, H)) * load_vector(param, n, 3, H))
        return z * (p + alpha * (1 - p))


@triton.jit
def layer(
    LAYER: tl.constexpr, keys, rows, live, key_stride, query, offset, first, product, weight2, weight3, param,
    hidden, n, origin, D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr,
    BD: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    VECTORS: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pre-activation z of hidden layer LAYER for columns ``n``; the layers below lie in ``hidden``."""
    T: tl.constexpr = rows.shape[0]
    t = origin + tl.arange(0, T)
    if LAYER == 0:
        return first_layer(keys, rows, live, key_stride, query, offset, first, product, n, origin,
                           D, H1, BD, OUTER, PRECISION)  # fmt: skip
    elif LAYER == 1:
        return upper_layer(hidden, weight2, param + VECTORS * H1, t, n, origin, H2, H1, B1, PRECISION)
    else:
        PAD1: tl.constexpr = (H1 + B1 - 1) // B1 * B1
        return upper_layer(hidden + T * PAD1, weight3, param + VECTORS * (H1 + H2), t, n, origin, H3, H2, B2, PRECISION)


@triton.jit
def layers_below(
    TOP: tl.constexpr, keys, rows, live, key_stride, query, offset, first, product, weight2, weight3, param,
    hidden, inputs, zero,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr,
    BD: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    VECTORS: tl.constexpr, ACT: tl.constexpr, OUTER: tl.constexpr, PRECISION: tl.constexpr, KEEP_INPUTS: tl.constexpr,
):  # fmt: skip
    """Run hidden layers 0 … TOP − 1 on the tile and leave their h in ``hidden``, layer after layer, [T, whole
    blocks] each; KEEP_INPUTS leaves their z in ``inputs`` (fp32) the same way."""
    T: tl.constexpr = rows.shape[0]
    PAD1: tl.constexpr = (H1 + B1 - 1) // B1 * B1
    if TOP > 0:
        origin = fresh_origin(zero)
        t = origin + tl.arange(0, T)
        for n0 in range(0, H1, B1):
            n = n0 + origin + tl.arange(0, B1)
            z = layer(0, keys, rows, live, key_stride, query, offset, first, product, weight2, weight3, param,
                      hidden, n, origin, D, H1, H2, H3, BD, B1, B2, VECTORS, OUTER, PRECISION)  # fmt: skip
            at = t[:, None] * PAD1 + n[None, :]
            if KEEP_INPUTS:
                tl.store(inputs + at, z)
            tl.store(hidden + at, activate(z, param, n, H1, ACT).to(hidden.dtype.element_ty))
        tl.debug_barrier()
    if TOP > 1:
        PAD2: tl.constexpr = (H2 + B2 - 1) // B2 * B2
        origin = fresh_origin(zero)
        t = origin + tl.arange(0, T)
        for n0 in range(0, H2, B2):
            n = n0 + origin + tl.arange(0, B2)
            z = layer(1, keys, rows, live, key_stride, query, offset, first, product, weight2, weight3, param,
                      hidden, n, origin, D, H1, H2, H3, BD, B1, B2, VECTORS, OUTER, PRECISION)  # fmt: skip
            at = T * PAD1 + t[:, None] * PAD2 + n[None, :]
            if KEEP_INPUTS:
                tl.store(inputs + at, z)
            tl.store(hidden + at, activate(z, param + VECTORS * H1, n, H2, ACT).to(hidden.dtype.element_ty))
        tl.debug_barrier()
