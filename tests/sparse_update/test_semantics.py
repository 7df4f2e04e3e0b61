"""What mini-batch-aware regularization means, and the mistakes that are made with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from din_kernels import MBAEmbedding
from din_kernels._backend import BackendUnavailable
from din_kernels.functional import init_state, sparse_update_
from din_kernels.modules.mba_embedding import add_occurrences_, count_occurrences

from ._cases import problem, runs


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def decayed(backend, device):
    """w_new / w_old of a table of ones whose gradients are zero, [V] float64."""

    def update(ids, n, **options):
        weight, grad = torch.ones(n.numel(), 2, device=device), torch.zeros(ids.numel(), 2, device=device)
        arguments = {"lr": 0.5, "regularizer": "mba", "reg_lambda": 0.8, "occurrences": n.to(device), **options}
        sparse_update_(weight, ids.to(device), grad, backend=backend, **arguments)
        assert torch.equal(weight[:, 0], weight[:, 1])
        return weight[:, 0].double().cpu()

    return update


def test_presence_counts_not_the_gradient(decayed):
    """α_j = 1 for a row whose gradient is zero, however often it occurs; n_j = 0 counts as 1; absent rows rest."""
    n = torch.tensor([0, 1, 2, 8, 5])
    found = decayed(torch.tensor([0, 1, 2, 2, 2, 3, 1]), n)
    expected = torch.tensor([1 - 0.4, 1 - 0.4, 1 - 0.4 / 2, 1 - 0.4 / 8, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("times", [1, 2, 31, 32, 33, 64, 65])
def test_decay_once_however_often(times, decayed):
    found = decayed(torch.full((times,), 1), torch.tensor([7, 4, 7]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.9, 1.0], dtype=torch.float64), rtol=1e-7, atol=0)


def test_not_the_count_in_the_batch(decayed):
    """A common mistake: λ over how often the id occurs in this batch instead of in the data set."""
    found = decayed(torch.tensor([0, 0, 0, 0]), torch.tensor([2]))
    assert found.item() == pytest.approx(1 - 0.4 / 2, rel=1e-7)
    assert found.item() != pytest.approx(1 - 0.4 / 4, rel=1e-3)


def test_counts_are_64_bit(decayed):
    """2⁴⁰ samples: as int32 that is 0, as float32 a sum that stopped growing at 2²⁴."""
    found = decayed(torch.tensor([0]), torch.tensor([1 << 40]), reg_lambda=0.8 * 2**40)
    assert found.item() == pytest.approx(0.6, rel=1e-7)
    counts = torch.tensor([(1 << 24), (1 << 31) - 1])
    add_occurrences_(counts, torch.tensor([0, 1]))
    assert counts.tolist() == [(1 << 24) + 1, 1 << 31]


def test_the_scale_multiplies_gradients_only(backend, device):
    """Mean loss, or sum of losses with grad_scale = 1/|B|: one update."""
    p = problem(runs((2, 5, 1)), 3, grad_scale=1.0, device=device)
    summed, _ = p.run(backend, grad=p.grad * 8, grad_scale=0.125)
    assert torch.equal(summed, p.run(backend)[0])


def test_the_update_is_gradient_descent_on_the_penalised_loss(backend, device):
    """loss + λ/2 Σ_j α_j/n_j ‖w_j‖² through autograd, and plain SGD."""
    ids = torch.tensor([[3, 1, 3], [0, 3, 2]], device=device)
    n = torch.tensor([4, 1, 2, 9, 3], device=device)
    weight = torch.randn(5, 4, device=device)
    leaf = weight.double().requires_grad_()
    direction = torch.randn(2, 3, 4, device=device)
    present = ids.unique()
    loss = (leaf[ids] * direction.double()).sin().mean()
    penalty = 0.5 * 0.7 * (leaf[present].square().sum(1) / n[present]).sum()
    (loss + penalty).backward()
    rows = weight.clone()[ids].requires_grad_()
    (rows * direction).sin().mean().backward()
    sparse_update_(weight, ids, rows.grad, lr=0.3, regularizer="mba", reg_lambda=0.7, occurrences=n, backend=backend)
    torch.testing.assert_close(weight.double(), leaf.detach() - 0.3 * leaf.grad, rtol=1e-6, atol=1e-6)


def test_coupled_and_decoupled(backend, device):
    """One formula for SGD; two for optimizers whose state sees the gradient."""
    for optimizer, same in (("sgd", True), ("adagrad", False), ("adam", False)):
        p = problem(runs((2, 5, 1)), 3, optimizer=optimizer, device=device)
        coupled, decoupled = (p.run(backend, decay=decay)[0] for decay in ("coupled", "decoupled"))
        assert torch.equal(coupled, decoupled) == same, optimizer


def test_what_float32_and_bfloat16_lose(decayed, backend, device):
    """A decay below half a unit in the last place leaves the row as it was: documented, not wished away."""
    n = torch.tensor([1])
    assert decayed(torch.tensor([0]), n, reg_lambda=5e-8).item() == 1.0
    assert decayed(torch.tensor([0]), n, reg_lambda=5e-7).item() < 1.0
    weight = torch.ones(1, 2, dtype=torch.bfloat16, device=device)
    sparse_update_(
        weight, torch.tensor([0], device=device), torch.zeros(1, 2, device=device), lr=1.0, regularizer="mba",
        reg_lambda=1e-3, occurrences=n.to(device), backend=backend,
    )  # fmt: skip
    assert bool((weight == 1).all())


def test_no_occurrences_change_nothing(backend, device):
    weight = torch.randn(4, 3, device=device)
    state = init_state(weight, "adam")
    before = weight.clone()
    sparse_update_(
        weight, torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 3, device=device), lr=0.1,
        optimizer="adam", state=state, regularizer="l2", reg_lambda=1.0, backend=backend,
    )  # fmt: skip
    assert torch.equal(weight, before)
    assert state["step"] == 1  # as torch.optim.SparseAdam counts


# -- counts ---------------------------------------------------------------------------------------------------------------


def test_samples_and_positions():
    ids = torch.tensor([[1, 1, 2], [2, 0, 1], [-1, 3, 3]])
    assert count_occurrences(ids, 5, padding_idx=0).tolist() == [0, 2, 2, 1, 0]
    assert count_occurrences(ids, 5, padding_idx=0, count="positions").tolist() == [0, 3, 2, 2, 0]
    flat, offsets = torch.tensor([1, 1, 2, 2, 1, 3, 3]), torch.tensor([0, 3, 3, 5, 7])
    assert count_occurrences(flat, 5, offsets=offsets).tolist() == [0, 2, 2, 1, 0]
    assert count_occurrences(torch.tensor([1, 1, 4]), 5).tolist() == [0, 2, 0, 0, 1]  # three samples of one id


def test_streaming_counts_stand_before_the_update_uses_them():
    table = MBAEmbedding(5, 2, padding_idx=0)
    table(torch.tensor([[1, 1, 0], [1, 2, 0]]))
    assert table.occurrences.tolist() == [0, 2, 1, 0, 0]
    table.eval()
    table(torch.tensor([[3, 3, 3]]))
    table.train()
    table.counting = False
    table(torch.tensor([[3, 3, 3]]))
    assert table.occurrences.tolist() == [0, 2, 1, 0, 0]
    assert table.occurrences.dtype is torch.int64
    assert set(table.state_dict()) == {"weight", "occurrences"}
    given = MBAEmbedding(5, 2, occurrences=torch.arange(5))
    given(torch.tensor([1]))
    assert given.occurrences.tolist() == [0, 1, 2, 3, 4]


# -- the lookup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_lookup_is_nn_embedding(padding_idx):
    table = MBAEmbedding(6, 3, padding_idx=padding_idx)
    plain = nn.Embedding(6, 3, padding_idx=padding_idx)
    plain.load_state_dict({"weight": table.weight.detach()})
    ids, direction = torch.tensor([[0, 2, 5], [2, 2, 1]]), torch.randn(2, 3, 3)
    for layer in (table, plain):
        (layer(ids) * direction).sum().backward()
    assert torch.equal(table(ids), plain(ids))
    assert table.weight.grad.is_sparse
    assert table.weight.grad._values().shape == (6, 3)
    torch.testing.assert_close(table.weight.grad.to_dense(), plain.weight.grad)


def test_missing_ids_give_zero_rows_and_no_gradient():
    table = MBAEmbedding(6, 3, missing_ids=True)
    ids = torch.tensor([[0, -1], [-7, 5]])
    rows = table(ids)
    assert torch.equal(rows[0, 1], torch.zeros(3))
    assert torch.equal(rows[1, 0], torch.zeros(3))
    rows.sum().backward()
    assert table.weight.grad.to_dense().sum(1).tolist() == [3.0, 0.0, 0.0, 0.0, 0.0, 3.0]
    with pytest.raises(IndexError, match="missing_ids=True"):
        MBAEmbedding(6, 3)(ids)


# -- faults: nothing changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": torch.tensor([0, 4, 8])}, IndexError, "below num_embeddings = 6, got 8"),
        (
            {"grad": torch.tensor([[0.0, 1, 2], [3, float("nan"), 1], [0, 0, 0]]), "check_finite": True},
            ValueError,
            "row 1",
        ),
        ({"grad": torch.zeros(2, 3)}, ValueError, "one row of 3 per id"),
        ({"grad": torch.zeros(3, 4)}, ValueError, "one row of 3 per id"),
        ({"ids": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "ids"),
        ({"occurrences": None}, ValueError, "needs occurrences"),
        ({"occurrences": torch.ones(5, dtype=torch.int64)}, ValueError, "occurrences"),
        ({"lr": -0.1}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"reg_lambda": -1.0}, ValueError, "reg_lambda"),
        ({"optimizer": "ftrl"}, ValueError, "optimizer must be one of"),
        ({"regularizer": "elastic"}, ValueError, "regularizer must be"),
        ({"decay": "both"}, ValueError, "decay must be"),
        ({"padding_idx": 6}, ValueError, "padding_idx"),
        ({"padding_idx": True}, TypeError, "padding_idx"),
        ({"state": {}}, ValueError, "init_state"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
    ],
)
def test_bad_arguments_raise_before_anything_changes(changes, error, message, backend):
    p = problem(torch.tensor([0, 1, 1]), 3, rows=6, optimizer="adam")
    weight = p.weight.clone()
    state = {name: value.clone() for name, value in p.state.items()}
    arguments = {
        "ids": p.ids, "grad": p.grad, "state": state, "occurrences": p.occurrences, "backend": backend, **p.options, **changes,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        sparse_update_(weight, **arguments)
    assert torch.equal(weight, p.weight)
    assert all(torch.equal(value, p.state[name]) for name, value in state.items())


def test_tables_that_cannot_be_updated_in_place(device):
    ids, grad = torch.tensor([0], device=device), torch.zeros(1, 4, device=device)
    for table in (torch.zeros(4, 3, device=device).t(), torch.zeros(1, 4, device=device).expand(3, 4)):
        with pytest.raises(ValueError, match="rows contiguously"):
            sparse_update_(table, ids, grad[:, : table.shape[1]], lr=0.1)
    with pytest.raises(BackendUnavailable, match="float64"):
        sparse_update_(torch.zeros(3, 4, device=device).double(), ids, grad.double(), lr=0.1, backend="triton")
    wide = torch.zeros(3, 1025, device=device)
    with pytest.raises(BackendUnavailable, match="wider than 1024"):
        sparse_update_(wide, ids, wide[:1].clone(), lr=0.1, backend="triton")


def test_gradients_that_are_not_finite_touch_their_own_rows_only(backend, device):
    """Without ``check_finite`` they are applied as they are: to the rows they belong to."""
    p = problem(torch.tensor([0, 1, 1, 2]), 3, device=device)
    p.grad[1] = float("nan")
    weight, _ = p.run(backend)
    assert weight.isnan().all(1).tolist()[:3] == [False, True, False]
