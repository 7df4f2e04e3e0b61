"""Packed kernels: the tables of slots (see kernels_packed_common.py), in three steps that need nothing from the host.

``sum_slots`` adds up blocks of query rows, ``make_tables`` places each query row, ``fill_slots`` looks up every slot.
"""

import triton
import triton.language as tl

from .kernels_common import sum_of_first
from .kernels_packed_common import INT_MAX, MIN_SLOTS, SEGMENTS, TILE


@triton.jit
def _slots(starts, ends, q, candidates, queries):
    """(first row, length, slots) of query rows ``q``, all 0 beyond the last one."""
    inside = q < queries
    s = q // candidates
    start = tl.load(starts + s, mask=inside, other=0).to(tl.int32)
    length = tl.load(ends + s, mask=inside, other=0).to(tl.int32) - start
    return start, length, tl.where(inside, tl.maximum(length, MIN_SLOTS), 0)


@triton.jit(do_not_specialize=["candidates", "queries"])
def sum_slots(starts, ends, sums, candidates, queries, BLOCK: tl.constexpr):
    """sums[i] = slots of the i-th BLOCK of query rows."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, _, slots = _slots(starts, ends, q, candidates, queries)
    tl.store(sums + tl.program_id(0), tl.sum(slots, axis=0))


@triton.jit(do_not_specialize=["candidates", "queries"])
def make_tables(starts, ends, sums, first_slot, tile_first, candidates, queries, BLOCK: tl.constexpr,
                BLOCK_SUMS: tl.constexpr, SUMMED: tl.constexpr):  # fmt: skip
    """The tables, one BLOCK of query rows a program. SUMMED: after ``sum_slots``; otherwise a program adds up all query rows
    before its own, which for a few blocks takes less than another launch."""
    block = tl.program_id(0)
    if SUMMED:
        before = sum_of_first(sums, block, BLOCK_SUMS)
    else:
        earlier = tl.zeros([BLOCK], tl.int32)
        for i in range(0, block):
            earlier += _slots(starts, ends, i * BLOCK + tl.arange(0, BLOCK), candidates, queries)[2]
        before = tl.sum(earlier, axis=0)
    q = block * BLOCK + tl.arange(0, BLOCK)
    inside = q < queries
    _, _, slots = _slots(starts, ends, q, candidates, queries)
    end = before + tl.cumsum(slots, axis=0)
    begin = end - slots
    # Behind the last query row: the number of slots, for which the sums above stand still, then INT_MAX.
    tl.store(first_slot + q, tl.where(q > queries, INT_MAX, begin), mask=q < queries + 1 + SEGMENTS)
    tile = (begin + TILE - 1) // TILE
    # One entry more behind the last tile, as each tile looks at the next.
    last = tl.where(inside, (end + TILE - 1) // TILE, tl.where(q == queries, tile + 1, 0))
    for i in range(0, tl.max(last - tile, axis=0)):
        tl.store(tile_first + tile + i, q, mask=tile + i < last)


@triton.jit(do_not_specialize=["candidates", "queries"])
def fill_slots(starts, ends, first_slot, tile_first, slot_query, slot_row, candidates, queries):
    """slot_query and slot_row, one tile a program at a time."""
    lane = tl.arange(0, TILE)
    segment = tl.arange(0, SEGMENTS)
    num_slots = tl.load(first_slot + queries)
    for tile in range(tl.program_id(0), (num_slots + TILE - 1) // TILE, tl.num_programs(0)):
        first = tl.load(tile_first + tile)
        slot = tile * TILE + lane
        begins = tl.load(first_slot + first + 1 + segment)  # of the query rows that follow
        q = first + tl.sum((slot[:, None] >= begins[None, :]).to(tl.int32), axis=1)
        start, length, _ = _slots(starts, ends, q, candidates, queries)
        place = slot - tl.load(first_slot + q)
        tl.store(slot_query + slot, tl.where(place < length, q, -1))
        tl.store(slot_row + slot, start + place)
