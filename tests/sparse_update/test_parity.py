"""Both backends against the step written row by row in float64; scratch memory is NaN throughout."""

from __future__ import annotations

import itertools

import pytest
import torch

from din_kernels.functional import sparse_update_
from din_kernels.ops.sparse_update import function
from din_kernels.ops.sparse_update.plan import SparsePlan
from din_kernels.testing import hostile_gradients

from ._cases import BORDER_RUNS, PATTERNS, problem, runs

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
REGULARIZERS = (None, "mba", "l2", "difacto")

pytestmark = pytest.mark.usefixtures("poison_scratch")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 and groups of 16: every way in which a run can be cut, from a few hundred occurrences."""
    monkeypatch.setattr(function, "CHUNK", 4)
    monkeypatch.setattr(function, "GROUP", 16)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_ids(name, backend, device):
    optimizer = OPTIMIZERS[list(PATTERNS).index(name) % 4]
    padding = 0 if "padding" in name else None
    problem(PATTERNS[name], 5, optimizer=optimizer, padding_idx=padding, device=device).check(backend)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_optimizers_and_regularizers(optimizer, regularizer, backend, device, small_chunks):
    """Runs over several chunks and over whole groups of them; both kinds of decay in turn."""
    ids = runs((1, 3, 4, 5, 210, 2, 9, 150))
    decay = ("coupled", "decoupled")[(OPTIMIZERS.index(optimizer) + REGULARIZERS.index(regularizer)) % 2]
    problem(ids, 3, optimizer=optimizer, regularizer=regularizer, decay=decay, device=device).check(backend)


@pytest.mark.parametrize(
    ("optimizer", "regularizer", "decay"), list(itertools.product(OPTIMIZERS, REGULARIZERS, ("coupled", "decoupled")))
)
def test_all_options_in_float64(optimizer, regularizer, decay):
    ids = runs(BORDER_RUNS)
    problem(
        ids, 6, optimizer=optimizer, regularizer=regularizer, decay=decay, padding_idx=4, dtype=torch.float64
    ).check("torch")


@pytest.mark.parametrize("run", [*range(1, 10), 61, 62, 63, 64, 65, 66, 67, 127, 128, 129, 190, 255, 257])
def test_a_run_at_every_place(run, device, small_chunks):
    """One row with ``run`` occurrences behind 0..3 others: begins and ends at every border of chunks and of groups."""
    pytest.importorskip("triton")
    place = run % 4
    ids = torch.cat([torch.arange(place), torch.full((run,), 7), torch.tensor([9, 9])])
    problem(ids, 2, regularizer="difacto", device=device).check("triton")


@pytest.mark.parametrize(
    ("width", "optimizer"),
    [
        *((width, "rowwise_adagrad") for width in (1, 2, 7, 8, 16, 18, 31, 32, 33, 100, 128, 257, 1024)),
        *((width, "adam") for width in (1, 18, 257)),
    ],
)
def test_widths(width, optimizer, backend, device, small_chunks):
    problem(torch.tensor([2, 0, 2, 2, 1, 2, 2]), width, optimizer=optimizer, device=device).check(backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_16_bit_tables(dtype, grad_dtype, backend, device):
    ids = runs((1, 33, 6))
    problem(ids, 9, optimizer="adam", dtype=dtype, grad_dtype=grad_dtype, index=torch.int32, device=device).check(
        backend
    )


def test_index_dtypes_give_the_same_bits(backend, device):
    ids = PATTERNS["sorted"]
    one, _ = problem(ids, 4, device=device).run(backend)
    other, _ = problem(ids, 4, index=torch.int32, device=device).run(backend)
    assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [3, 40_000, 3_000_000_000])
def test_plan_sorts_on_the_narrowest_keys(rows, backend, device):
    ids = torch.tensor([rows - 1, 0, 2, -1, 2, 1, 0, rows - 1])
    plan = SparsePlan.build(ids.to(device), rows, padding_idx=1, backend=backend)
    widths = {3: torch.int16, 40_000: torch.int32, 3_000_000_000: torch.int64}
    assert plan.keys.dtype is widths[rows]
    used = [i for i in range(8) if int(ids[i]) not in (-1, 1)]
    expected = sorted(used, key=lambda i: int(ids[i]))
    assert plan.order[: len(used)].tolist() == expected
    assert plan.keys[len(used) :].tolist() == [rows, rows]


def test_a_plan_made_before_gives_the_same_bits(backend, device):
    p = problem(PATTERNS["zipf"], 4, padding_idx=0, device=device)
    plan = SparsePlan.build(p.ids, p.weight.shape[0], padding_idx=0, backend=backend)
    assert torch.equal(p.run(backend, plan=plan)[0], p.run(backend)[0])
    with pytest.raises(ValueError, match="plan was made for"):
        p.run(backend, plan=plan, padding_idx=None)


def test_hostile_gradients(backend, device):
    ids = runs((1, 5, 34))
    for grad in hostile_gradients((40, 6), device=device):
        p = problem(ids, 6, device=device)
        p.grad = grad
        p.check(backend)


@pytest.mark.parametrize("shape", [(8, 5), (2, 4, 5)])
def test_ids_of_any_shape(shape, backend, device):
    p = problem(torch.arange(40) % 11, 3, device=device)
    flat, _ = p.run(backend)
    shaped, _ = p.run(backend, ids=p.ids.reshape(shape), grad=p.grad.reshape(*shape, 3))
    assert torch.equal(flat, shaped)


def test_hyper_parameters_on_the_device(backend, device):
    """Rate, scale and verdict as tensors give the bits that numbers give; a bad verdict changes nothing, step included."""
    p = problem(runs((1, 5, 34)), 4, optimizer="adam", device=device)
    expected, state = p.run(backend)
    on_device = {"lr": torch.tensor(0.1, device=device), "grad_scale": torch.tensor([0.5], device=device)}
    found, found_state = p.run(backend, found_inf=torch.zeros(1, device=device), **on_device)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert found_state["step"] == state["step"] == 5
    kept, kept_state = p.run(backend, found_inf=torch.ones(1, device=device), **on_device)
    assert torch.equal(kept, p.weight)
    assert all(torch.equal(value, p.state[name]) for name, value in kept_state.items())


def test_runs_are_bit_equal(backend, device):
    p = problem(PATTERNS["zipf"], 8, optimizer="adam", device=device)
    (one, state), (other, other_state) = p.run(backend), p.run(backend)
    assert torch.equal(one, other)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_rows_apart(backend, device):
    """A table that is the left part of a wider one: the right part keeps every bit."""
    p = problem(runs((1, 5, 34)), 6, device=device)
    expected, _ = p.run(backend)
    wide = torch.randn(p.weight.shape[0], 11, device=device)
    wide[:, :6] = p.weight
    right = wide[:, 6:].clone()
    p.weight = wide[:, :6]
    sparse_update_(p.weight, p.ids, p.grad, backend=backend, occurrences=p.occurrences, **p.options)
    assert torch.equal(wide[:, :6], expected)
    assert torch.equal(wide[:, 6:], right)
