"""Regularizers against loops: who is penalised by how much, which ids are dropped, and what n_j counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from reference import train
from reference.data import Batch, ClickData, gather_batch
from reference.models import build, schema_of
from reference.regularizers import make, sample_counts
from tests.reference.test_trainer import TINY


def some_batch(data: ClickData) -> Batch:
    return gather_batch(data, data.train.take(np.arange(30, 36)))


def test_n_j_counts_samples_not_positions(tiny: ClickData) -> None:
    items, categories = np.zeros(tiny.num_items, int), np.zeros(tiny.num_categories, int)
    for row in range(len(tiny.train)):
        one = tiny.train.take(np.array([row]))
        held = {int(one.item[0]), *tiny.log_item[one.start[0] : one.stop[0]].tolist()}
        items[list(held)] += 1
        categories[list({int(tiny.item_category[i]) for i in held})] += 1
    item, category = sample_counts(tiny)
    assert item.tolist() == items.tolist()
    assert category.tolist() == categories.tolist()


@pytest.mark.parametrize("kind", ["l2", "mba", "difacto"])
def test_gradient_of_the_penalty_row_by_row(tiny: ClickData, kind: str) -> None:
    options = dataclasses.replace(TINY, regularizer=kind, reg_lambda=0.5)
    model = build("din", schema_of(tiny), options.model_config())
    batch = some_batch(tiny)
    penalty = make(options, tiny).penalty(model, batch)
    assert penalty is not None
    penalty.backward()
    counts = sample_counts(tiny)
    held = (
        (model.items.item, [*batch.item.tolist(), *batch.history_item.tolist()], counts[0]),
        (model.items.category, [*batch.category.tolist(), *batch.history_category.tolist()], counts[1]),
    )
    for table, ids, n in held:
        for row in range(table.num_embeddings):
            times = ids.count(row)
            factor = {"l2": 1.0, "mba": 1.0 / max(1, int(n[row])), "difacto": float(times)}[kind] if times else 0.0
            torch.testing.assert_close(table.weight.grad[row], 0.5 * factor * table.weight[row].detach())


def test_dropout_drops_ids_in_training_only(tiny: ClickData) -> None:
    regularizer = make(dataclasses.replace(TINY, regularizer="dropout", dropout=0.5), tiny)
    batch = gather_batch(tiny, tiny.train.take(np.arange(400)))
    assert regularizer.batch(batch, training=False) is batch
    dropped = regularizer.batch(batch, training=True)
    lost = dropped.history_item == 0
    assert torch.equal(dropped.history_item[~lost], batch.history_item[~lost])
    assert torch.equal(dropped.history_category, batch.history_category)
    # Binomial(n, ½): six standard deviations of √(n)/2.
    n = lost.numel()
    assert abs(int(lost.sum()) - n / 2) < 3 * n**0.5


def test_filter_maps_rare_ids_to_the_unknown_row(tiny: ClickData) -> None:
    counts = sample_counts(tiny)[0]
    threshold = int(counts[1:].median())
    regularizer = make(dataclasses.replace(TINY, regularizer="filter", min_count=threshold), tiny)
    batch = some_batch(tiny)
    for training in (True, False):
        mapped = regularizer.batch(batch, training=training)
        for before, after in ((batch.item, mapped.item), (batch.history_item, mapped.history_item)):
            assert after.tolist() == [i if int(counts[i]) >= threshold else 0 for i in before.tolist()]
    assert 0 in mapped.history_item.tolist()


@pytest.mark.parametrize("kind", ["mba", "dropout", "filter", "difacto"])
def test_every_regularizer_trains_and_repeats(tiny: ClickData, tmp_path: str, kind: str) -> None:
    options = dataclasses.replace(TINY, models=("din",), epochs=1, regularizer=kind, min_count=200, out=str(tmp_path))
    [one], [two] = (train.run(options, tiny, quiet=True) for _ in range(2))
    assert one.losses == two.losses
    [plain] = train.run(dataclasses.replace(options, regularizer="none"), tiny, quiet=True)
    assert one.losses != plain.losses
