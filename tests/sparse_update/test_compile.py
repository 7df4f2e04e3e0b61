"""The operators as citizens of torch.library: opcheck, one graph, no copies of the table."""

from __future__ import annotations

import pytest
import torch

from din_kernels import MBAEmbedding
from din_kernels.functional import init_state, sparse_update_
from din_kernels.ops.sparse_update import function
from din_kernels.ops.sparse_update.plan import SparsePlan

from ._cases import problem, runs


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    ids = torch.tensor([2, 0, -1, 2, 4], device=device)
    torch.library.opcheck(function._plan_op, (ids, 5, 4, backend))
    plan = SparsePlan.build(ids, 5, backend=backend)
    weight = torch.randn(5, 3, device=device)
    state = init_state(weight, "adam")
    none = None
    torch.library.opcheck(
        function._apply_op,
        (
            weight, state["exp_avg"], state["exp_avg_sq"], state["step"], plan.keys, plan.order,
            torch.randn(5, 3, device=device), torch.ones(5, dtype=torch.int64, device=device), none, none, none, none,
            0.1, 1.0, 0.1, 1e-8, 0.9, 0.999, "adam", "mba", True, backend,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_graph(optimizer, device):
    p = problem(runs((2, 5, 1)), 3, optimizer=optimizer, device=device)
    expected, state = p.run(None)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(weight, ids, grad, n, state):
        sparse_update_(weight, ids, grad, occurrences=n, state=state or None, **p.options)
        return weight.sum()

    weight, kept = p.weight.clone(), {name: value.clone() for name, value in p.state.items()}
    total = step(weight, p.ids, p.grad, p.occurrences, kept)
    assert torch.equal(weight, expected)
    assert torch.equal(total, expected.sum())
    assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_lookup_in_a_compiled_model(device):
    table = MBAEmbedding(9, 4, padding_idx=0, occurrences=torch.ones(9, dtype=torch.int64)).to(device)
    ids = torch.tensor([[1, 0, 3], [3, 3, 8]], device=device)
    expected = table(ids).detach()
    found = torch.compile(lambda i: table(i) * 2, backend="aot_eager")(ids)
    torch.testing.assert_close(found, expected * 2)
    found.sum().backward()
    assert table.weight.grad.is_sparse


def test_fake_tensors_go_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(10, 4)
        sparse_update_(weight, torch.zeros(6, dtype=torch.int64), torch.empty(6, 4), lr=0.1)
        assert weight.shape == (10, 4)
