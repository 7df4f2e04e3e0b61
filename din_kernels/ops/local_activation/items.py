"""Work items: lists cut into chunks of a few hundred rows, so that one list of 100,000 is shared out like any other
work.

List s becomes ``max(1, ⌈length / rows⌉)`` chunks, numbered through all lists; an empty list keeps one chunk, whose
program writes its zeros. There are at most S + ⌊R / rows⌋ chunks, a bound known from shapes alone, so nothing is read
back from the device. A chunk times a candidate is a work item: (query row, first row, last row).

What an item adds to its query row goes to *slot* q if its chunk is the first of its list, and otherwise to one of the
extra slots behind the Q first ones; extra slots of one list are C apart (``kernels_common.slot_of``). Lists of one
chunk, most lists of most batches, thus write their result in place, and only longer ones need their slots added up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._launch import launch, on_device
from . import kernels_items as kernels
from .problem import UnitConfig, UnitTensors

MAX_ITEM_ROWS = 512
BLOCK, BLOCK_SUMS = 1024, 128  # lists of a program that numbers chunks; sums it reads at a time
FEW_BLOCKS = 8


class Items(NamedTuple):
    """chunk_offsets [S + 1] int64: first chunk of each list, and their number; chunk_list [bound] int64: list of each
    chunk (what lies beyond the last is never read); rows: most rows of a chunk; bound: most chunks there can be;
    slots: Q + C · (most chunks that are not the first of their list)."""

    chunk_offsets: Tensor
    chunk_list: Tensor
    rows: int
    bound: int
    slots: int


def rows_per_item(config: UnitConfig, tensors: UnitTensors, *, tile: int, programs: int) -> int:
    """Rows of a chunk: a multiple of ``tile``, as many as still leave a few items to each program."""
    pairs = tensors.keys.shape[0] * config.candidates
    rows = tile
    while rows < MAX_ITEM_ROWS and rows * 2 * 2 * programs <= pairs:
        rows *= 2
    return rows


def make_items(config: UnitConfig, tensors: UnitTensors, rows: int) -> Items:
    device = tensors.keys.device
    lists, total = tensors.starts.numel(), tensors.keys.shape[0]
    queries = lists * config.candidates
    if config.padded_length and config.padded_length <= rows:
        # Every list is one chunk whatever its length.
        identity = torch.arange(lists + 1, device=device)
        return Items(identity, identity, rows, lists, queries)
    extra = total // rows
    if config.padded_length:
        extra = min(extra, lists * (-(-config.padded_length // rows) - 1))
    bound = lists + extra
    chunk_offsets = torch.empty(lists + 1, dtype=torch.int64, device=device)
    chunk_list = torch.empty(bound, dtype=torch.int64, device=device)
    blocks = -(-(lists + 1) // BLOCK)
    summed = blocks > FEW_BLOCKS
    operands = {
        "starts": tensors.starts, "ends": tensors.ends, "chunk_offsets": chunk_offsets, "chunk_list": chunk_list,
        "sums": torch.empty(blocks, dtype=torch.int64, device=device) if summed else chunk_offsets,
        "item_rows": rows, "num_lists": lists, "BLOCK": BLOCK, "BLOCK_SUMS": BLOCK_SUMS, "SUMMED": summed,
    }  # fmt: skip
    with on_device(tensors.keys):
        if summed:
            launch(kernels.sum_chunks, (blocks,), operands, num_warps=4)
        launch(kernels.make_chunks, (blocks,), operands, num_warps=4)
    return Items(chunk_offsets, chunk_list, rows, bound, queries + extra * config.candidates)
