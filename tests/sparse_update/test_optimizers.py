"""The optimizers as citizens of torch.optim: what they share with it to the number, and what they must refuse."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import din_kernels
from din_kernels import MBAEmbedding
from din_kernels.ops.sparse_update import api
from din_kernels.optim import SparseAdagrad, SparseAdam, SparseRowwiseAdagrad, SparseSGD

ALL = [SparseSGD, SparseAdagrad, SparseRowwiseAdagrad, SparseAdam]


@pytest.fixture
def table(device):
    """Tables where the kernels run; in float64 the torch backend serves them."""

    def make(seed=0, rows=30, width=5, **options):
        torch.manual_seed(seed)
        return MBAEmbedding(rows, width, **options).to(device)

    return make


def loss_of(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, layer.num_embeddings, (6, 4), generator=generator)
    target = torch.randn(6, 4, layer.embedding_dim, generator=generator)
    return ((layer(ids.to(layer.weight.device)) - target.to(layer.weight)) ** 2).sum()


def train(layer, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(layer, step).backward()
        optimizer.step()
    return layer.weight.detach().clone()


@pytest.mark.parametrize(
    ("ours", "theirs", "sparse"),
    [
        (lambda p: SparseSGD(p, lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05), True),
        (lambda p: SparseAdagrad(p, lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1), True),
        (
            lambda p: SparseAdagrad(p, lr=0.1, initial_accumulator_value=0.3),
            lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3),
            True,
        ),
        (lambda p: SparseAdam(p, lr=0.01), lambda p: torch.optim.SparseAdam(p, lr=0.01), True),
        (
            lambda p: SparseAdam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3),
            lambda p: torch.optim.SparseAdam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3),
            True,
        ),
    ],
)
def test_without_decay_the_numbers_are_torchs(ours, theirs, sparse, table):
    layer = table().double()
    rival = nn.Embedding(30, 5, sparse=sparse).to(layer.weight)
    with torch.no_grad():
        rival.weight.copy_(layer.weight)
    torch.testing.assert_close(
        train(layer, ours(layer.parameters()), 6),
        train(rival, theirs(list(rival.parameters())), 6),
        rtol=1e-10,
        atol=1e-12,
    )


def test_l2_is_the_penalty_on_the_rows_looked_up(table):
    layer = table().double()
    plain = nn.Embedding(30, 5).to(layer.weight)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    n = torch.randint(1, 9, (30,)).to(layer.weight.device)
    ours = SparseSGD(layer.parameters(), lr=0.1, regularizer="mba", reg_lambda=0.7, occurrences=n)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 30, (6, 4), generator=generator).to(layer.weight.device)
        for weight, optimizer, embed in ((layer.weight, ours, layer), (plain.weight, theirs, plain)):
            optimizer.zero_grad()
            loss = (embed(ids).sin()).sum()
            if optimizer is theirs:  # λ/2 Σ_j α_j / n_j ‖w_j‖², the paper's eq. 5
                present = ids.unique()
                loss = loss + 0.7 / 2 * (weight[present].square().sum(1) / n[present]).sum()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, plain.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", ALL)
def test_accumulated_gradients_are_one_batch(cls, table):
    options = {"lr": 0.1, "regularizer": "l2", "reg_lambda": 0.5}
    one, two = table().double(), table().double()
    optimizer = cls(one.parameters(), **options)
    (loss_of(one, 0) + loss_of(one, 1)).backward()
    optimizer.step()
    optimizer = cls(two.parameters(), **options)
    loss_of(two, 0).backward()
    loss_of(two, 1).backward()
    optimizer.step()
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_resumed_equals_uninterrupted(cls, dtype, table):
    options = {
        "lr": 0.05,
        "regularizer": "mba",
        "reg_lambda": 0.1,
        "stochastic_rounding": dtype is torch.bfloat16,
        "seed": 5,
    }
    whole = table().to(dtype)
    expected = train(whole, cls(whole.parameters(), **options), 6)
    first = table().to(dtype)
    optimizer = cls(first.parameters(), **options)
    train(first, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = table(seed=1).to(dtype)
    resumed = cls(second.parameters(), **options)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert torch.equal(train(second, resumed, 3, start=3), expected)
    assert torch.equal(second.occurrences, whole.occurrences)
    for state in resumed.state.values():
        assert all(value.dtype is torch.float32 for name, value in state.items() if name != "seed")


@pytest.mark.parametrize("cls", ALL)
def test_copies_and_pickles_go_on_alike(cls, table):
    layer = table()
    optimizer = cls(layer.parameters(), lr=0.1)
    train(layer, optimizer, 2)
    both = {"layer": layer, "optimizer": optimizer}
    copies = [copy.deepcopy(both), pickle.loads(pickle.dumps(both))]
    expected = train(layer, optimizer, 2, start=2)
    for made in copies:
        assert torch.equal(train(made["layer"], made["optimizer"], 2, start=2), expected)


def test_schedulers_groups_and_closures(table):
    a, b = table(0).double(), table(1).double()
    optimizer = SparseSGD([{"params": a.parameters()}, {"params": b.parameters(), "lr": 0.0}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before_a, before_b = a.weight.detach().clone(), b.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(a, 0) + loss_of(b, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    first = a.weight.detach() - before_a
    assert torch.equal(b.weight, before_b)
    scheduler.step()
    with torch.no_grad():
        a.weight.copy_(before_a)
    optimizer.step(closure)
    torch.testing.assert_close(a.weight.detach() - before_a, first / 2)


@pytest.mark.parametrize("cls", ALL)
def test_grad_scaler_unscales_and_skips_a_bad_step_whole(cls, table):
    plain, scaled = table(), table()
    train(plain, cls(plain.parameters(), lr=0.1, regularizer="l2", reg_lambda=0.2), 1)
    optimizer = cls(scaled.parameters(), lr=0.1, regularizer="l2", reg_lambda=0.2)
    scaler = torch.amp.GradScaler(scaled.weight.device.type, init_scale=1024.0)
    scaler.scale(loss_of(scaled, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(scaled.weight, plain.weight)
    weight, state = scaled.weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    (scaler.scale(loss_of(scaled, 1)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(scaled.weight, weight)
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state[index][name]), name
    assert scaler.get_scale() == 512.0


def test_nothing_changes_when_any_table_of_the_step_is_wrong(table):
    good = table(0)
    bad = nn.Embedding(30, 5).to(good.weight)  # dense gradient
    optimizer = SparseSGD([*good.parameters(), *bad.parameters()], lr=0.1)
    before = good.weight.detach().clone()
    (loss_of(good, 0) + loss_of(bad, 0)).backward()
    with pytest.raises(TypeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(good.weight, before)
    assert not optimizer.state


def test_an_interrupted_step_can_be_neither_saved_nor_continued(monkeypatch, table):
    """The second of two tables fails: the first has moved on, so the pair is no state of any training."""
    a, b = table(0), table(1)
    optimizer = SparseAdam([*a.parameters(), *b.parameters()], lr=0.1)
    good = copy.deepcopy(optimizer.state_dict())
    (loss_of(a, 0) + loss_of(b, 0)).backward()
    run, calls = api.PreparedUpdate.run, []

    def fail(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(self)

    monkeypatch.setattr(api.PreparedUpdate, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for forbidden in (optimizer.state_dict, optimizer.step, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(RuntimeError, match="interrupted"):
            forbidden()
    optimizer.load_state_dict(good)
    optimizer.step()
    assert optimizer.state_dict()["state"][1]["step"] == 1


def test_padding_of_the_module_and_of_the_group_must_agree(table):
    layer = table(padding_idx=3)
    with pytest.raises(ValueError, match="contradicts"):
        SparseSGD(layer.parameters(), lr=0.1, padding_idx=4)
    SparseSGD(layer.parameters(), lr=0.1, padding_idx=3)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_the_plan_of_the_forward_pass_is_used(index, monkeypatch, table):
    layer = table(hoist_plan=True)
    optimizer = SparseSGD(layer.parameters(), lr=0.1)
    ids = torch.tensor([[1, 2], [2, 3]], dtype=index, device=layer.weight.device)
    layer(ids).backward(torch.randn(2, 2, 5, device=ids.device))
    monkeypatch.setattr(api.SparsePlan, "build", lambda *a, **k: pytest.fail("sorted again"))
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizer": "elastic"}, "regularizer"),
        ({"decay": "both"}, "decay"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"reg_lambda": -0.1}, "reg_lambda"),
        ({"backend": "cuda"}, "backend"),
        ({"occurrences": torch.ones(3, dtype=torch.long)}, "occurrences"),
    ],
)
def test_options_that_do_not_fit_raise_at_once(options, message, table):
    with pytest.raises(ValueError, match=message):
        SparseSGD(table().parameters(), **{"lr": 0.1, **options})


def test_mba_needs_counts():
    with pytest.raises(ValueError, match="MBAEmbedding"):
        SparseSGD(nn.Embedding(4, 2, sparse=True).parameters(), lr=0.1, regularizer="mba", reg_lambda=0.1)
    with pytest.raises(ValueError, match="embedding tables"):
        SparseSGD(nn.Linear(3, 3).parameters(), lr=0.1)  # its bias is no table


@pytest.mark.parametrize("how", ["from_embedding", "deepcopy", "pickle", "assigned"])
def test_optimizers_may_be_built_before_the_first_forward(how, table):
    """However a module came by its table, an optimizer finds its counts."""
    layer = table(occurrences=torch.full((30,), 4))
    made = {
        "from_embedding": lambda: MBAEmbedding.from_embedding(
            nn.Embedding(30, 5).to(layer.weight), layer.occurrences.clone()
        ),
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "assigned": lambda: copy.deepcopy(layer),
    }[how]()
    if how == "assigned":
        made.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    before = made.weight.detach().clone()
    optimizer = SparseSGD(made.parameters(), lr=0.5, regularizer="mba", reg_lambda=0.8)
    (made(torch.tensor([3], device=before.device)) * 0).sum().backward()
    optimizer.step()
    before[3] *= 1 - 0.5 * 0.8 / 4
    torch.testing.assert_close(made.weight.detach(), before)


# -- update in backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_update_in_backward_gives_the_same_numbers_and_leaves_no_gradient(cls, table):
    options = {"lr": 0.1, "regularizer": "mba", "reg_lambda": 0.3}
    plain, fused = table(), table(hoist_plan=True)
    expected = train(plain, cls(plain.parameters(), **options), 4)
    optimizer = cls(fused.parameters(), **options)
    fused.update_in_backward(optimizer)
    assert torch.equal(train(fused, optimizer, 4), expected)
    assert fused.weight.grad is None


def test_update_in_backward_refuses_what_it_cannot_honour(table):
    layer = table()
    optimizer = SparseSGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds this module's weight"):
        layer.update_in_backward(SparseSGD(table(1).parameters(), lr=0.1))
    layer.update_in_backward(optimizer)
    loss = loss_of(layer, 0)
    with pytest.raises(RuntimeError, match="looked up twice"):
        loss_of(layer, 1)
    loss.backward(retain_graph=True)
    changed = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()
    assert torch.equal(layer.weight, changed)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 0.0)
    optimizer.step()
    late = loss_of(layer, 2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before its backward"):
        late.backward()
    layer.update_in_backward(None)
    train(layer, optimizer, 1)


def test_hoisted_plan_is_used_once_and_only_for_its_ids(table):
    plain, hoisted = table(), table(hoist_plan=True)
    expected = train(plain, SparseAdam(plain.parameters()), 3)
    assert torch.equal(train(hoisted, SparseAdam(hoisted.parameters()), 3), expected)
    assert hoisted._plan is None or not hoisted._plan.made_from(
        torch.zeros(24, dtype=torch.long, device=hoisted.weight.device)
    )


def test_public_names():
    assert set(din_kernels.optim.__all__) == {cls.__name__ for cls in ALL}
