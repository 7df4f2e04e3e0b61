"""Stochastic rounding of 16-bit tables: unbiased, seeded, the same on both backends and for every launch shape."""

from __future__ import annotations

import pytest
import torch

from din_kernels.functional import sparse_update_
from din_kernels.ops.sparse_update import function, torch_impl

from ._cases import runs

DTYPES = [torch.bfloat16, torch.float16]


def rounded(value: float, dtype: torch.dtype, seed: int = 0, rows: int = 4096, width: int = 16) -> torch.Tensor:
    """``value`` put into every element of a table [rows, width] of zeros by one SGD step."""
    table = torch.zeros(rows, width, dtype=dtype)
    sparse_update_(
        table, torch.arange(rows), torch.full((rows, width), -value), lr=1.0, stochastic_rounding=True, seed=seed,
        backend="torch",
    )  # fmt: skip
    return table.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "value", [1.0 + 2.0**-9 * 0.3, -3.14159, 0.1, 1e-3, 2.0**-15 * 1.2345, -(2.0**-20) * 1.7, 5e-7]
)
def test_unbiased(dtype, value):
    found = rounded(value, dtype)
    exact = float(torch.tensor(value))
    spread = found.unique()
    assert spread.numel() == 2
    low, high = float(spread[0]), float(spread[1])
    assert low < exact < high
    next_up = torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(float("inf"), dtype=dtype))
    assert float(next_up) == high
    chance = (exact - low) / (high - low)
    deviation = (chance * (1 - chance) / found.numel()) ** 0.5 * (high - low)
    assert abs(float(found.mean()) - exact) < 5 * deviation


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_fit_stay(dtype):
    for value in (0.0, 1.0, -0.375, 2.0**-14, 1024.0):
        assert bool((rounded(value, dtype) == value).all())
    for value in (float("inf"), float("-inf")):
        assert bool((rounded(value, dtype) == value).all())
    assert bool(rounded(float("nan"), dtype).isnan().all())


def test_seeds_rows_and_columns_are_independent():
    """Signs of deviations from ½ of 2¹⁶ draws, beside those of neighbours and of other seeds."""
    draws = {
        seed: torch_impl.noise(torch.tensor(seed), torch.arange(2048), 32).double() / 2**32 for seed in (0, 1, 2**40)
    }
    base = draws[0] - 0.5
    bound = 5 * (1 / 12) / base.numel() ** 0.5
    assert abs(float(base.mean())) < 5 * (1 / 12) ** 0.5 / base.numel() ** 0.5
    for other in (base.roll(1, 0), base.roll(1, 1), base.roll(1024, 0), draws[1] - 0.5, draws[2**40] - 0.5):
        assert abs(float((base * other).mean())) < bound
    histogram = torch.histc(draws[0], 64, 0, 1)
    expected = base.numel() / 64
    assert float(((histogram - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_launch_shapes_and_backends_give_the_same_bits(dtype, monkeypatch, device):
    """Sums of these gradients are exact, so any difference would come from the rounding."""
    pytest.importorskip("triton")
    ids = runs((1, 3, 40, 7)).to(device)
    grad = (torch.randint(-64, 65, (ids.numel(), 5)).float() / 4096).to(device)
    start = (torch.randint(-100, 101, (5, 5)) / 64).to(device, dtype)

    def update(backend: str, order: torch.Tensor, seed: int | torch.Tensor = 7) -> torch.Tensor:
        table = start.clone()
        sparse_update_(table, ids[order], grad[order], lr=0.125, stochastic_rounding=True, seed=seed, backend=backend)
        return table

    straight, shuffled = torch.arange(ids.numel(), device=device), torch.randperm(ids.numel(), device=device)
    expected = update("torch", straight)
    assert not torch.equal(expected, update("torch", straight, seed=8))
    assert torch.equal(update("torch", shuffled), expected)
    assert torch.equal(update("triton", straight), expected)
    assert torch.equal(update("triton", straight, seed=torch.tensor(7, device=device)), expected)
    monkeypatch.setattr(function, "CHUNK", 8)
    assert torch.equal(update("triton", shuffled), expected)


def test_a_decay_too_small_for_bfloat16_arrives_on_average():
    """(1 − 10⁻³)¹⁰⁰ = 0.905 with it; without it no step of 10⁻³ ever changes a one."""
    tables = {}
    for stochastic in (False, True):
        table = torch.ones(2048, 8, dtype=torch.bfloat16)
        for step in range(100):
            sparse_update_(
                table, torch.arange(2048), torch.zeros(2048, 8), lr=1.0, regularizer="l2", reg_lambda=1e-3,
                stochastic_rounding=stochastic, seed=step, backend="torch",
            )  # fmt: skip
        tables[stochastic] = float(table.double().mean())
    assert tables[False] == 1.0
    assert tables[True] == pytest.approx((1 - 1e-3) ** 100, abs=2e-3)
