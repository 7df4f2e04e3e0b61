"""Triton kernels: memory they touch, bytes they move, order of execution, repeatability, compiled variants, odd strides."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from din_kernels import functional
from din_kernels.ops.dice import function, tiling, triton_impl
from din_kernels.testing import hostile_gradients
from tests.support.memory_monitor import OutOfBounds, memory_monitor

from ._cases import STRIDES, Case, make_case

pytest.importorskip("triton")


def run_all(case: Case) -> list[torch.Tensor]:
    """Every result of a call on the kernels, from the same running statistics each time."""
    kept = case.running_mean.clone(), case.running_var.clone(), case.tracked.clone()
    y, grads = case.run("triton")
    results = [y, *grads.values(), case.running_mean.clone(), case.running_var.clone(), case.tracked.clone()]
    for tensor, value in zip((case.running_mean, case.running_var, case.tracked), kept, strict=True):
        tensor.copy_(value)
    return results


def distributed_halves(case: Case) -> list[torch.Tensor]:
    """The operators of a process group, as one process of two that hold the same rows."""
    x, mask = case.x.reshape(-1, case.x.shape[-1]), None if case.mask is None else case.mask.reshape(-1)
    grad = case.grad.reshape(x.shape)
    vectors = (case.alpha, case.weight, case.bias)
    moments = function.moments_op(x, mask, "triton")
    y, normaliser = function.forward_op(
        x, None, mask, torch.stack((moments, moments)), *vectors, None, None, None, None, 0.1, 1e-8, "triton"
    )
    sums = function.sums_op(grad, x, normaliser, *vectors, "triton")
    dx, total = function.backward_op(
        grad, x, None, mask, normaliser, torch.stack((sums, sums)), *vectors, True, "triton"
    )  # fmt: skip
    return [moments, y, normaliser, sums, dx, total]


SPREAD = {
    "several dimensions": make_case((2, 37, 9), how="sliced", masked=True),
    "many rows": make_case((1400, 20), masked=True, affine=True, momentum=None),
    "transposed": make_case((1100, 17), how="transposed", dtype=torch.bfloat16),
    "evaluation": make_case((700, 36), training=False, affine=True, alpha_shape=(1,)),
    "one channel": make_case((2100, 1)),
}


@pytest.mark.parametrize("name", SPREAD)
def test_memory(name, launches):
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    case = SPREAD[name]
    expected = run_all(case)
    for order in (None, "reverse", 3):
        with memory_monitor(order=order):
            found = run_all(case)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


def test_memory_of_the_halves(two_launches):
    case = SPREAD["many rows"]
    expected = distributed_halves(case)
    with memory_monitor(order="reverse") as monitor:
        found = distributed_halves(case)
    assert monitor.kernels().count("finish_parts") == 2
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_monitor_sees_bad_launches(two_launches, monkeypatch):
    """Parts that overlap are caught, and so are rows beyond the last one."""
    case = make_case((1400, 8))
    good = triton_impl._planned

    def launched(change):
        def planned(*args, **kwargs):
            plan = good(*args, **kwargs)
            numbers, (blocks, parts) = dict(plan.numbers), plan.grid
            return plan._replace(grid=change(numbers, blocks, parts), numbers=numbers)

        monkeypatch.setattr(triton_impl, "_planned", planned)
        case.run("triton")

    def overlapping(numbers, blocks, parts):
        numbers["rows_per_part"] //= 2
        return blocks, parts

    with memory_monitor(raise_errors=False) as monitor:
        launched(overlapping)
    missed = monitor.traffic("apply_training", "y").stores.unique
    assert missed < case.x.numel() * 4  # half of the rows are never written

    def idle(numbers, blocks, parts):
        numbers["BLOCK_C"] = 16
        return 2, parts

    with memory_monitor():
        launched(idle)  # blocks of channels beyond the last one touch nothing

    def too_many(numbers, blocks, parts):
        numbers["num_parts"] += 1
        return blocks, parts

    with memory_monitor(), pytest.raises(OutOfBounds):
        launched(too_many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [600, 2300, 5000])
def test_traffic(rows, dtype):
    """Passes over the tensor. Two launches each way: 3 forward (x twice, y) and 5 backward (x and the gradient twice, dx); one
    launch each way: 2 and 3, 5 in total; evaluation 2. Eager PyTorch: 18 + 37, and 17."""
    case = make_case((rows, 32), dtype=dtype)
    whole = case.x.numel() * case.x.element_size()
    with memory_monitor() as monitor:
        run_all(case)
    tensors = ("x", "y", "grad", "dx")
    loads = {name: monitor.traffic(None, name).loads for name in tensors}
    stores = {name: monitor.traffic(None, name).stores for name in tensors}
    assert [stores[name].unique // whole for name in tensors] == [0, 1, 0, 1]
    two_launches = rows > tiling.COLUMNS_MAX_ROWS
    launches = 2 if two_launches else 1
    assert monitor.kernels() == (
        ["moments_parts", "apply_training", "sum_parts", "apply_gradient"]
        if two_launches
        else ["forward_columns", "backward_columns"]
    )
    # Memory moves each byte once a launch: forward 1 or 2 reads of x, backward as many of x and of the gradient.
    assert loads["x"].unique == 2 * launches * whole
    assert loads["grad"].unique == launches * whole
    assert stores["y"].per_program == stores["dx"].per_program == whole
    total = monitor.bytes_moved()
    small = total - (3 * launches + 2) * whole
    assert 0 <= small < 0.25 * whole  # parts and vectors

    evaluation = make_case((rows, 32), dtype=dtype, training=False)
    with memory_monitor() as monitor, torch.no_grad():
        functional.dice(
            evaluation.x, evaluation.alpha, evaluation.running_mean, evaluation.running_var, backend="triton"
        )
    assert monitor.kernels() == ["apply_running"]
    assert 2 * whole <= monitor.bytes_moved() < 2 * whole + 64 * 32 * 4


def test_saved_for_backward():
    """x itself and three numbers a channel; nothing else of the size of x."""
    case = make_case((2000, 16))
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = case.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.dice(x, case.alpha, training=True, backend="triton")
    large = [tensor for tensor in saved if tensor.numel() >= 2000]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()
    assert sum(tensor.numel() for tensor in saved if tensor.numel() < 2000) <= 5 * 16


@pytest.mark.parametrize("name", SPREAD)
def test_repeats_are_bit_equal(name, launches, poison_scratch):
    for one, other in zip(run_all(SPREAD[name]), run_all(SPREAD[name]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [33, 1100])
def test_hostile_gradients(rows, device, launches, poison_scratch):
    for grad in hostile_gradients((rows, 12), device=device):
        case = make_case((rows, 12), device=device, masked=True)
        case.grad = grad
        case.check("triton")
        case = make_case((rows, 12), device=device, training=False)
        case.grad = grad
        case.check("triton")


@pytest.mark.parametrize("how", STRIDES)
def test_no_copy_of_strided_rows(how, monkeypatch):
    """Whatever has one stride between rows is read where it lies."""
    seen = []
    real = triton_impl.forward
    monkeypatch.setattr(triton_impl, "forward", lambda x, *rest: (seen.append(x), real(x, *rest))[1])
    case = make_case((40, 12), how=how)
    case.run("triton")
    assert seen[0].data_ptr() == case.x.data_ptr()
    assert seen[0].stride() == case.x.stride()


def test_rows_of_a_huge_stride(device):
    """Offsets beyond 2³¹ elements: rows of a view so wide that only a few exist (the memory is never touched)."""
    stride = 1 << 30
    try:
        storage = torch.empty(3 * stride, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("no 6 GiB of address space")
    x = storage.as_strided((3, 4), (stride, 1))
    x.copy_(torch.randn(3, 4))
    alpha = torch.randn(4, device=device)
    grads = []
    for rows in (x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()):
        y = functional.dice(rows, alpha, training=True, backend="triton")
        grads += [y, *torch.autograd.grad(y.sum(), rows)]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_rows_and_strides_never_recompile():
    """Numbers of rows, and strides, are marked as not to be compiled in."""
    folder = Path(inspect.getfile(triton_impl)).parent
    source = "".join(
        (folder / name).read_text() for name in ("kernels.py", "kernels_backward.py", "kernels_columns.py")
    )
    kernels = re.findall(r"@triton\.jit(?:\(do_not_specialize=\[(.*?)\]\))?\ndef ([a-z]\w+)\((.*?)\):", source, re.S)
    assert len(kernels) == 8
    free = {"num_rows", "rows_per_part", "num_parts", "x_stride", "grad_stride"}
    for marks, name, arguments in kernels:
        runtime = {a.strip() for a in arguments.split(",") if ":" not in a}
        assert set(re.findall(r'"(\w+)"', marks)) == free & runtime, name
