"""LR, Wide & Deep, PNN and DeepFM: what tells them apart, each against an independent computation."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from reference.data import Batch, ClickData, gather_batch
from reference.models import LR, ModelConfig, build, schema_of
from reference.models.common import fields_of, sum_pool
from reference.models.deepfm import pairwise_products
from reference.models.wide_deep import cross_ids

SMALL = ModelConfig(field_dim=4, unit_hidden=(8,), mlp_hidden=(16, 8))


def batch_of(data: ClickData, rows: int = 40) -> Batch:
    return gather_batch(data, data.train.take(np.arange(100, 100 + rows)))


def one_hot(data: ClickData, batch: Batch) -> np.ndarray:
    """LR's design matrix, written out: candidate item and category, behaviours' items and categories, profile."""
    offsets = batch.offsets.tolist()
    widths = [data.num_items, data.num_categories, data.num_items, data.num_categories, *data.profile_sizes]
    start = np.cumsum([0, *widths])
    x = np.zeros((len(batch), start[-1]))
    for row in range(len(batch)):
        x[row, start[0] + int(batch.item[row])] += 1
        x[row, start[1] + int(batch.category[row])] += 1
        for at in range(offsets[row], offsets[row + 1]):
            x[row, start[2] + int(batch.history_item[at])] += 1
            x[row, start[3] + int(batch.history_category[at])] += 1
        for field, value in enumerate(batch.profile[row].tolist()):
            x[row, start[4 + field] + value] += 1
    return x


def test_lr_is_logistic_regression(tiny: ClickData) -> None:
    """Logits by the design matrix; with an l2 penalty, the optimum is scikit-learn's."""
    from sklearn.linear_model import LogisticRegression

    batch = gather_batch(tiny, tiny.train.take(np.arange(300)))
    x, y = one_hot(tiny, batch), batch.label.numpy()
    model = build("lr", schema_of(tiny), SMALL)
    assert isinstance(model, LR)
    assert float(model(batch).detach().abs().max()) == 0.0  # a convex model starts at 0

    weights = [*model.linear.parameters()]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = len(batch) * model.loss(batch) + 0.5 * sum((w.square().sum() for w in weights), torch.zeros(()))
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(x, y)
    # float32 gradients cannot place a flat optimum more closely; coefficients range over ±1, logits over ±4.
    np.testing.assert_allclose(model(batch).detach().numpy(), exact.decision_function(x), atol=1e-2)
    tables = [model.linear.items.item.weight, model.linear.items.category.weight]
    columns = [
        *(t[:, 0] for t in tables),
        *(t[:, 1] for t in tables),
        *(p.weight[:, 0] for p in model.linear.profile.tables),
    ]
    np.testing.assert_allclose(torch.cat(columns).detach().numpy(), exact.coef_[0], atol=1e-2)


def test_cross_ids_are_exact_when_they_fit_and_spread_when_hashed() -> None:
    first, second = (torch.tensor(x).reshape(-1) for x in np.meshgrid(np.arange(30), np.arange(20), indexing="ij"))
    exact = cross_ids(first, second, 30, 20, 1024)
    assert sorted(exact.tolist()) == list(range(600))
    hashed = cross_ids(first, second, 30, 20, 64)
    assert int(hashed.min()) >= 0
    assert int(hashed.max()) < 64
    # 600 pairs over 64 rows: 9.4 a row. An even hash leaves no row with more than a few times that.
    assert int(torch.bincount(hashed, minlength=64).max()) < 25
    far = torch.tensor([3_000_000_000 - 1])
    assert 0 <= int(cross_ids(far, far, 3_000_000_000, 3_000_000_000, 2**18)) < 2**18


def test_wide_part_adds_the_weight_of_every_pair(tiny: ClickData) -> None:
    model = build("wide-deep", schema_of(tiny), SMALL).eval()
    batch = batch_of(tiny)
    deep = model(batch).detach()
    for table in model.wide:
        torch.nn.init.normal_(table.weight)
    item, category = (table.weight.detach()[:, 0].tolist() for table in model.wide)
    offsets = batch.offsets.tolist()
    by_hand = [
        sum(
            item[int(batch.history_item[at]) * tiny.num_items + int(batch.item[row])]
            + category[int(batch.history_category[at]) * tiny.num_categories + int(batch.category[row])]
            for at in range(offsets[row], offsets[row + 1])
        )
        for row in range(len(batch))
    ]
    torch.testing.assert_close(model(batch).detach() - deep, torch.tensor(by_hand), rtol=1e-4, atol=1e-4)


