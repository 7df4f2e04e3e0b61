"""Triton kernels: memory they touch, order of execution, bytes moved, tables beyond 2³¹ elements, kernels broken on purpose."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import din_kernels.ops.sparse_update as package
from din_kernels.functional import sparse_update_
from din_kernels.ops.sparse_update import function
from tests.support.memory_monitor import MemoryAccessError, memory_monitor

from ._cases import problem, runs, zipf

pytest.importorskip("triton")

RUNS = runs((1, 3, 4, 5, 70, 2, 9))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(function, "CHUNK", 4)
    monkeypatch.setattr(function, "GROUP", 16)


@pytest.mark.parametrize("order", [None, "reverse", 3])
@pytest.mark.parametrize(("optimizer", "width"), [("sgd", 3), ("adam", 40), ("rowwise_adagrad", 5)])
def test_memory(optimizer, width, order, small_chunks):
    """In bounds, no races, no atomics; any order of programs gives the same bits."""
    ids = torch.cat([torch.tensor([-1, 8]), RUNS[: 60 if width > 8 else None]])
    p = problem(ids, width, optimizer=optimizer, regularizer="difacto", padding_idx=2)
    expected, state = p.run("triton")
    with memory_monitor(order=order) as monitor:
        found, found_state = p.run("triton")
    assert torch.equal(found, expected)
    assert all(torch.equal(found_state[name], value) for name, value in state.items())
    assert set(monitor.kernels()) >= {"make_keys", "update_chunks", "finish_cut_runs"}
    assert ("sum_groups" in monitor.kernels()) == (ids.numel() > 2 * 4 * 16)


def test_traffic():
    """Each gradient is read once, each touched row read and written once; carries are a few percent."""
    ids, width = zipf(320, 200), 36
    rows = ids.unique().numel()
    p = problem(ids, width, regularizer="mba")
    with memory_monitor() as monitor:
        p.run("triton")
    table, grads = rows * width * 4, ids.numel() * width * 4
    assert monitor.traffic(None, "grad").loads.per_program == grads
    for part in (monitor.traffic(None, "weight").loads, monitor.traffic(None, "weight").stores):
        assert table <= part.per_program <= table + 2 * 10 * width * 4  # a run cut by a border is looked at once more
    assert monitor.traffic("update_chunks", "occurrences").loads.unique <= rows * 8
    moved = monitor.bytes_moved("update_chunks") + monitor.bytes_moved("finish_cut_runs")
    floor = grads + 2 * table + ids.numel() * (8 + 2) + rows * 8
    assert floor <= moved < 1.15 * floor


def test_no_temporary_of_the_tables_size():
    """Scratch depends on N alone: the largest tensor made is the carry buffer, 2·⌈N/32⌉ rows."""
    made = []
    real = torch.empty

    def empty(*args, **kwargs):
        result = real(*args, **kwargs)
        made.append(result.numel() * result.element_size())
        return result

    p = problem(torch.arange(64), 64, rows=50_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        p.run("triton")
    assert max(made) == 2 * 2 * 64 * 4


# -- beyond 2³¹ elements: memory that is reserved, of which only a few pages are ever touched ------------------------------


def reserve(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        pytest.skip("reserved memory is real memory on a GPU")
    try:
        return torch.empty(*shape, dtype=dtype)
    except RuntimeError:
        pytest.skip("not enough address space")


def test_row_offsets_beyond_int32(device):
    """Rows 2³⁰ elements apart: the third begins at 2³¹; so do the gradients."""
    ids = torch.tensor([2, 0, 2])
    p = problem(ids, 4, rows=3, device=device)
    expected, _ = p.run("triton")
    wide = reserve(3 << 30, dtype=torch.float32, device=device).as_strided((3, 4), (1 << 30, 1))
    far = reserve(3 << 30, dtype=torch.float32, device=device).as_strided((3, 4), (1 << 30, 1))
    wide.copy_(p.weight)
    far.copy_(p.grad)
    sparse_update_(wide, ids, far, occurrences=p.occurrences, backend="triton", **p.options)
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_state_offsets_beyond_int32(backend, device):
    """The last rows of a table and of its state, behind element 2³¹."""
    rows = (1 << 26) + 3
    weight = reserve(rows, 32, dtype=torch.bfloat16, device=device)
    total = reserve(rows, 32, dtype=torch.float32, device=device)
    weight[-2:], total[-2:] = 1.0, 3.0
    grad = torch.ones(1, 32)
    sparse_update_(
        weight, torch.tensor([rows - 1]), grad, lr=0.5, optimizer="adagrad", state={"sum": total}, backend=backend
    )
    assert torch.equal(total[-2:, 5], torch.tensor([3.0, 4.0]))
    assert torch.equal(weight[-2:, 5], torch.tensor([1.0, 0.75], dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_rows_than_int32_can_count(backend, device):
    rows = (1 << 31) + 5
    weight = reserve(rows, 1, dtype=torch.bfloat16, device=device)
    weight[-2:] = 1.0
    weight[:2] = 1.0
    sparse_update_(weight, torch.tensor([rows - 1, 0, rows - 1]), torch.ones(3, 1), lr=0.25, backend=backend)
    assert weight[-2:, 0].tolist() == [1.0, 0.5]
    assert weight[:2, 0].tolist() == [0.75, 1.0]


# -- machine code ---------------------------------------------------------------------------------------------------------


def test_registers_on_record():
    """Every shipped configuration keeps to 80 registers and spills nothing (measured by benchmarks.static_budget)."""
    from din_kernels.ops.sparse_update.shipped import compile_cases

    path = Path(__file__).parents[2] / "benchmarks" / "results" / "static_budget.json"
    if not path.exists():
        pytest.skip("no record of the machine code")
    record = json.loads(path.read_text())["cases"]
    cases = [case.name for case in compile_cases()]
    missing = [name for name in cases if name not in record]
    assert not missing
    for name in cases:
        for target in ("sm_80", "sm_90"):
            figures = record[name][target]
            assert figures["registers"] <= 80, (name, target)
            assert figures["stack"] == figures["spill_instructions"] == 0, (name, target)


# -- kernels broken on purpose -------------------------------------------------------------------------------------------

MUTANTS = {
    "a run cut at its beginning is taken for a whole one": ("early = (before == key) & (key < num_rows)", "early = key < 0"),
    "a row is put away at each occurrence": ("ends = live & (key != following)", "ends = live"),
    "sums are not cleared": ("total = tl.where(ends[:, None], 0.0, total)", "total = total + 0.0"),
    "the first carry is left out": ("part = chunk + 1\n", "part = chunk + 2\n"),
    "groups are added twice": ("part = group * GROUP\n", "part = border\n"),
    "the opening part is left out": ("opening + tl.sum(total, axis=0)", "tl.sum(total, axis=0)"),
    "counts are not clamped": ("tl.maximum(n, 1)", "n"),
    "the decay lost its count": ("(reg_lambda / tl.maximum(n, 1).to(tl.float32))[:, None] * w", "reg_lambda * w"),
    "the decay is divided by the count in the batch": ("tl.maximum(n, 1).to", "tl.maximum(count, 1).to"),
    "the scale reaches the decay": ("g += c\n", "g += grad_scale * c\n"),
    "padding is trained": (" & (row != padding_idx)", ""),
    "negative ids are trained": ("used = (row >= 0) & ", "used = "),
    "columns beyond the width are written": (
        "tl.store(weight + row[:, None] * stride_w + cols[None, :], new.to(weight.dtype.element_ty), mask=mask)",
        "tl.store(weight + row[:, None] * stride_w + cols[None, :], new.to(weight.dtype.element_ty), mask=live[:, None])",
    ),
}  # fmt: skip


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """broken(old, new): the kernels with ``old`` replaced."""

    def load(old: str, new: str) -> None:
        name = f"{package.__name__}.kernels"
        importlib.import_module(name)
        source = Path(package.__file__).with_name("kernels.py").read_text()
        assert old in source, f"nothing to break: {old!r}"
        path = tmp_path / "kernels.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, mutant)
        monkeypatch.setattr(package, "kernels", mutant)
        spec.loader.exec_module(mutant)

    return load


def check_everything() -> None:
    """What the tests here and in test_parity look at, on one small problem each."""
    ids = torch.cat([torch.tensor([-1, -1, 8]), runs((2, 3, 4, 5, 150, 2))])
    with memory_monitor():
        first = problem(ids, 3, regularizer="mba", padding_idx=3, lr=0.4)
        first.occurrences[:2] = torch.tensor([0, 1])
        first.check("triton")
        problem(runs((1, 9, 6)), 3, optimizer="adam", regularizer="difacto").check("triton")


def test_the_checks_pass_unbroken(small_chunks, poison_scratch):
    check_everything()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_catch(name, broken, small_chunks, poison_scratch):
    old, new = MUTANTS[name]
    broken(old, new)
    with pytest.raises((AssertionError, MemoryAccessError)):
        check_everything()
