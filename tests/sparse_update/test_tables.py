"""Several tables as one: ``TableGroup`` gives each table what an update of its own would."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from din_kernels.functional import init_state, sparse_update_
from din_kernels.ops.sparse_update import TableGroup
from tests.support.memory_monitor import memory_monitor


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


SIZES = (7, 1, 12)
PADDING = (0, None, -1)


def batch(width=4, count=20, device="cpu"):
    ids = [torch.randint(-1, size, (count,), device=device) for size in SIZES]
    return ids, torch.randn(len(SIZES), count, width, device=device)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_same_bits_as_tables_apart(optimizer, backend, device):
    tables = [torch.randn(size, 4, device=device) for size in SIZES]
    counts = [torch.randint(0, 6, (size,), device=device) for size in SIZES]
    options = {"lr": 0.1, "optimizer": optimizer, "regularizer": "mba", "reg_lambda": 0.5, "backend": backend}
    apart = [table.clone() for table in tables]
    states = [init_state(table, optimizer) for table in apart]
    group = TableGroup(tables, occurrences=counts, padding_idx=PADDING)
    state = init_state(group.weight, optimizer)
    for _ in range(2):
        ids, grad = batch(device=device)
        for i, table in enumerate(apart):
            sparse_update_(
                table,
                ids[i],
                grad[i],
                state=states[i] or None,
                occurrences=counts[i],
                padding_idx=PADDING[i],
                **options,
            )
        rows = group.row_ids(ids)
        group.update_(rows, grad.reshape(-1, 4), state=state or None, plan=group.plan(rows, backend=backend), **options)
    for one, other in zip(tables, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # runs meet other chunk borders
    assert torch.equal(torch.cat(tables), group.weight)


def test_one_sort_and_one_launch():
    pytest.importorskip("triton")
    group = TableGroup([torch.randn(size, 3) for size in SIZES], padding_idx=PADDING)
    ids, grad = batch(3, 8)
    with memory_monitor() as monitor:
        group.update_(group.row_ids(ids), grad.reshape(-1, 3), lr=0.1, backend="triton")
    assert monitor.kernels() == ["make_keys", "update_chunks"]


def test_gradient_of_concatenated_rows_needs_no_copy(backend, device):
    """Behaviours as [item ; category]: the gradient [N, 2·D] is seen as [2·N, D]."""
    items, categories = torch.zeros(6, 3, device=device), torch.zeros(4, 3, device=device)
    group = TableGroup([items, categories])
    grad = torch.randn(5, 6, device=device)
    ids = [torch.tensor([0, 5, 0, 2, 1], device=device), torch.tensor([3, 3, 0, 1, 1], device=device)]
    group.update_(group.row_ids(ids, dim=-1), grad.view(10, 3), lr=1.0, backend=backend)
    torch.testing.assert_close(items, torch.zeros_like(items).index_add(0, ids[0], -grad[:, :3]))
    torch.testing.assert_close(categories, torch.zeros_like(categories).index_add(0, ids[1], -grad[:, 3:]))


def test_modules_keep_their_parameters(device):
    layers = [nn.Embedding(size, 4, sparse=True, device=device) for size in SIZES]
    parameters = [layer.weight for layer in layers]
    before = [parameter.detach().clone() for parameter in parameters]
    group = TableGroup(parameters)
    assert all(layer.weight is parameter for layer, parameter in zip(layers, parameters, strict=True))
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
    loss = layers[0](torch.tensor([1, 2], device=device)).square().sum()
    ids, grad = batch(device=device)
    group.update_(group.row_ids(ids), grad.reshape(-1, 4), lr=0.1)
    assert not torch.equal(layers[0].weight, before[0])
    # The version counter moved, so a graph recorded with the old rows cannot go on unseen with the new ones.
    assert parameters[0]._version > 0
    del loss
    layers[1].weight.data = layers[1].weight.detach().clone()
    with pytest.raises(RuntimeError, match="moved or replaced"):
        group.update_(group.row_ids(ids), grad.reshape(-1, 4), lr=0.1)


def test_bad_tables_and_ids_raise():
    with pytest.raises(ValueError, match="at least one"):
        TableGroup([])
    with pytest.raises(ValueError, match=r"tables\[1\]"):
        TableGroup([torch.zeros(3, 4), torch.zeros(3, 5)])
    with pytest.raises((TypeError, ValueError), match=r"tables\[1\]"):
        TableGroup([torch.zeros(3, 4), torch.zeros(3, 4).double()])
    with pytest.raises(ValueError, match="one entry per table"):
        TableGroup([torch.zeros(3, 4)], padding_idx=[None, 0])
    with pytest.raises(ValueError, match="one count per row"):
        TableGroup([torch.zeros(3, 4)], occurrences=[torch.ones(4, dtype=torch.int64)])
    group = TableGroup([torch.zeros(3, 4), torch.zeros(5, 4)])
    with pytest.raises(IndexError, match=r"ids\[0\] must be below"):  # 3 would be a row of the second table
        group.row_ids([torch.tensor([3]), torch.tensor([0])])
    with pytest.raises(ValueError, match="one tensor per table"):
        group.row_ids([torch.tensor([0])])