def embedded_fields(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    candidate = model.items(batch.item, batch.category)
    pooled = sum_pool(model.items(batch.history_item, batch.history_category), batch.offsets)
    return fields_of(model.profile(batch.profile), candidate, pooled, 4)


def test_fm_term_equals_the_sum_over_pairs() -> None:
    fields = torch.randn(7, 5, 3, dtype=torch.float64)
    pairs = [(fields[:, f] * fields[:, g]).sum(-1) for f, g in itertools.combinations(range(5), 2)]
    torch.testing.assert_close(pairwise_products(fields), torch.stack(pairs).sum(0))


def test_deepfm_is_the_sum_of_its_three_parts(tiny: ClickData) -> None:
    model = build("deepfm", schema_of(tiny), SMALL).eval()
    for parameter in model.linear.parameters():
        torch.nn.init.normal_(parameter)
    batch = batch_of(tiny)
    fields = embedded_fields(model, batch)
    pairs = sum((fields[:, f] * fields[:, g]).sum(-1) for f, g in itertools.combinations(range(fields.shape[1]), 2))
    weights = torch.cat(
        [t.weight[:, c] for c in (0, 1) for t in (model.linear.items.item, model.linear.items.category)]
        + [t.weight[:, 0] for t in model.linear.profile.tables]
    )
    linear = torch.from_numpy(one_hot(tiny, batch)).float() @ weights
    torch.testing.assert_close(model(batch), linear + pairs + model.mlp(fields.flatten(1)), rtol=1e-4, atol=1e-4)


def test_pnn_feeds_all_inner_products_of_fields(tiny: ClickData) -> None:
    model = build("pnn", schema_of(tiny), SMALL).eval()
    batch = batch_of(tiny)
    seen = []
    model.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch)
    fields = embedded_fields(model, batch)
    count = fields.shape[1]
    assert count == 1 + 4
    pairs = [(fields[:, f] * fields[:, g]).sum(-1) for f, g in itertools.combinations(range(count), 2)]
    torch.testing.assert_close(seen[0], torch.cat([fields.flatten(1), torch.stack(pairs, 1)], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["base", "wide-deep", "pnn", "deepfm"])
def test_pooling_is_a_choice(tiny: ClickData, name: str) -> None:
    batch = batch_of(tiny)
    by_sum, by_mean = (
        build(name, schema_of(tiny), dataclasses.replace(SMALL, pooling=p)).eval() for p in ("sum", "mean")
    )
    by_mean.load_state_dict(by_sum.state_dict())
    assert not torch.allclose(by_sum(batch), by_mean(batch))
    one = gather_batch(tiny, tiny.train.take(np.flatnonzero(tiny.train.history_lengths() == 1)))
    torch.testing.assert_close(by_sum(one), by_mean(one))
    with pytest.raises(ValueError, match="pooling must be one of sum, mean, got 'max'"):
        dataclasses.replace(SMALL, pooling="max")
    with pytest.raises(ValueError, match="wide_buckets must be a power of two, got 1000"):
        dataclasses.replace(SMALL, wide_buckets=1000)


def test_parameter_counts(tiny: ClickData) -> None:
    """The formulas of the docstrings: items 1,000, categories 20, profile (3, 5), field_dim 8, MLP 200-80, PReLU."""
    from reference.models import Schema

    schema, config = Schema(1000, 20, (3, 5)), ModelConfig(activation="prelu")
    ids, fields = 1000 + 20 + 3 + 5, 2 + 4
    hidden = 200 + 1 + 200 * 80 + 80 + 1 + 80 + 1  # everything above the first hidden layer's weights; a PReLU has 1
    base = 8 * ids + 8 * fields * 200 + hidden
    linear = 2 * (1000 + 20) + 3 + 5
    d = 16
    expected = {
        "lr": linear + 1,
        "base": base,
        "base-mean": base,
        "wide-deep": base + 2**18 + 20 * 20,
        "pnn": base + fields * (fields - 1) // 2 * 200,
        "deepfm": base + linear,
        "din": base + d * (d + 2) * 36 + 36 + 1 + 36 + 1,
    }
    counted = {name: sum(p.numel() for p in build(name, schema, config).parameters()) for name in expected}
    assert counted == expected
