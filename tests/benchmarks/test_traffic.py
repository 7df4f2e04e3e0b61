"""Bytes the kernels really move, counted in Triton's interpreter, against the floors of ``benchmarks.roofline``.

What is compared is the *marginal* traffic: the bytes that a larger problem moves more than a smaller one, over what its floor
has more. Fixed parts (weights, private sums of a program) vanish against the shapes that matter, but not in the small ones an
interpreter can run. Every launch counts each byte it touches once in each direction: the least its memory must move.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import din_kernels
from benchmarks import roofline
from benchmarks.roofline import Floor
from benchmarks.workloads import ActivationWorkload, DiceWorkload, Lengths, SparseWorkload, make_activation
from din_kernels.functional import sparse_update_
from din_kernels.ops.dice.tiling import COLUMNS_MAX_ROWS

pytest.importorskip("triton")
from tests.support.memory_monitor import MemoryMonitor, memory_monitor

Counted = tuple[MemoryMonitor, Floor]
LIMIT, LIMIT_JAGGED = 1.1, 1.3


def marginal(counted: Callable[[int], Counted], small: int, large: int) -> float:
    (before, floor_before), (after, floor_after) = counted(small), counted(large)
    return (after.bytes_moved() - before.bytes_moved()) / (floor_after.bytes - floor_before.bytes)


def activation(
    batch: int, dtype: torch.dtype, *, full: bool = False, backward: bool = False, dim: int = 64, readers: int = 1
) -> Counted:
    """Traffic of one direction of the unit on ``batch`` lists, uneven ones or of one length; ``readers``: kernels that read
    the keys."""
    lengths = Lengths("full", 32, 32) if full else Lengths("uniform", 1, 50)
    workload = ActivationWorkload("traffic", batch, lengths, dim=dim, hidden=(16,))
    inputs = make_activation(workload, dtype=dtype)
    unit = din_kernels.LocalActivationUnit(dim, (16,), "sigmoid", "product", backend="triton").to(dtype)
    for leaf in (inputs.query, inputs.keys):
        leaf.requires_grad_(backward)
    with memory_monitor(races=False) as monitor:
        pooled = unit(inputs.query, inputs.keys, offsets=inputs.offsets)
    if backward:
        with memory_monitor(races=False) as monitor:
            torch.autograd.grad(pooled, (inputs.query, inputs.keys, *unit.parameters()), inputs.grad)
    keys = monitor.traffic(tensor="keys").loads
    assert keys.unique == readers * inputs.keys.numel() * inputs.keys.element_size()  # whole, by so many kernels
    assert keys.per_program <= 1.02 * keys.unique  # no program reads what another one does, but for borders
    return monitor, roofline.activation_floor(workload, dtype, rows=inputs.rows, backward=backward)


@pytest.mark.parametrize("full", [True, False], ids=["equal lists", "jagged"])
def test_forward_fp32(full: bool) -> None:
    """Rows of 256 bytes; what the first layer makes of a query row is written and read once more, some 10 bytes a row; of lists
    that differ in length the packed kernels' tables show, 16 bytes a row."""
    limit = LIMIT + 0.02 if full else LIMIT_JAGGED
    assert marginal(lambda n: activation(n, torch.float32, full=full), 6, 12) <= limit


def test_forward_bf16_jagged() -> None:
    """Rows of 128 bytes: tables of the packed kernels (where they serve) show, 16 bytes a row."""
    assert marginal(lambda n: activation(n, torch.bfloat16), 6, 12) <= LIMIT_JAGGED


def test_backward_jagged() -> None:
    """The universal kernels: one walk over the keys."""
    assert marginal(lambda n: activation(n, torch.float32, backward=True, dim=80), 4, 8) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_of_the_packed_kernels(dtype: torch.dtype) -> None:
    """Three kernels read the keys and leave rows to each other. Without an L2 cache they would move this much."""
    assert marginal(lambda n: activation(n, dtype, backward=True, readers=3), 4, 8) <= 2.75


@pytest.mark.parametrize(("fewer", "more"), [(2048, 4096), (8192, 12288)], ids=["on chip", "two launches"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_dice(backward: bool, fewer: int, more: int) -> None:
    """Five passes in all where a program holds its channels on chip, as if every second read were free; eight beyond."""

    def counted(rows: int) -> Counted:
        x, grad = torch.randn(rows, 16, requires_grad=True), torch.randn(rows, 16)
        unit = din_kernels.Dice(16, backend="triton").train()
        with memory_monitor(races=False) as monitor:
            y = unit(x)
        if backward:
            with memory_monitor(races=False) as monitor:
                y.backward(grad)
        workload, cached = DiceWorkload("traffic", rows, 16), more <= COLUMNS_MAX_ROWS
        return monitor, roofline.dice_floor(workload, torch.float32, backward=backward, cached=cached)

    assert marginal(counted, fewer, more) <= LIMIT


def test_sparse_update() -> None:
    def counted(occurrences: int) -> Counted:
        workload = SparseWorkload("traffic", occurrences, table=150, dim=64)
        weight, grad = torch.randn(150, 64), torch.randn(occurrences, 64)
        counts = torch.ones(150, dtype=torch.int64)
        with memory_monitor(races=False) as monitor:
            sparse_update_(
                weight,
                workload.ids(),
                grad,
                lr=0.1,
                regularizer="mba",
                reg_lambda=0.1,
                occurrences=counts,
                backend="triton",
            )
        return monitor, roofline.sparse_floor(workload)

    assert marginal(counted, 200, 400) <= LIMIT


def test_a_kernel_that_reads_twice_would_be_seen() -> None:
    """The gate can fail: a second launch over the same rows doubles the marginal bytes."""

    def twice(batch: int) -> Counted:
        first, floor = activation(batch, torch.float32, full=True)
        second, _ = activation(batch, torch.float32, full=True)
        first.launches += second.launches
        return first, floor

    assert marginal(twice, 2, 4) > LIMIT_JAGGED
