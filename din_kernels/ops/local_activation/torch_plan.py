"""How the torch backend walks the rows: in chunks that stay in cache, never the whole batch at once.

Two walks exist. ``RowChunk``: consecutive packed rows, whatever list they are in (product interaction, one candidate).
``PieceGroup``: lists cut into pieces, sorted by length and padded a little within a group, so that each piece meets its
own first-layer matrix in one batched product (outer interaction, or many candidates).

The plans read lengths on the host. On a CPU that is free; on a GPU it is a synchronisation, which is why this backend is
the fallback there and not the default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import UnitConfig, UnitTensors

# Rows × candidates handled at once. The working set of a chunk (a handful of [rows, width] arrays) should fit the
# last-level cache share of a core. Narrow rows take twice as many: what a chunk costs besides its arithmetic then shows
# (D = 64 and 36 hidden units: 15 % of the time), while wide ones, and pieces that are padded within a chunk, lose by it.
CHUNK_PAIRS = 4096
NARROW = 128  # numbers of a row: its embedding and its hidden units
# Longer lists are cut, so that one list of 100,000 does not pad its neighbours.
PIECE_ROWS = 512


@dataclass(frozen=True)
class PackedRows:
    """The real behaviours, packed: ``rows`` [N] indexes keys (None: all rows, in order), ``offsets`` [S + 1] int64."""

    rows: Tensor | None
    offsets: Tensor
    count: int

    def gather(self, source: Tensor, first: int, last: int) -> Tensor:
        if self.rows is None:
            return source[first:last]
        return source.index_select(0, self.rows[first:last])


def pack_rows(config: UnitConfig, tensors: UnitTensors) -> PackedRows:
    starts, ends, mask = tensors.starts.long(), tensors.ends.long(), tensors.row_mask
    total = tensors.keys.shape[0]
    num_lists = starts.numel()
    if not config.padded_length and mask is None:
        return PackedRows(None, torch.cat([starts, ends[-1:]]) if num_lists else starts.new_zeros(1), total)
    if config.padded_length:
        position = torch.arange(config.padded_length, device=starts.device)
        real = position < (ends - starts).unsqueeze(1)
        if mask is not None:
            real = real & mask.view_as(real)
        lengths = real.sum(1)
        rows = real.view(-1).nonzero().squeeze(1)
    else:
        assert mask is not None
        rows = mask.nonzero().squeeze(1)
        before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        lengths = before[ends] - before[starts]
    offsets = torch.zeros(num_lists + 1, dtype=torch.int64, device=starts.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    count = rows.numel()
    return PackedRows(None if count == total else rows, offsets, count)


@dataclass(frozen=True)
class RowChunk:
    """Packed rows ``first … last − 1``; they touch the lists ``list_first … list_last − 1``.

    sample  [n] list of each row;  local_offsets [lists]: where each of those lists begins inside the chunk."""

    first: int
    last: int
    list_first: int
    list_last: int
    sample: Tensor
    local_offsets: Tensor


def row_chunks(config: UnitConfig, packed: PackedRows) -> list[RowChunk]:
    if packed.count == 0:
        return []
    pairs = CHUNK_PAIRS * (2 if config.embedding_dim + sum(config.hidden_units) <= NARROW else 1)
    offsets = packed.offsets
    lengths = offsets[1:] - offsets[:-1]
    sample = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=offsets.device), lengths, output_size=packed.count
    )
    firsts = list(range(0, packed.count, pairs))
    lasts = [min(f + pairs, packed.count) for f in firsts]
    border = torch.tensor(firsts + [last - 1 for last in lasts], device=offsets.device)
    lists = sample[border].tolist()
    chunks = []
    for i, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        low, high = lists[i], lists[len(firsts) + i] + 1
        local = (offsets[low:high] - first).clamp_(min=0)
        chunks.append(RowChunk(first, last, low, high, sample[first:last], local))
    return chunks


@dataclass(frozen=True)
class PieceGroup:
    """Pieces of about equal length, padded to P rows.

    sample  [p] list of each piece, or a slice when they are consecutive lists
    rows    [p, P] row of keys; padding repeats the piece's first row
    packed  [p, P] position among the packed rows; padding points one past the last, where callers keep a spare
    valid   [p, P] False at padding; None when nothing is padded
    first   first row of keys when the group's rows are consecutive in memory and whole, else None"""

    sample: Tensor | slice
    rows: Tensor
    packed: Tensor
    valid: Tensor | None
    first: int | None

    def writing_rows(self, spare: int) -> Tensor:
        """[p · P] row of keys to write; padding goes to row ``spare``."""
        rows = self.rows if self.valid is None else self.rows.masked_fill(~self.valid, spare)
        return rows.reshape(-1)

    def of_list(self, values: Tensor) -> Tensor:
        """The pieces' entries of something held per list [S, …]."""
        return values[self.sample] if isinstance(self.sample, slice) else values.index_select(0, self.sample)

    def add_to_list(self, target: Tensor, values: Tensor) -> None:
        """Add the pieces' values to what is held per list, in order."""
        if isinstance(self.sample, slice):
            target[self.sample] += values
        else:
            target.index_add_(0, self.sample, values)


def piece_groups(config: UnitConfig, packed: PackedRows) -> list[PieceGroup]:
    if packed.count == 0:
        return []
    device = packed.offsets.device
    lengths = packed.offsets[1:] - packed.offsets[:-1]
    per_list = torch.div(lengths + PIECE_ROWS - 1, PIECE_ROWS, rounding_mode="floor")
    num_pieces = int(per_list.sum())
    sample = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), per_list, output_size=num_pieces)
    before = torch.cumsum(per_list, 0) - per_list
    start = (torch.arange(num_pieces, device=device) - before[sample]) * PIECE_ROWS
    size = torch.minimum(lengths[sample] - start, torch.full_like(start, PIECE_ROWS))
    first = packed.offsets[sample] + start
    size, order = torch.sort(size, stable=True)
    sizes = size.tolist()
    # Lists of one length, none cut and none skipped, need no gathering at all.
    one_each = num_pieces == lengths.numel() and int(per_list.max()) == 1
    whole = packed.rows is None and one_each and sizes[0] == sizes[-1]
    sample, first = sample[order], first[order]

    groups = []
    low = 0
    while low < num_pieces:
        high = low + 1
        # Grow the group while the padded work stays within a chunk; sorted sizes make the last the widest.
        while high < num_pieces and (high + 1 - low) * sizes[high] * config.candidates <= CHUNK_PAIRS:
            high += 1
        width = sizes[high - 1]
        if whole:
            index = torch.arange(low * width, high * width, device=device).view(-1, width)
            groups.append(PieceGroup(slice(low, high), index, index, None, low * width))
            low = high
            continue
        position = torch.arange(width, device=device)
        begin = first[low:high].unsqueeze(1)
        index, inside = begin + position, None
        reading = index
        if sizes[low] < width:
            inside = position < size[low:high].unsqueeze(1)
            reading = torch.where(inside, index, begin)
            index = index.masked_fill(~inside, packed.count)
        rows = reading if packed.rows is None else packed.rows[reading]
        groups.append(PieceGroup(sample[low:high], rows, index, inside, None))
        low = high
    return groups
