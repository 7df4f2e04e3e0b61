"""Models: they learn, every parameter takes part, and what must not matter does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from reference.data import Batch, ClickData, DataError, gather_batch, make_batch
from reference.models import MODELS, ModelConfig, Schema, build, schema_of
from reference.models.common import mean_pool, sum_pool

SMALL = ModelConfig(field_dim=4, unit_hidden=(8,), mlp_hidden=(16, 8), cross=True)


def batch_of(data: ClickData, rows: int = 40) -> Batch:
    return gather_batch(data, data.train.take(np.arange(100, 100 + rows)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ["dice", "prelu"])
@pytest.mark.parametrize("interaction", ["outer", "product"])
def test_gradient_reaches_every_parameter(tiny: ClickData, name: str, activation: str, interaction: str) -> None:
    config = dataclasses.replace(SMALL, activation=activation, interaction=interaction)
    model = build(name, schema_of(tiny), config)
    model.loss(batch_of(tiny)).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lr"])  # linear: test_baseline_models.py
@pytest.mark.parametrize("activation", ["dice", "prelu"])
def test_overfits_200_rows(tiny: ClickData, name: str, activation: str) -> None:
    rows = gather_batch(tiny, tiny.train.take(np.arange(200)))
    model = build(name, schema_of(tiny), dataclasses.replace(SMALL, activation=activation))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = float(model.loss(rows).detach())
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(rows)
        loss.backward()
        optimizer.step()
    assert first > 0.6
    # No label noise remains to explain: 200 rows, some 1,000 parameters.
    assert float(loss.detach()) < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_order_of_behaviours_does_not_matter(tiny: ClickData, name: str) -> None:
    model = build(name, schema_of(tiny), SMALL).double().eval()
    batch = batch_of(tiny)
    order = torch.cat(
        [a + torch.randperm(b - a) for a, b in zip(batch.offsets.tolist(), batch.offsets.tolist()[1:], strict=False)]
    )
    shuffled = dataclasses.replace(
        batch, history_item=batch.history_item[order], history_category=batch.history_category[order]
    )
    # float64 sums of at most 12 terms in another order.
    torch.testing.assert_close(_double(model, shuffled), _double(model, batch), rtol=1e-12, atol=1e-13)


def _double(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return model(batch)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_does_not_see_its_neighbours_in_evaluation(tiny: ClickData, name: str) -> None:
    model = build(name, schema_of(tiny), SMALL).eval()
    samples = tiny.train.take(np.arange(60))
    together = model(gather_batch(tiny, samples))
    alone = torch.cat([model(gather_batch(tiny, samples.take(np.array([i])))) for i in range(60)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)  # GEMMs of another height round differently


@pytest.mark.parametrize("softmax", [False, True])
def test_padding_does_not_matter(tiny: ClickData, softmax: bool) -> None:
    """The unit on padded keys, whatever the padding holds, equals the jagged one the model uses."""
    model = build("din", schema_of(tiny), dataclasses.replace(SMALL, softmax=softmax)).eval()
    batch = batch_of(tiny, 10)
    lengths = batch.offsets.diff()
    padded_item = torch.full((10, 15), 7)
    padded_category = torch.full((10, 15), 2)
    mask = torch.arange(15) < lengths[:, None]
    padded_item[mask], padded_category[mask] = batch.history_item, batch.history_category
    query = model.items(batch.item, batch.category)
    jagged = model.unit(query, model.items(batch.history_item, batch.history_category), offsets=batch.offsets)
    padded = model.unit(query, model.items(padded_item, padded_category), lengths=lengths)
    torch.testing.assert_close(jagged, padded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_empty_histories_train(tiny: ClickData, name: str) -> None:
    model = build(name, schema_of(tiny), SMALL)
    batch = make_batch(
        tiny, np.arange(6), np.arange(1, 7), np.array([0, 1] * 3, dtype=np.float32), np.zeros(0, int), np.zeros(7, int)
    )
    loss = model.loss(batch)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_pooling_by_hand() -> None:
    values, offsets = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, 2, 2, 3])
    assert sum_pool(values, offsets).tolist() == [[4.0, 6.0], [0.0, 0.0], [5.0, 6.0]]
    assert mean_pool(values, offsets).tolist() == [[2.0, 3.0], [0.0, 0.0], [5.0, 6.0]]


def test_din_pools_the_behaviours_by_its_weights(tiny: ClickData) -> None:
    model = build("din", schema_of(tiny), SMALL).eval()
    batch = batch_of(tiny)
    weights = model.activation_weights(batch)
    behaviours = model.items(batch.history_item, batch.history_category)
    pooled = model.unit(model.items(batch.item, batch.category), behaviours, offsets=batch.offsets)
    torch.testing.assert_close(sum_pool(weights[:, None] * behaviours, batch.offsets), pooled)


def test_ids_outside_the_tables_are_named(tiny: ClickData) -> None:
    model = build("din", Schema(20, 5, (3,)), SMALL)
    with pytest.raises(IndexError, match=r"item ids must lie in \[0, 20\)"):
        model(batch_of(tiny))
    with pytest.raises(ValueError, match="model must be one of"):
        build("transformer", schema_of(tiny), SMALL)
    with pytest.raises(DataError, match="offsets"):
        make_batch(tiny, np.zeros(1, int), np.ones(1, int), np.zeros(1, np.float32), np.ones(2, int), np.array([0, 3]))


def test_parameter_count_of_the_default_din(tiny: ClickData) -> None:
    """Tables + unit (D·(D + 2)·36 + 36, Dice 36, 36 + 1) + MLP (200-80 on profile, candidate, pooled)."""
    schema = Schema(1000, 20, (3, 5))
    d = 16
    tables = 8 * (1000 + 20 + 3 + 5)
    unit = d * (d + 2) * 36 + 36 + 36 + 36 + 1
    mlp = (16 + 2 * d) * 200 + 200 + 200 + 200 * 80 + 80 + 80 + 80 + 1
    model = build("din", schema, ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == tables + unit + mlp
