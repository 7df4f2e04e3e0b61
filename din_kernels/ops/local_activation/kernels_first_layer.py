"""The first layer taken apart, and the gradient of its weight put together again: see factorise.py for the mathematics.

Each takes the place of six to ten operations on a few hundred kilobytes: copies of slices, casts, sums of slices.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["queries", "query_blocks"])
def take_apart(
    query, weight, bias, shared, rest, to_query, offset, queries, query_blocks,
    D: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """weight [H, D·(D + 2)] (outer) or [H, 4·D] (product) to

    shared    [H, D]: W_e, or W_k − W_d
    rest      [H, D, D]: W_o, or [H, D]: W_p
    to_query  [H, D]: W_v, or W_q + W_d

    and with the first ``query_blocks`` programs offset [Q, H] = query · to_queryᵀ + bias, in fp32; a program of the others
    takes BLOCK columns of a row.
    """
    COLUMNS: tl.constexpr = D * (D + 2) if OUTER else 4 * D
    OF_QUERY: tl.constexpr = D * (D + 1) if OUTER else 0
    program = tl.program_id(0)
    if program < query_blocks:
        q = program.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        for n0 in range(0, H, BLOCK_H):
            n = n0 + tl.arange(0, BLOCK_H)
            total = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                here = (q < queries)[:, None] & (d < D)[None, :]
                v = tl.load(query + q[:, None] * D + d[None, :], mask=here, other=0.0).to(tl.float32)
                inside = (d < D)[:, None] & (n < H)[None, :]
                at = weight + n[None, :] * COLUMNS + OF_QUERY + d[:, None]
                w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                if not OUTER:
                    w += tl.load(at + 2 * D, mask=inside, other=0.0).to(tl.float32)
                total = tl.dot(v, w, total, input_precision="ieee")
            if HAS_BIAS:
                total += tl.load(bias + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
            tl.store(offset + q[:, None] * H + n[None, :], total, mask=(q < queries)[:, None] & (n < H)[None, :])
    else:
        ACROSS: tl.constexpr = ((COLUMNS if OUTER else D) + BLOCK - 1) // BLOCK
        n = (program - query_blocks) // ACROSS
        c = (program - query_blocks) % ACROSS * BLOCK + tl.arange(0, BLOCK)
        row = weight + n * COLUMNS
        if OUTER:
            value = tl.load(row + c, mask=c < COLUMNS, other=0.0).to(tl.float32)
            tl.store(shared + n * D + c, value.to(shared.dtype.element_ty), mask=c < D)
            middle = (c >= D) & (c < OF_QUERY)
            tl.store(rest + n * (D * D) + c - D, value.to(rest.dtype.element_ty), mask=middle)
            last = (c >= OF_QUERY) & (c < COLUMNS)
            tl.store(to_query + n * D + c - OF_QUERY, value.to(to_query.dtype.element_ty), mask=last)
        else:
            of_query = tl.load(row + c, mask=c < D, other=0.0).to(tl.float32)
            of_key = tl.load(row + D + c, mask=c < D, other=0.0).to(tl.float32)
            of_difference = tl.load(row + 2 * D + c, mask=c < D, other=0.0).to(tl.float32)
            of_product = tl.load(row + 3 * D + c, mask=c < D, other=0.0)
            at = n * D + c
            tl.store(shared + at, (of_key - of_difference).to(shared.dtype.element_ty), mask=c < D)
            tl.store(rest + at, of_product.to(rest.dtype.element_ty), mask=c < D)
            tl.store(to_query + at, (of_query + of_difference).to(to_query.dtype.element_ty), mask=c < D)


@triton.jit
def put_together(
    products, sums, weight, bias, D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Outer interaction. products [H·D + H, D]: Σ_q G_q v_qᵀ by its rows (h, i), then Σ_q γ_q v_qᵀ; sums [H·D + H]: Σ_q G_q,
    then Σ_q γ_q. To the gradients weight [H, D·(D + 2)] and bias [H]. A program takes BLOCK columns of a row."""
    COLUMNS: tl.constexpr = D * (D + 2)
    OF_QUERY: tl.constexpr = D * (D + 1)
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(sums + n * D + c, mask=c < D, other=0.0)
    middle = tl.load(products + n * (D * D) + c - D, mask=(c >= D) & (c < OF_QUERY), other=0.0)
    last = tl.load(products + (H * D + n) * D + c - OF_QUERY, mask=(c >= OF_QUERY) & (c < COLUMNS), other=0.0)
    value = tl.where(c < D, first, tl.where(c < OF_QUERY, middle, last))
    tl.store(weight + n * COLUMNS + c, value.to(weight.dtype.element_ty), mask=c < COLUMNS)
    if HAS_BIAS:
        total = tl.load(sums + H * D + n)
        tl.store(bias + n, total.to(bias.dtype.element_ty), mask=tl.program_id(1) == 0)
