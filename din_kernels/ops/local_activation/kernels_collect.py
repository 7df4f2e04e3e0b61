"""Packed backward, the last two steps: from sums per list and per program to the gradients of query and parameters.

``finish_queries``: with γ = Σ dz1 of each query row, dv = (W_q + W_d)ᵀ γ + Σ (dz1 W_p) ∘ e, and per program Σ γ vᵀ and Σ γ,
which the first layer's weight and bias take. ``finish_gradients``: sums over programs, each written where its parameter wants
it, in its dtype. Everything before the last rounding is fp32, in an order that shapes alone decide.
"""

import triton
import triton.language as tl

BLOCK_PARTS = tl.constexpr(16)


@triton.jit(do_not_specialize=["queries"])
def finish_queries(
    list_sums, query, weight1, grad_query, weight_parts, bias_parts, queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """list_sums [Q, D + H] holds [Σ (dz1 W_p) ∘ e, γ]. Program (p, i): every P-th block of query rows, block i of columns; it
    leaves weight_parts [P, H, D] and, with i = 0, bias_parts [P, H]."""
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_H)
    inside = (n < H)[:, None] & (d < D)[None, :]
    at_weight = weight1 + n[:, None] * (4 * D) + d[None, :]
    to_query = tl.load(at_weight, mask=inside, other=0.0).to(tl.float32)
    to_query += tl.load(at_weight + 2 * D, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    of_bias = tl.zeros([BLOCK_H], tl.float32)
    for block in range(tl.program_id(0), (queries + BLOCK_Q - 1) // BLOCK_Q, tl.num_programs(0)):
        q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        row = q.to(tl.int64)[:, None] * (D + H)
        here = (q < queries)[:, None]
        gamma = tl.load(list_sums + row + D + n[None, :], mask=here & (n < H)[None, :], other=0.0)
        columns = here & (d < D)[None, :]
        at = q.to(tl.int64)[:, None] * D + d[None, :]
        v = tl.load(query + at, mask=columns, other=0.0).to(tl.float32)
        of_weight = tl.dot(tl.trans(gamma), v, of_weight, input_precision=PRECISION)
        of_bias += tl.sum(gamma, axis=0)
        through = tl.load(list_sums + row + d[None, :], mask=columns, other=0.0)
        through = tl.dot(gamma, to_query, through, input_precision=PRECISION)
        tl.store(grad_query + at, through.to(grad_query.dtype.element_ty), mask=columns)
    part = tl.program_id(0).to(tl.int64)
    tl.store(weight_parts + part * (H * D) + n[:, None] * D + d[None, :], of_weight, mask=inside)
    tl.store(bias_parts + part * H + n, of_bias, mask=(n < H) & (tl.program_id(1) == 0))


@triton.jit
def _total(parts, number, stride, at, wanted, BLOCK: tl.constexpr):
    """Σ over ``number`` parts, ``stride`` elements apart, of elements ``at`` [BLOCK]."""
    total = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for start in range(0, number, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        here = (part < number)[:, None] & wanted[None, :]
        total += tl.load(parts + part.to(tl.int64)[:, None] * stride + at[None, :], mask=here, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _store(target, at, value, wanted):
    tl.store(target + at, value.to(target.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["programs", "query_programs", "unscale"])
def finish_gradients(
    first_sums, second_sums, second_vectors, vectors, weight_parts, bias_parts,
    weight1, bias1, weight2, bias2, weight_out, bias_out, alpha1, alpha2, programs, query_programs, unscale,
    D: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, BLOCK: tl.constexpr, BIASES: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
):  # fmt: skip
    """first_sums [P, 2, H1, D] (Σ dz1 eᵀ, Σ dz1 (v∘e)ᵀ), second_sums [P, H2, H1], second_vectors [P, H2] and vectors
    [P, H_top + 1 (+ H1 + H2)] of ``programs``, weight_parts and bias_parts of ``query_programs``, to the gradients
    weight1 … alpha2. ``unscale``: what the second layer's sums are multiplied by. A program takes BLOCK elements: first those
    of W1 by its rows, then of W2, then of the vectors."""
    OUT_BIAS: tl.constexpr = 4 if H2 > 0 else 2
    TOP: tl.constexpr = H2 if H2 > 0 else H1
    WIDTH: tl.constexpr = TOP + 1 + (H1 + H2 if HAS_ALPHA else 0)
    ACROSS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    OF_FIRST: tl.constexpr = H1 * ACROSS
    OF_SECOND: tl.constexpr = (H2 * H1 + BLOCK - 1) // BLOCK
    lane = tl.arange(0, BLOCK)
    block = tl.program_id(0)
    if block < OF_FIRST:
        n = block // ACROSS
        d = (block % ACROSS) * BLOCK + lane
        wanted = d < D
        at = n * D + d
        of_query = _total(weight_parts, query_programs, H1 * D, at, wanted, BLOCK)
        shared = _total(first_sums, programs, 2 * H1 * D, at, wanted, BLOCK)
        of_product = _total(first_sums, programs, 2 * H1 * D, H1 * D + at, wanted, BLOCK)
        to = n * (4 * D) + d
        _store(weight1, to, of_query, wanted)
        _store(weight1, to + D, shared, wanted)
        _store(weight1, to + 2 * D, of_query - shared, wanted)
        _store(weight1, to + 3 * D, of_product, wanted)
    elif block < OF_FIRST + OF_SECOND:
        at = (block - OF_FIRST) * BLOCK + lane
        wanted = at < H2 * H1
        _store(weight2, at, _total(second_sums, programs, H2 * H1, at, wanted, BLOCK) * unscale, wanted)
    else:
        at = (block - OF_FIRST - OF_SECOND) * BLOCK + lane
        total = _total(vectors, programs, WIDTH, at, at < WIDTH, BLOCK)
        _store(weight_out, at, total, at < TOP)
        if BIASES & OUT_BIAS:
            _store(bias_out, at - TOP, total, at == TOP)
        if HAS_ALPHA:
            n = at - TOP - 1
            _store(alpha1, n, total, (n >= 0) & (n < H1))
            if H2 > 0:
                _store(alpha2, n - H1, total, (n >= H1) & (n < H1 + H2))
        if BIASES & 1:
            _store(bias1, at, _total(bias_parts, query_programs, H1, at, at < H1, BLOCK), at < H1)
        if H2 > 0:
            if BIASES & 2:
                _store(bias2, at, _total(second_vectors, programs, H2, at, at < H2, BLOCK) * unscale, at < H2)
