"""How work is shared out: chunks of lists, and the packed kernels' slots, against plain Python."""

from __future__ import annotations

import pytest
import torch

from din_kernels.ops.local_activation import items, packed
from din_kernels.ops.local_activation.problem import UnitConfig, UnitTensors


def problem(
    lengths: torch.Tensor, candidates: int, index: torch.dtype, device: torch.device
) -> tuple[UnitConfig, UnitTensors]:
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(index).to(device)
    config = UnitConfig("product", "sigmoid", 1, (1,), candidates=candidates)
    query = torch.zeros(len(lengths) * candidates, 1, device=device)
    keys = torch.zeros(int(lengths.sum()), 1, device=device)
    return config, UnitTensors(query, keys, offsets[:-1], offsets[1:], None, [], [], [], [], [])


def random_lengths(lists: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(lists)
    lengths = torch.randint(0, 9, (lists,), generator=generator)
    if lists > 2:
        lengths[lists // 2] = 700
        lengths[-1] = 129
    return lengths


# One program, several that count for themselves, and so many that sums come first.
LISTS = (1, 5, 1023, 1024, 3000, 9 * 1024)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("lists", LISTS)
def test_chunks(lists, index, device, poison_scratch):
    lengths = random_lengths(lists)
    config, tensors = problem(lengths, 1, index, device)
    found = items.make_items(config, tensors, 64)
    assert (lists + 1 > items.FEW_BLOCKS * items.BLOCK) == (lists == LISTS[-1])
    want = [max(1, -(-int(length) // 64)) for length in lengths]
    offsets = torch.tensor([0, *want]).cumsum(0)
    assert found.chunk_offsets.cpu().tolist() == offsets.tolist()
    owners = torch.arange(lists).repeat_interleave(torch.tensor(want))
    assert found.bound >= len(owners)
    assert found.chunk_list[: len(owners)].cpu().tolist() == owners.tolist()


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("lists", LISTS[:-1])
def test_slots(lists, candidates, device, poison_scratch):
    lengths = random_lengths(lists)
    config, tensors = problem(lengths, candidates, torch.int64, device)
    tables = packed.make_tables(config, tensors)
    per_query = lengths.repeat_interleave(candidates)
    slots = per_query.clamp(min=packed.MIN_SLOTS)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), slots.cumsum(0)])
    queries = lists * candidates
    assert tables.first_slot[: queries + 1].cpu().tolist() == first.tolist()
    assert (tables.first_slot[queries + 1 : queries + 1 + packed.SEGMENTS] == packed.INT32).all()
    owner = torch.arange(queries).repeat_interleave(slots)
    place = torch.arange(len(owner)) - first[owner]
    real = place < per_query[owner]
    assert tables.slot_query[: len(owner)].cpu().tolist() == torch.where(real, owner, -1).tolist()
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(candidates)
    assert tables.slot_row[: len(owner)].cpu()[real].tolist() == (starts[owner] + place)[real].tolist()
    assert tables.tile_first[: -(-len(owner) // packed.TILE)].cpu().tolist() == owner[:: packed.TILE].tolist()


def test_sums_first(device, monkeypatch, poison_scratch):
    """The same tables where programs read sums instead of counting for themselves."""
    config, tensors = problem(random_lengths(3000), 1, torch.int64, device)
    counted = packed.make_tables(config, tensors)
    monkeypatch.setattr(packed, "FEW_BLOCKS", 0)
    summed = packed.make_tables(config, tensors)
    slots = int(counted.first_slot[3000])
    for name, used in (("first_slot", 3001), ("slot_query", slots), ("slot_row", slots)):
        assert torch.equal(getattr(counted, name)[:used], getattr(summed, name)[:used]), name
