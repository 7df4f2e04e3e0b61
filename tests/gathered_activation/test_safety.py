"""The universal kernels reading from tables: memory they touch, order of execution, what they do not touch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from din_kernels.ops.gathered_activation import function
from tests.support.memory_monitor import OutOfBounds, memory_monitor

from .test_gathered import ITEMS, Problem, Spec, make

pytest.importorskip("triton")

SPREAD = [
    Spec(softmax=True, interaction="outer", activation="prelu"),
    Spec(lengths=(20, 2), item_dim=13, category_dim=5, hidden=(17, 6), candidates=2, index_dtype=torch.int32),
    Spec(lengths=(1, 35), training=True),
]


def run_all(problem: Problem) -> list[Tensor]:
    """Every result of forward and backward, tables' occurrences included."""
    pooled, attention, leaves, _ = problem.call("triton")
    loss = (pooled * problem.grad_pooled.float()).sum() + (attention * problem.grad_weights.float()).sum()
    grads = torch.autograd.grad(loss, leaves)
    return [pooled, attention, *(g._values() if g.is_sparse else g for g in grads)]


@pytest.mark.parametrize("spec", SPREAD, ids=lambda spec: f"{spec.interaction}-{spec.activation}-{spec.candidates}")
def test_memory(spec: Spec) -> None:
    """In bounds of tables and ids, no race, no atomics; any order of programs gives the same bits."""
    problem = make(spec)
    expected = run_all(problem)
    for order in (None, "reverse"):
        with memory_monitor(order=order) as monitor:
            found = run_all(problem)
        assert {"forward_items", "backward_items"} <= set(monitor.kernels())
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


def test_monitor_sees_a_bad_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the tables read past their end, or by the wrong ids, the tests above would tell."""
    problem = make(SPREAD[0])
    honest = function._tensors

    def shifted(args: tuple, backend: str):
        tensors = honest(args, backend)
        bad = tensors.gathered._replace(item_ids=tensors.gathered.item_ids + ITEMS)
        return tensors._replace(gathered=bad)

    monkeypatch.setattr(function, "_tensors", shifted)
    with memory_monitor(), pytest.raises(OutOfBounds, match=r"keys\[0\]"):
        run_all(problem)


def test_forward_moves_ids_and_rows_and_no_keys() -> None:
    """Each real row is fetched from its tables once for the layer and once for the sum; nothing of keys' size is stored."""
    problem = make(Spec(lengths=(30, 3), item_dim=16, category_dim=16, hidden=(16,), activation="sigmoid"))
    rows, dim = 33, 32
    with memory_monitor() as monitor, torch.no_grad():
        problem.call("triton")
    tables = sum(monitor.traffic("forward_items", f"keys[{i}]").loads.requested for i in (0, 1))
    assert tables == 2 * rows * dim * 4
    assert monitor.traffic("forward_items").stores.requested < rows * dim * 4
