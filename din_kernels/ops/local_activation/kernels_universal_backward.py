"""Universal kernels, backward.

A program walks its share of the chunks; for each tile of rows, and each candidate in turn, it computes the tile's
forward again (keeping z of every layer in its own scratch), goes down through the layers, and adds what it finds to

* ``private``: its own row of sums over everything, [bias H_l, alpha H_l] per hidden layer, output weight and bias,
then
  the matrices W2, W3, and for the product interaction the shared and product parts of the first layer;
* the item's slot: γ = Σ dz1, and Σ_j (W_pᵀ dz1_j) ∘ e_j (product) or G = Σ dz1 eᵀ (outer); see items.py;
* ``grad_keys``: written once per row. Candidates share the rows of a list, so one program sums over its candidates;
they
  are dealt out in groups, each with its own ``grad_keys``, only where there are too few chunks to keep the GPU busy.

Dice in training needs, before dz of a layer, two sums over all rows: the same kernel with GATHER = layer stops there.
"""

import triton
import triton.language as tl

from .kernels_common import (
    PRELU,
    RELU,
    SIGMOID,
    activate,
    chunk_rows,
    fresh_origin,
    layer,
    layers_below,
    load_rows,
    load_vector,
    slot_of,
)


@triton.jit
def add_to(pointer, value, inside):
    """Add to memory that this program alone owns; a barrier stands between any two visits."""
    tl.store(pointer, tl.load(pointer, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def add_or_start(pointer, value, inside, started):
    """The same for memory that holds nothing yet at the first visit."""
    tl.store(pointer, tl.load(pointer, mask=inside & started, other=0.0) + value, mask=inside)


@triton.jit
def through_activation(
    LAYER: tl.constexpr, GATHER: tl.constexpr, dh, z, live, started, t, n, param, sums, private, offset_slot, dz_tile,
    H: tl.constexpr, B: tl.constexpr, ABOVE: tl.constexpr, ACT: tl.constexpr, BATCH_STATISTICS: tl.constexpr,
):  # fmt: skip
    """From dh to dz [T, B] of layer LAYER for columns ``n``: into ``dz_tile``, with its sums over rows. With GATHER
    = LAYER only Dice's sums Σ dx̂ and Σ dx̂·x̂ are taken. ``param``, ``sums``: of this layer; ABOVE: widths of the layers
    before."""
    inside = n < H
    if ACT == SIGMOID:
        h = tl.sigmoid(z)
        dz = dh * h * (1 - h)
    elif ACT == RELU:
        dz = tl.where(z <= 0, 0.0, dh)
    elif ACT == PRELU:
        dz = tl.where(z <= 0, dh * load_vector(param, n, 1, H), dh)
        if GATHER < 0:
            add_to(private + 2 * ABOVE + H + n, tl.sum(tl.where(z <= 0, dh * z, 0.0), axis=0), inside)
    else:
        alpha = load_vector(param, n, 1, H)
        rstd = load_vector(param, n, 3, H)
        x = (z - load_vector(param, n, 2, H)) * rstd
        p = tl.sigmoid(x)
        dx = dh * z * (1 - alpha) * p * (1 - p)
        if GATHER == LAYER:
            add_to(private + n, tl.sum(dx, axis=0), inside)
            add_to(private + H + n, tl.sum(dx * x, axis=0), inside)
        else:
            if GATHER < 0:
                add_to(private + 2 * ABOVE + H + n, tl.sum(dh * z * (1 - p), axis=0), inside)
            if BATCH_STATISTICS:
                dx = dx - load_vector(sums, n, 0, H) - x * load_vector(sums, n, 1, H)
            dz = dh * (p + alpha * (1 - p)) + rstd * dx
            if BATCH_STATISTICS:
                dz = tl.where(live[:, None], dz, 0.0)  # dh is 0 outside the list, a share of the means is not
    if GATHER != LAYER:
        if GATHER < 0:
            column = tl.sum(dz, axis=0)
            if LAYER == 0:
                add_or_start(offset_slot + n, column, inside, started)
            else:
                add_to(private + 2 * ABOVE + n, column, inside)
        PAD: tl.constexpr = (H + B - 1) // B * B
        tl.store(dz_tile + t[:, None] * PAD + n[None, :], dz.to(dz_tile.dtype.element_ty))


@triton.jit
def weight_gradient(
    dz_tile, h_tile, target, origin, T: tl.constexpr, H_OUT: tl.constexpr, B_OUT: tl.constexpr, H_IN: tl.constexpr,
    B_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target [H_OUT, H_IN] += dzᵀ h over the tile."""
    PAD_OUT: tl.constexpr = (H_OUT + B_OUT - 1) // B_OUT * B_OUT
    PAD_IN: tl.constexpr = (H_IN + B_IN - 1) // B_IN * B_IN
    t = origin + tl.arange(0, T)
    for m0 in range(0, H_OUT, B_OUT):
        m = m0 + origin + tl.arange(0, B_OUT)
        dz = tl.load(dz_tile + t[:, None] * PAD_OUT + m[None, :])
        for n0 in range(0, H_IN, B_IN):
            n = n0 + origin + tl.arange(0, B_IN)
            h = tl.load(h_tile + t[:, None] * PAD_IN + n[None, :])
            gradient = tl.dot(tl.trans(dz), h, input_precision=PRECISION)
            add_to(target + m[:, None] * H_IN + n[None, :], gradient, (m < H_OUT)[:, None] & (n < H_IN)[None, :])


@triton.jit
def through_weight(
    dz_tile, weight, n, origin, T: tl.constexpr, H_OUT: tl.constexpr, B_OUT: tl.constexpr, H_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dh [T, B] = dz W for columns ``n`` of the layer below."""
    PAD: tl.constexpr = (H_OUT + B_OUT - 1) // B_OUT * B_OUT
    t = origin + tl.arange(0, T)
    dh = tl.zeros([T, n.shape[0]], tl.float32)
    for k0 in range(0, H_OUT, B_OUT):
        k = k0 + origin + tl.arange(0, B_OUT)
        dz = tl.load(dz_tile + t[:, None] * PAD + k[None, :])
        inside = (k < H_OUT)[:, None] & (n < H_IN)[None, :]
        w = tl.load(weight + k[:, None] * H_IN + n[None, :], mask=inside, other=0.0)
        dh = tl.dot(dz, w, dh, input_precision=PRECISION)
    return dh


@triton.jit
def first_layer_gradients(
    keys, rows, live, key_stride, query, grad_pooled, first, product, a, dz_tile, private, first_slot,
    grad_keys, keys_sum, started, summing, finishing, in_list, origin,
    D: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
    OUTER: tl.constexpr, MANY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """de = a g + dz A, and G = dzᵀ e in the form its interaction wants. ``private`` points at the shared part.

    With MANY candidates ``keys_sum`` [T, D] holds the sum so far: ``summing`` is false for the first candidate, and
    only the last (``finishing``) writes ``grad_keys``."""
    PAD: tl.constexpr = (H + B - 1) // B * B
    t = origin + tl.arange(0, T)
    for d0 in range(0, D, BD):
        d = d0 + origin + tl.arange(0, BD)
        e = load_rows(keys, rows, live, d, key_stride, D)
        g = tl.load(grad_pooled + d, mask=d < D, other=0.0).to(tl.float32)
        v = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
        de = a[:, None] * g[None, :]
        dv = tl.zeros([BD], tl.float32)
        for n0 in range(0, H, B):
            n = n0 + origin + tl.arange(0, B)
            dz = tl.load(dz_tile + t[:, None] * PAD + n[None, :])
            inside = (n < H)[:, None] & (d < D)[None, :]
            at = n[:, None] * D + d[None, :]
            gradient = tl.dot(tl.trans(dz), e, input_precision=PRECISION)
            matrix = tl.load(first + at, mask=inside, other=0.0)
            if OUTER:
                add_or_start(first_slot + at, gradient, inside, started)
            else:
                of_product = tl.load(product + at, mask=inside, other=0.0)
                dv += tl.sum(of_product * gradient, axis=0)
                add_to(private + at, gradient, inside)
                add_to(private + H * D + at, gradient * v[None, :], inside)
                matrix += of_product * v[None, :]
            de = tl.dot(dz, matrix.to(dz.dtype), de, input_precision=PRECISION)
        if not OUTER:
            add_or_start(first_slot + d, dv, d < D, started)
        inside = in_list[:, None] & (d < D)[None, :]
        target = grad_keys + rows[:, None] * D + d[None, :]
        if MANY:
            at = t[:, None] * D + d[None, :]
            de += tl.load(keys_sum + at, mask=inside & summing, other=0.0)
            tl.store(keys_sum + at, de, mask=inside)
            tl.store(target, de.to(grad_keys.dtype.element_ty), mask=inside & finishing)
        else:
            tl.store(target, de.to(grad_keys.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["item_rows", "num_lists", "candidates", "num_rows", "groups", "weight_row",
                               "weight_candidate", "weight_list"])  # fmt: skip
def backward_items(
    keys, query, offset, first, product, weight2, weight3, param,
    starts, ends, row_mask, chunk_offsets, chunk_list,
    grad_pooled, grad_weights, log_normaliser, delta, sums,
    private, first_slots, grad_keys, inputs_scratch, hidden_scratch, keys_scratch,
    item_rows, key_stride, num_lists, candidates, num_rows, groups, private_size,
    scale, weight_row, weight_candidate, weight_list,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr,
    BD: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, T: tl.constexpr,
    DEPTH: tl.constexpr, VECTORS: tl.constexpr, ACT: tl.constexpr, OUTER: tl.constexpr, SOFTMAX: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr, BATCH_STATISTICS: tl.constexpr, GATHER: tl.constexpr,
    MANY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. GATHER: −1, or the Dice layer whose two sums ``private`` [P, 2·H] shall receive."""
    PAD1: tl.constexpr = (H1 + B1 - 1) // B1 * B1
    PAD2: tl.constexpr = (H2 + B2 - 1) // B2 * B2
    PAD3: tl.constexpr = (H3 + B3 - 1) // B3 * B3
    TOP_H: tl.constexpr = H1 if DEPTH == 1 else (H2 if DEPTH == 2 else H3)
    TOP_B: tl.constexpr = B1 if DEPTH == 1 else (B2 if DEPTH == 2 else B3)
    TOP_PAD: tl.constexpr = PAD1 if DEPTH == 1 else (PAD2 if DEPTH == 2 else PAD3)
    BELOW_TOP: tl.constexpr = 0 if DEPTH == 1 else (H1 if DEPTH == 2 else H1 + H2)
    TOP_AT: tl.constexpr = T * (0 if DEPTH == 1 else (PAD1 if DEPTH == 2 else PAD1 + PAD2))
    COLUMNS: tl.constexpr = PAD1 + PAD2 + PAD3
    OUT_PARAMS: tl.constexpr = VECTORS * (H1 + H2 + H3)
    OUT: tl.constexpr = 2 * (H1 + H2 + H3)  # where the output layer begins in a row of ``private``
    W2: tl.constexpr = OUT + TOP_H + 1
    W3: tl.constexpr = W2 + H2 * H1
    SHARED: tl.constexpr = W3 + H3 * H2
    SLOT: tl.constexpr = (H1 * D if OUTER else D) + H1  # of a row of ``first_slots``, the last H1 columns are γ

    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    inputs = inputs_scratch + pid * (T * COLUMNS)
    hidden = hidden_scratch + pid * (2 * T * COLUMNS)
    dz_tiles = hidden + T * COLUMNS
    keys_sum = keys_scratch + pid * (T * D)
    private += pid * private_size
    per_group = (candidates + groups - 1) // groups
    lane = tl.arange(0, T)
    for work in range(pid, tl.load(chunk_offsets + num_lists) * groups, programs):
        chunk = work // groups
        group = work - chunk * groups
        s, number, _, begin, end = chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows)
        first_candidate = group * per_group
        end_candidate = tl.minimum(first_candidate + per_group, candidates)
        # An empty list has one tile without live rows: it writes the zeros.
        for row0 in range(begin, tl.maximum(end, begin + 1), T):
            started = row0 > begin
            rows = row0 + lane.to(tl.int64)  # row · stride may need more than 31 bits
            in_list = rows < end
            live = in_list
            if HAS_MASK:
                live = live & (tl.load(row_mask + rows, mask=live, other=0) != 0)
            for candidate in range(first_candidate, end_candidate):
                q = s * candidates + candidate
                slot = slot_of(s, number, chunk, candidate, candidates, num_lists)
                query_q = query + q * D
                offset_q = offset + q * H1
                first_q = first
                if OUTER:
                    first_q = first + q * (H1 * D)
                first_slot = first_slots + slot * SLOT
                offset_slot = first_slot + (SLOT - H1)
                grad_q = grad_pooled + q * D

                layers_below(DEPTH - 1, keys, rows, live, key_stride, query_q, offset_q, first_q, product, weight2,
                             weight3, param, hidden, inputs, chunk_offsets,
                             D, H1, H2, H3, BD, B1, B2, VECTORS, ACT, OUTER, PRECISION, True)  # fmt: skip
                origin = fresh_origin(chunk_offsets)
                t = origin + lane
                score = tl.zeros([T], tl.float32) + tl.load(param + OUT_PARAMS + TOP_H)
                for n0 in range(0, TOP_H, TOP_B):
                    n = n0 + origin + tl.arange(0, TOP_B)
                    z = layer(DEPTH - 1, keys, rows, live, key_stride, query_q, offset_q, first_q, product, weight2,
                              weight3, param, hidden, n, origin, D, H1, H2, H3, BD, B1, B2, VECTORS, OUTER,
                              PRECISION)  # fmt: skip
                    tl.store(inputs + TOP_AT + t[:, None] * TOP_PAD + n[None, :], z)
                    w = tl.load(param + OUT_PARAMS + n, mask=n < TOP_H, other=0.0)
                    score += tl.sum(activate(z, param + VECTORS * BELOW_TOP, n, TOP_H, ACT) * w[None, :], axis=1)

                origin = fresh_origin(chunk_offsets)
                ds = tl.zeros([T], tl.float32)  # ∂L/∂a first
                for d0 in range(0, D, BD):
                    d = d0 + origin + tl.arange(0, BD)
                    g = tl.load(grad_q + d, mask=d < D, other=0.0).to(tl.float32)
                    ds += tl.sum(load_rows(keys, rows, live, d, key_stride, D).to(tl.float32) * g[None, :], axis=1)
                if HAS_GRAD_WEIGHTS:
                    at = rows * weight_row + (candidate * weight_candidate + s * weight_list)
                    ds += tl.load(grad_weights + at, mask=live, other=0.0).to(tl.float32)
                a = score
                if SOFTMAX:
                    # Rows outside the list may overflow here; they are dropped below.
                    a = tl.exp(tl.where(live, score * scale - tl.load(log_normaliser + q), 0.0))
                    ds = scale * a * (ds - tl.load(delta + q))
                a = tl.where(live, a, 0.0)
                ds = tl.where(live, ds, 0.0)
                tl.debug_barrier()

                if GATHER < 0:
                    add_to(private + OUT + TOP_H + tl.arange(0, 1), tl.sum(ds[:, None], axis=0), tl.arange(0, 1) < 1)
                origin = fresh_origin(chunk_offsets)
                t = origin + lane
                for n0 in range(0, TOP_H, TOP_B):
                    n = n0 + origin + tl.arange(0, TOP_B)
                    z = tl.load(inputs + TOP_AT + t[:, None] * TOP_PAD + n[None, :])
                    w = tl.load(param + OUT_PARAMS + n, mask=n < TOP_H, other=0.0)
                    if GATHER < 0:
                        h = activate(z, param + VECTORS * BELOW_TOP, n, TOP_H, ACT)
                        add_to(private + OUT + n, tl.sum(ds[:, None] * h, axis=0), n < TOP_H)
                    through_activation(DEPTH - 1, GATHER, ds[:, None] * w[None, :], z, live, started, t, n,
                                       param + VECTORS * BELOW_TOP, sums + 2 * BELOW_TOP, private, offset_slot,
                                       dz_tiles + TOP_AT, TOP_H, TOP_B, BELOW_TOP, ACT, BATCH_STATISTICS)  # fmt: skip
                tl.debug_barrier()
                if (DEPTH > 2) and (GATHER < 2):
                    if GATHER < 0:
                        origin = fresh_origin(chunk_offsets)
                        weight_gradient(
                            dz_tiles + TOP_AT, hidden + T * PAD1, private + W3, origin, T, H3, B3, H2, B2, PRECISION
                        )
                    origin = fresh_origin(chunk_offsets)
                    t = origin + lane
                    for n0 in range(0, H2, B2):
                        n = n0 + origin + tl.arange(0, B2)
                        dh = through_weight(dz_tiles + TOP_AT, weight3, n, origin, T, H3, B3, H2, PRECISION)
                        z = tl.load(inputs + T * PAD1 + t[:, None] * PAD2 + n[None, :])
                        through_activation(1, GATHER, dh, z, live, started, t, n, param + VECTORS * H1, sums + 2 * H1,
                                           private, offset_slot, dz_tiles + T * PAD1, H2, B2, H1, ACT,
                                           BATCH_STATISTICS)  # fmt: skip
                    tl.debug_barrier()
                if (DEPTH > 1) and (GATHER < 1):
                    dz2 = dz_tiles + T * PAD1
                    if GATHER < 0:
                        origin = fresh_origin(chunk_offsets)
                        weight_gradient(dz2, hidden, private + W2, origin, T, H2, B2, H1, B1, PRECISION)
                    origin = fresh_origin(chunk_offsets)
                    t = origin + lane
                    for n0 in range(0, H1, B1):
                        n = n0 + origin + tl.arange(0, B1)
                        dh = through_weight(dz2, weight2, n, origin, T, H2, B2, H1, PRECISION)
                        z = tl.load(inputs + t[:, None] * PAD1 + n[None, :])
                        through_activation(0, GATHER, dh, z, live, started, t, n, param, sums, private, offset_slot,
                                           dz_tiles, H1, B1, 0, ACT, BATCH_STATISTICS)  # fmt: skip
                    tl.debug_barrier()
                if GATHER < 0:
                    origin = fresh_origin(chunk_offsets)
                    first_layer_gradients(keys, rows, live, key_stride, query_q, grad_q, first_q, product, a, dz_tiles,
                                          private + SHARED, first_slot, grad_keys + group * num_rows * D, keys_sum,
                                          started, candidate > first_candidate, candidate == end_candidate - 1, in_list,
                                          origin, D, H1, BD, B1, T, OUTER, MANY, PRECISION)  # fmt: skip
                    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_lists", "candidates", "width"])
def add_slots(
    slots, chunk_offsets, num_lists, candidates, width, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """slots [·, width]: add the extra slots of each query row to its first one, in the order of the chunks."""
    num_queries = tl.cast(num_lists, tl.int64) * candidates
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for q in range(tl.program_id(0).to(tl.int64), num_queries, tl.num_programs(0).to(tl.int64)):
        s = q // candidates
        before = tl.load(chunk_offsets + s)
        chunks = tl.load(chunk_offsets + s + 1) - before
        if chunks > 1:
            total = tl.zeros([BLOCK_K, BLOCK], tl.float32)
            for k0 in range(0, chunks, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                slot = slot_of(s, k, before + k, q - s * candidates, candidates, num_lists)
                inside = (k < chunks)[:, None] & (columns < width)[None, :]
                total += tl.load(slots + slot[:, None] * width + columns[None, :], mask=inside, other=0.0)
            result = tl.sum(total, axis=0)
            tl.debug_barrier()  # every thread has read the first slot before any writes it
            tl.store(slots + q * width + columns, result, mask=columns < width)


@triton.jit(do_not_specialize=["item_rows", "num_lists", "candidates", "weight_row", "weight_candidate", "weight_list"])
def weighted_gradients(
    weights, grad_weights, slots, starts, ends, row_mask, chunk_offsets, chunk_list,
    item_rows, num_lists, candidates, weight_row, weight_candidate, weight_list,
    T: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Σ a · ∂L/∂a over each item, into its slot [·]: softmax's backward takes it from every row of the list."""
    items = tl.load(chunk_offsets + num_lists) * candidates
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0).to(tl.int64)):
        chunk = item // candidates
        candidate = item - chunk * candidates
        s, number, _, begin, end = chunk_rows(starts, ends, chunk_offsets, chunk_list, chunk, item_rows)
        total = tl.zeros([T], tl.float32)
        for row0 in range(begin, end, T):
            rows = row0 + tl.arange(0, T).to(tl.int64)
            live = rows < end
            if HAS_MASK:
                live = live & (tl.load(row_mask + rows, mask=live, other=0) != 0)
            at = rows * weight_row + (candidate * weight_candidate + s * weight_list)
            a = tl.load(weights + at, mask=live, other=0.0).to(tl.float32)
            total += a * tl.load(grad_weights + at, mask=live, other=0.0).to(tl.float32)
        tl.store(slots + slot_of(s, number, chunk, candidate, candidates, num_lists), tl.sum(total, axis=0))
