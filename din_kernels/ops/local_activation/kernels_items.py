"""Work items (see items.py): how many chunks each list has, where they begin, and whose each chunk is."""

import triton
import triton.language as tl

from .kernels_common import sum_of_first


@triton.jit
def _chunks(starts, ends, s, item_rows, num_lists):
    """Chunks of lists ``s``, 0 beyond the last one."""
    inside = s < num_lists
    length = tl.load(ends + s, mask=inside, other=0).to(tl.int64) - tl.load(starts + s, mask=inside, other=0).to(
        tl.int64
    )
    return tl.where(inside, tl.maximum((length + item_rows - 1) // item_rows, 1), 0)


@triton.jit(do_not_specialize=["item_rows", "num_lists"])
def sum_chunks(starts, ends, sums, item_rows, num_lists, BLOCK: tl.constexpr):
    """sums[i] = chunks of the i-th BLOCK of lists."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(_chunks(starts, ends, s, item_rows, num_lists), axis=0))


@triton.jit(do_not_specialize=["item_rows", "num_lists"])
def make_chunks(
    starts, ends, sums, chunk_offsets, chunk_list, item_rows, num_lists,
    BLOCK: tl.constexpr, BLOCK_SUMS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """chunk_offsets and chunk_list, one BLOCK of lists a program. SUMMED: after ``sum_chunks``; otherwise a program counts the
    chunks of all lists before its own, which for a few blocks takes less than another launch."""
    block = tl.program_id(0)
    if SUMMED:
        before = sum_of_first(sums, block, BLOCK_SUMS)
    else:
        earlier = tl.zeros([BLOCK], tl.int64)
        for i in range(0, block):
            earlier += _chunks(starts, ends, i * BLOCK + tl.arange(0, BLOCK), item_rows, num_lists)
        before = tl.sum(earlier, axis=0)
    s = block * BLOCK + tl.arange(0, BLOCK)
    chunks = _chunks(starts, ends, s, item_rows, num_lists)
    end = before + tl.cumsum(chunks, axis=0)
    begin = end - chunks
    tl.store(
        chunk_offsets + s, begin, mask=s <= num_lists
    )  # behind the last list, where sums stand still: their number
    for i in range(0, tl.max(chunks, axis=0)):
        tl.store(chunk_list + begin + i, s.to(tl.int64), mask=i < chunks)
