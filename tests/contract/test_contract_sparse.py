"""The sparse update as a stranger would check it: random ids and options against a loop over rows in float64 NumPy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import din_kernels
from din_kernels.functional import sparse_update_


def step_by_loops(
    weight, ids, grad, state, *, lr, optimizer, regularizer, reg_lambda, occurrences, grad_scale, decay, padding_idx
):
    """One step, row by row, in place on float64 arrays. ``state``: dict of arrays, "step" counted here."""
    rows = {}
    for position, row in enumerate(ids):
        if row >= 0 and row != padding_idx:
            rows.setdefault(int(row), []).append(position)
    if optimizer == "adam":
        state["step"] += 1
    for row, positions in rows.items():
        g = grad_scale * grad[positions].sum(0)
        factor = {
            None: 0.0,
            "mba": reg_lambda / max(int(occurrences[row]), 1),
            "l2": reg_lambda,
            "difacto": reg_lambda * len(positions),
        }[regularizer]
        old = weight[row].copy()
        if decay == "coupled":
            g = g + factor * old
        if optimizer == "sgd":
            change = lr * g
        elif optimizer == "adagrad":
            state["sum"][row] += g**2
            change = lr * g / (np.sqrt(state["sum"][row]) + 1e-10)
        elif optimizer == "rowwise_adagrad":
            state["sum"][row] += (g**2).mean()
            change = lr * g / (np.sqrt(state["sum"][row]) + 1e-10)
        else:
            state["exp_avg"][row] = 0.9 * state["exp_avg"][row] + 0.1 * g
            state["exp_avg_sq"][row] = 0.999 * state["exp_avg_sq"][row] + 0.001 * g**2
            t = state["step"]
            bias = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            change = lr * bias * state["exp_avg"][row] / (np.sqrt(state["exp_avg_sq"][row]) + 1e-8)
        if decay == "decoupled":
            change = change + lr * factor * old
        weight[row] = old - change


def draw_ids(rng, vocabulary):
    n = rng.choice([0, 1, 5, 31, 32, 33, 64, 65, 130, 300])
    kind = rng.choice(["uniform", "same", "skewed", "sorted"])
    if kind == "same":
        return [rng.randrange(vocabulary)] * n
    ids = [
        rng.randrange(-1, vocabulary) if kind != "skewed" else min(vocabulary - 1, int(rng.expovariate(1)))
        for _ in range(n)
    ]
    return sorted(ids) if kind == "sorted" else ids


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sparse_update(seed, backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    rng = random.Random(2000 + seed)
    numbers = np.random.default_rng(seed)
    dtype = torch.float64 if backend == "torch" else torch.float32
    vocabulary, width = rng.choice([1, 3, 50, 500]), rng.choice([1, 3, 8, 18, 64])
    optimizer = rng.choice(["sgd", "adagrad", "rowwise_adagrad", "adam"])
    options = {
        "lr": 0.1,
        "optimizer": optimizer,
        "regularizer": rng.choice([None, "mba", "l2", "difacto"]),
        "reg_lambda": 0.3,
        "grad_scale": rng.choice([1.0, 0.25]),
        "decay": rng.choice(["coupled", "decoupled"]),
        "padding_idx": rng.choice([None, 0, vocabulary - 1]),
    }
    index = rng.choice([torch.int32, torch.int64])
    weight = torch.from_numpy(numbers.standard_normal((vocabulary, width))).to(device, dtype)
    occurrences = torch.from_numpy(numbers.integers(0, 9, vocabulary)).to(device, index)
    expected = weight.double().cpu().numpy().copy()
    shape = (vocabulary,) if optimizer == "rowwise_adagrad" else (vocabulary, width)
    names = {"sgd": [], "adam": ["exp_avg", "exp_avg_sq"]}.get(optimizer, ["sum"])
    wanted_state = {name: np.zeros(shape) for name in names} | ({"step": 0} if optimizer == "adam" else {})
    state = {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}
    if optimizer == "adam":
        state["step"] = torch.zeros((), dtype=torch.float32)
    untouched = np.ones(vocabulary, bool)
    for _ in range(3):
        ids = draw_ids(rng, vocabulary)
        grad = numbers.standard_normal((len(ids), width))
        step_by_loops(expected, ids, grad, wanted_state, occurrences=occurrences.cpu().numpy(), **options)
        untouched[[i for i in ids if i >= 0 and i != options["padding_idx"]]] = False
        start = weight.clone()
        sparse_update_(
            weight,
            torch.tensor(ids, dtype=index, device=device),
            torch.from_numpy(grad).to(device, dtype),
            state=state or None,
            occurrences=occurrences,
            backend=backend,
            **options,
        )
        assert torch.equal(weight[torch.from_numpy(untouched)], start[torch.from_numpy(untouched)])
    exact = dtype == torch.float64
    np.testing.assert_allclose(
        weight.double().cpu().numpy(), expected, rtol=1e-6 if exact else 2e-4, atol=1e-8 if exact else 2e-5
    )


@pytest.mark.parametrize("name", ["SparseSGD", "SparseAdagrad", "SparseRowwiseAdagrad", "SparseAdam"])
@pytest.mark.parametrize("regularizer", [None, "mba", "l2", "difacto"])
def test_optimizers_over_mba_embedding(name, regularizer, device):
    torch.manual_seed(3)
    occurrences = torch.randint(0, 5, (40,))
    table = din_kernels.MBAEmbedding(40, 6, occurrences=occurrences, padding_idx=0).to(device)
    optimizer = getattr(din_kernels.optim, name)(table.parameters(), lr=0.05, regularizer=regularizer, reg_lambda=0.2)
    kind = {
        "SparseSGD": "sgd",
        "SparseAdagrad": "adagrad",
        "SparseRowwiseAdagrad": "rowwise_adagrad",
        "SparseAdam": "adam",
    }[name]
    expected = table.weight.detach().double().cpu().numpy().copy()
    shape = (40,) if kind == "rowwise_adagrad" else (40, 6)
    state = {"sum": np.zeros(shape), "exp_avg": np.zeros(shape), "exp_avg_sq": np.zeros(shape), "step": 0}
    for _ in range(4):
        ids = torch.randint(0, 40, (5, 7))
        weights = torch.randn(5, 7, 6)
        optimizer.zero_grad()
        (table(ids.to(device)) * weights.to(device)).sum().backward()
        optimizer.step()
        step_by_loops(
            expected, ids.reshape(-1).tolist(), weights.reshape(-1, 6).double().numpy(), state, lr=0.05, optimizer=kind,
            regularizer=regularizer, reg_lambda=0.2, occurrences=occurrences.numpy(), grad_scale=1.0, decay="coupled",
            padding_idx=0,
        )  # fmt: skip
    np.testing.assert_allclose(table.weight.detach().double().cpu().numpy(), expected, rtol=2e-4, atol=2e-5)
