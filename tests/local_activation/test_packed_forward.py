"""Packed kernels, forward: values against the float64 reference, and what is special about tiles that cross lists."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import din_kernels
from din_kernels.ops.local_activation import packed, triton_impl
from din_kernels.testing import jagged_lengths, widths
from tests.support.memory_monitor import memory_monitor

from ._cases import Case, Spec, check_outputs, make_case
from .test_universal_forward import SETTINGS

pytest.importorskip("triton")


@st.composite
def packed_specs(draw, max_batch: int = 5) -> Spec:
    """What the packed kernels can be asked for. ``fits`` is about registers, so float32 is welcome here."""
    return Spec(
        lengths=tuple(draw(jagged_lengths(max_batch, 20, tile=64, long=200))),
        dim=draw(widths(40)),
        hidden=tuple(draw(st.lists(widths(48), min_size=1, max_size=2))),
        activation=draw(st.sampled_from(("dice", "prelu", "sigmoid", "relu"))),
        layout=draw(st.sampled_from(("jagged", "padded"))),
        candidates=draw(st.sampled_from((1, 1, 3))),
        softmax=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 0.25))),
        bias=draw(st.booleans()),
        per_channel=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))),
        index_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        seed=draw(st.integers(0, 99)),
        wide_rows=draw(st.booleans()),
    )


def run_forward(case: Case, *, return_weights: bool = True):
    if not case.tensors.query.shape[0] or not case.tensors.keys.shape[0]:
        assert not packed.serves(case.config, case.tensors)
        return triton_impl.forward(case.config, case.tensors, return_weights=return_weights)
    return packed.forward(case.config, case.tensors, return_weights=return_weights)


@settings(SETTINGS, max_examples=40)
@given(packed_specs())
def test_outputs(device, poison_scratch, spec):
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))


SHAPES = [
    Spec(lengths=(70, 0, 3), dim=64, hidden=(36,)),
    Spec(lengths=(70, 0, 3), dim=64, hidden=(80, 40), activation="dice", softmax=True),
    Spec(lengths=(9, 60), dim=128, hidden=(80, 40), dtype=torch.bfloat16),
    Spec(lengths=(9, 60), dim=36, hidden=(36,), activation="prelu", dtype=torch.float16),
    Spec(lengths=(40,), dim=96, hidden=(64, 16), activation="relu", softmax=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("spec", SHAPES, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_common_shapes(device, poison_scratch, spec):
    """Widths in two blocks, the embedding too; no blocks that pad 80 to 128."""
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))


@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_older_gpus(device, poison_scratch, monkeypatch, activation):
    """Biases by copies into the accumulators instead of products."""
    monkeypatch.setattr(packed, "capability_of", lambda device: 80)
    case = make_case(Spec((9, 60), 20, (20, 40), activation=activation, dtype=torch.bfloat16), device)
    check_outputs(case, run_forward(case))


def test_biases_keep_their_precision(device):
    """Of a bias of 16 bits, multiplied by log₂ e, one term of 16 bits would be wrong by 2 % of the sigmoid here."""
    unit = din_kernels.LocalActivationUnit(16, (16,), "sigmoid", "product", backend="triton")
    unit = unit.to(device, torch.bfloat16)
    with torch.no_grad():
        unit.linears[0].bias.fill_(-8.25)
        unit.linears[1].weight.fill_(1.0)
        unit.linears[1].bias.zero_()
        rows = torch.zeros(5, 16, dtype=torch.bfloat16, device=device)
        _, weights = unit(rows[:1], rows, offsets=torch.tensor([0, 5], device=device), return_weights=True)
    expected = torch.full((5,), 16 * torch.sigmoid(torch.tensor(-8.25)).item(), device=device)
    torch.testing.assert_close(weights.float().flatten(), expected, rtol=4e-3, atol=0)


BORDERS = {
    "many lists in a tile": (1,) * 40 + (2, 5) * 6,
    "all empty": (0,) * 30,
    "empty lists around a full tile": (0, 0, 64, 0, 0, 64, 0),
    "a list ends where a tile does": (59, 5, 64, 5, 59, 1),
    "a list of one tile and a bit": (65, 63, 1),
    "a list through many tiles": (3, 0, 1500, 5, 0, 700),
    "one behaviour": (1,),
}


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("lengths", BORDERS.values(), ids=BORDERS.keys())
def test_borders(device, poison_scratch, lengths, softmax):
    spec = Spec(lengths, 8, (9,), softmax=softmax, scale=2.0, layout="padded" if not any(lengths) else "jagged")
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))


@pytest.mark.parametrize("lengths", [(5,) * 40 + (100_000,) + (5,) * 40, (0,) * 3000 + (130,), (1,) * 2100])
def test_tables(device, lengths):
    """Every behaviour has one slot, in order; a tile meets at most SEGMENTS lists; no list is without a slot."""
    case = make_case(Spec((2,), 4, (4,)), device)
    length = torch.tensor(lengths)
    ends = length.cumsum(0)
    tensors = case.tensors._replace(
        query=torch.zeros(len(lengths), 4, device=device), keys=torch.zeros(int(ends[-1]), 4, device=device),
        starts=(ends - length).to(device), ends=ends.to(device),
    )  # fmt: skip
    tables = packed.make_tables(case.config, tensors)
    slots = length.clamp(min=packed.MIN_SLOTS)
    first_slot = torch.cat([torch.zeros(1, dtype=torch.int64), slots.cumsum(0)])
    total = int(first_slot[-1])
    assert torch.equal(tables.first_slot[: len(lengths) + 1].cpu().long(), first_slot)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), slots)
    place = torch.arange(total) - first_slot[owner]
    live = place < length[owner]
    slot_query, slot_row = (t[:total].cpu().long() for t in (tables.slot_query, tables.slot_row))
    assert torch.equal(slot_query, torch.where(live, owner, -1))
    assert torch.equal(slot_row[live], torch.arange(int(ends[-1])))
    tiles = -(-total // packed.TILE)
    assert tiles <= tables.tiles
    firsts = tables.tile_first[: tiles + 1].cpu().long()
    assert torch.equal(firsts[:-1], owner[:: packed.TILE])
    assert int(firsts[-1]) == len(lengths)
    lasts = owner[torch.arange(tiles).mul(packed.TILE).add(packed.TILE - 1).clamp(max=total - 1)]
    assert int((lasts - firsts[:-1]).max()) < packed.SEGMENTS


def test_blocks_of_widths():
    assert [packed.split(n) for n in (1, 16, 17, 36, 40, 48, 64, 80, 100)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (32, 16), (32, 16), (64, 0), (64, 16), (128, 0),
    ]  # fmt: skip
    for width in range(1, 257):
        block, rest = packed.split(width)
        assert width <= block + rest
        assert rest == 0 or 16 <= rest < block < width


SPREAD = [
    Spec(lengths=(3, 0, 70, 1), dim=5, hidden=(9,), softmax=True, activation="prelu"),
    Spec(lengths=(40, 2), dim=36, hidden=(36, 6), layout="padded", candidates=2, index_dtype=torch.int32),
    Spec(lengths=(1, 135), dim=16, hidden=(8,), activation="dice", softmax=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("spec", SPREAD, ids=lambda s: f"{s.layout}-{s.activation}")
def test_memory(spec):
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    case = make_case(spec)
    expected = run_forward(case)
    for order in (None, "reverse", 3):
        with memory_monitor(order=order) as monitor:
            found = run_forward(case)
        kernel = "forward_packed_fp32" if spec.dtype == torch.float32 else "forward_packed"
        assert {"make_tables", kernel, "finish_packed"} <= set(monitor.kernels())
        for one, other in zip(expected, found, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_each_behaviour_is_read_once():
    """Keys are loaded once, without their padding, whatever lists a tile meets."""
    spec = Spec(lengths=(30, 0, 100, 7), dim=16, hidden=(16,), layout="padded", dtype=torch.bfloat16)
    case = make_case(spec)
    with memory_monitor() as monitor:
        run_forward(case, return_weights=False)
    loads = monitor.traffic("forward_packed", "keys").loads
    assert loads.unique == sum(spec.lengths) * spec.dim * 2


def test_dispatch(device, monkeypatch):
    """Calls of the product interaction go here; masks and outer products to the tiled kernels, and three layers, wide
    embeddings and wide layers of fp32 to the universal ones."""
    taken = []
    monkeypatch.setattr(triton_impl.tiled, "forward", lambda *a, **k: taken.append("tiled"))
    monkeypatch.setattr(packed, "forward", lambda *a, **k: taken.append("packed"))
    monkeypatch.setattr(triton_impl.universal, "forward", lambda *a, **k: taken.append("universal"))
    served = Spec(dtype=torch.bfloat16)
    for spec, path in [
        (served, "packed"),
        (dataclasses.replace(served, layout="padded", softmax=True, activation="dice", hidden=(80, 40)), "packed"),
        (dataclasses.replace(served, layout="mask"), "tiled"),
        (dataclasses.replace(served, interaction="outer"), "tiled"),
        (dataclasses.replace(served, hidden=(8, 8, 8)), "universal"),
        (dataclasses.replace(served, dim=136), "universal"),
        (dataclasses.replace(served, dtype=torch.float32), "packed"),
        (dataclasses.replace(served, dtype=torch.float32, hidden=(80, 40)), "universal"),
    ]:
        case = make_case(spec, device)
        triton_impl.forward(case.config, case.tensors, return_weights=False)
        assert taken.pop() == path, spec


def test_a_wrong_kernel_is_caught(device, monkeypatch):
    """The comparison fails when sums that cross tiles are not added up, and when the wrong activation runs."""
    from din_kernels.ops.local_activation import kernels_packed_forward as kernels

    case = make_case(Spec(lengths=(7, 100), dim=16, hidden=(16, 16), activation="relu"), device)
    check_outputs(case, run_forward(case))

    class Nothing:
        arg_names = kernels.finish_packed.arg_names

        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    with monkeypatch.context() as context:
        context.setattr(kernels, "finish_packed", Nothing())
        with pytest.raises(AssertionError, match="pooled"):
            check_outputs(case, run_forward(case))
    monkeypatch.setitem(packed.ACTIVATION_CODES, "relu", packed.ACTIVATION_CODES["sigmoid"])
    with pytest.raises(AssertionError, match="pooled"):
        check_outputs(case, run_forward(case))
