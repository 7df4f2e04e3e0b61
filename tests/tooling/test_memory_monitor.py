"""The monitor must pass right kernels, name what wrong ones do, and count bytes exactly."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from tests.support.memory_monitor import AtomicUsed, OutOfBounds, Race, memory_monitor

from . import kernels_toy as toy

BLOCK = 16


def launch(kernel, n=40, out_size=None, **constexprs):
    x = torch.arange(n, dtype=torch.float32)
    out = torch.zeros(n if out_size is None else out_size)
    kernel[(-(-n // BLOCK),)](x, out, n, BLOCK=BLOCK, **constexprs)
    return x, out


def test_right_kernel_passes_and_its_bytes_are_exact():
    with memory_monitor() as monitor:
        x, out = launch(toy.scale_rows)
    torch.testing.assert_close(out, x * 2)
    assert monitor.kernels() == ["scale_rows"]
    assert monitor.launches[0].grid == (3, 1, 1)
    loads = monitor.traffic("scale_rows", "x_ptr").loads
    assert (loads.requested, loads.per_program, loads.unique) == (160, 160, 160)
    assert 160 <= loads.sectors <= 192
    stores = monitor.traffic(tensor="out_ptr").stores
    assert (stores.requested, stores.unique) == (160, 160)
    assert monitor.traffic(tensor="out_ptr").loads.requested == 0
    assert monitor.bytes_moved() == 320
    assert "scale_rows.x_ptr" in monitor.table()


@pytest.mark.parametrize("kernel", [toy.off_by_one, toy.unmasked_tail, toy.below_the_start, toy.wrong_in_helper])
def test_out_of_bounds_is_caught_before_memory_is_touched(kernel):
    with memory_monitor(), pytest.raises(OutOfBounds, match=rf"kernel {kernel.__name__}, program \(\d, 0, 0\)"):
        launch(kernel)


def test_the_message_says_what_where_and_how_many():
    with memory_monitor(), pytest.raises(OutOfBounds) as caught:
        launch(toy.off_by_one)
    text = str(caught.value)
    assert "program (2, 0, 0) of grid (3, 1, 1)" in text
    assert "load of 'x_ptr' at byte 160, element 40" in text
    assert "1 of 9 unmasked lanes" in text


def test_a_pointer_that_walks_into_another_live_tensor_is_caught():
    """Both halves of one allocation are arguments, so the address itself is valid; only its origin tells."""
    buffer = torch.zeros(80)
    x, out = buffer[:40], buffer[40:]
    with memory_monitor(), pytest.raises(OutOfBounds, match="load of 'x_ptr'"):
        toy.off_by_one[(3,)](x, out, 40, BLOCK=BLOCK)


def test_gaps_of_a_strided_view_do_not_belong_to_it():
    wide = torch.ones(5, 24)
    view, out = wide[:, :10], torch.zeros(5)
    with memory_monitor() as monitor:
        toy.row_sums[(5,)](view, out, 5, 10, view.stride(0), BLOCK=BLOCK)
    torch.testing.assert_close(out, torch.full((5,), 10.0))
    assert monitor.traffic(tensor="x_ptr").loads.unique == 5 * 10 * 4
    with memory_monitor(), pytest.raises(OutOfBounds, match="element 10"):
        toy.row_sums[(5,)](view, out, 5, 11, view.stride(0), BLOCK=BLOCK)


def test_an_expanded_tensor_counts_its_bytes_once():
    x, out = torch.ones(10).expand(5, 10), torch.zeros(5)
    with memory_monitor() as monitor:
        toy.row_sums[(5,)](x, out, 5, 10, 0, BLOCK=BLOCK)
    loads = monitor.traffic(tensor="x_ptr").loads
    assert (loads.requested, loads.per_program, loads.unique) == (200, 200, 40)


def test_an_empty_tensor_may_not_be_read():
    with memory_monitor(), pytest.raises(OutOfBounds):
        toy.prefix_chain[(1,)](torch.empty(0), torch.zeros(1), 0, BLOCK=BLOCK)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (toy.racing_store, "writes where program 0 of the same launch also wrote"),
        (toy.shift_in_place, "writes what program 0"),
        (toy.prefix_chain, "reads what program 0 of the same launch wrote"),
    ],
)
def test_races_between_programs_are_caught(kernel, message):
    with memory_monitor(), pytest.raises(Race, match=message):
        launch(kernel)


def test_aliased_arguments_race_too():
    """In place under another name: the same memory, two arguments."""
    x = torch.zeros(40)
    with memory_monitor() as monitor:
        toy.scale_rows[(3,)](x, x, 40, BLOCK=BLOCK)  # each program its own block: no conflict
    assert monitor.errors == []
    with memory_monitor(), pytest.raises(Race, match="reads what program 0"):
        toy.scale_rows[(3,)](x[:-1], x[1:], 39, BLOCK=BLOCK)


def test_lanes_that_disagree_about_one_address_are_caught():
    with memory_monitor(), pytest.raises(Race, match="two different values"):
        toy.disagreeing_lanes[(1,)](torch.arange(16.0), torch.zeros(8), 16, BLOCK=BLOCK)
    with memory_monitor() as monitor:  # the same value from every lane is harmless
        toy.disagreeing_lanes[(1,)](torch.ones(16), torch.zeros(8), 16, BLOCK=BLOCK)
    assert monitor.errors == []


def test_reading_back_needs_a_barrier():
    with memory_monitor(), pytest.raises(Race, match="no barrier between"):
        toy.read_back[(1,)](torch.arange(16.0), torch.zeros(16), 16, BLOCK=BLOCK, BARRIER=False)
    with memory_monitor(same_program=False):
        toy.read_back[(1,)](torch.arange(16.0), torch.zeros(16), 16, BLOCK=BLOCK, BARRIER=False)
    with memory_monitor() as monitor:
        toy.read_back[(1,)](torch.arange(16.0), torch.zeros(16), 16, BLOCK=BLOCK, BARRIER=True)
    assert monitor.errors == []


def test_atomics_are_refused_unless_allowed():
    with memory_monitor(), pytest.raises(AtomicUsed, match="atomic on 'out_ptr'"):
        launch(toy.atomic_sum, out_size=1)
    with memory_monitor(atomics=True) as monitor:
        _, out = launch(toy.atomic_sum, out_size=1)
    assert out.item() == sum(range(40))
    assert monitor.launches[0].atomics == 3


@pytest.mark.parametrize("order", ["reverse", 3])
def test_another_order_of_programs_shows_what_depends_on_it(order):
    with memory_monitor(order=order):
        x, out = launch(toy.scale_rows)
    torch.testing.assert_close(out, x * 2)
    x = torch.ones(8)
    in_order, shuffled = torch.zeros(8), torch.zeros(8)
    with memory_monitor(races=False):
        toy.prefix_chain[(8,)](x, in_order, 8, BLOCK=BLOCK)
    with memory_monitor(races=False, order=order):
        toy.prefix_chain[(8,)](x, shuffled, 8, BLOCK=BLOCK)
    torch.testing.assert_close(in_order, torch.arange(1.0, 9.0))
    assert not torch.equal(in_order, shuffled)


def test_repeated_reads_are_told_apart():
    with memory_monitor() as monitor:
        launch(toy.copy_twice, n=48)
    loads = monitor.traffic("copy_twice", "x_ptr").loads
    assert loads.unique == 48 * 4  # the bus
    assert loads.per_program == 3 * 48 * 4  # three programs read all of it; the second read of a block is their own
    assert loads.requested == 3 * (48 + 16) * 4


def test_collecting_mode_carries_on_safely():
    with memory_monitor(raise_errors=False) as monitor:
        x, out = launch(toy.unmasked_tail)
    assert len(monitor.errors) == 1
    assert isinstance(monitor.errors[0], OutOfBounds)
    torch.testing.assert_close(out, x * 2)


def test_hooks_are_removed():
    with pytest.raises(RuntimeError, match="stop"), memory_monitor():
        raise RuntimeError("stop")
    x, out = launch(toy.scale_rows)
    torch.testing.assert_close(out, x * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_item_sizes(dtype):
    x, out = torch.ones(40, dtype=dtype), torch.zeros(40, dtype=dtype)
    with memory_monitor() as monitor:
        toy.scale_rows[(3,)](x, out, 40, BLOCK=BLOCK)
    assert monitor.traffic().loads.unique == 40 * x.element_size()
    torch.testing.assert_close(out, x * 2)


def test_sanitizer_of_triton_viz_agrees():
    """An independent opinion, where it is installed (it works with Triton 3.6)."""
    viz = pytest.importorskip("triton_viz", reason="triton-viz is not installed")
    clean = viz.trace("sanitizer")(toy.scale_rows)
    clean[(3,)](torch.zeros(40), torch.zeros(40), 40, BLOCK=BLOCK)
    broken = viz.trace("sanitizer")(toy.off_by_one)
    with pytest.raises((SystemExit, Exception)):
        broken[(3,)](torch.zeros(40), torch.zeros(40), 40, BLOCK=BLOCK)
