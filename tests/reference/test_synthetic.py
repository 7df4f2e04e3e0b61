"""The generated log: it is what its formula says, and DIN finds what was planted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from reference import training_loop
from reference.data import ClickData, SyntheticConfig, gather_batch, generate, load
from reference.data.synthetic import AFFINITIES, Planted, recovery, zipf_ranks
from reference.metrics import evaluate_scores, grouped_spearman
from reference.models import build, schema_of
from reference.options import Options

SMALL = SyntheticConfig(users=300, items=600, categories=12, behaviours=16, impressions=6, tests=4, seed=3)


@pytest.fixture(scope="module")
def small() -> tuple[ClickData, Planted]:
    return generate(SMALL, max_history=10)


def test_planted_logits_by_hand(small: tuple[ClickData, Planted]) -> None:
    data, planted = small
    logits, weights = planted.logits(data, data.test), planted.weights(data, data.test)
    at = 0
    for row in range(60):
        item = data.test.item[row]
        total = 0.0
        for behaviour in data.log_item[data.test.start[row] : data.test.stop[row]]:
            pair = data.item_category[behaviour], data.item_category[item]
            weight = float(planted.strength[behaviour]) * float(planted.affinity[pair])
            assert weights[at] == pytest.approx(weight)
            total, at = total + weight, at + 1
        expected = planted.bias + planted.quality[item] + planted.intensity * np.log(1 + total)
        assert logits[row] == pytest.approx(expected, rel=1e-6)


def test_affinity_is_a_directed_chain_of_full_rank(small: tuple[ClickData, Planted]) -> None:
    affinity = small[1].affinity
    assert not affinity[0].any()
    assert not affinity[:, 0].any()
    for row in affinity[1:]:
        assert sorted(row[row > 0].tolist()) == pytest.approx(sorted(AFFINITIES))
    assert np.linalg.matrix_rank(affinity[1:, 1:]) == SMALL.categories
    assert not np.array_equal(affinity, affinity.T)


def test_histories_end_before_the_click_and_within_the_user(small: tuple[ClickData, Planted]) -> None:
    data, _ = small
    assert len(data.train) == SMALL.users * SMALL.impressions
    assert len(data.test) == SMALL.users * SMALL.tests
    first, last = np.full(SMALL.users, 10**9), np.full(SMALL.users, -1)
    np.minimum.at(first, data.train.user, data.train.start)
    np.maximum.at(last, data.test.user, data.test.stop)
    for samples in (data.train, data.test):
        assert int(samples.history_lengths().max()) == 10  # max_history
        assert int(samples.history_lengths().min()) >= 1
        assert (samples.stop <= last[samples.user]).all()
        assert (samples.start >= first[samples.user]).all()
    assert (first[1:] >= last[:-1]).all()  # a user's log lies after the one before


def test_labels_follow_the_planted_probability(small: tuple[ClickData, Planted]) -> None:
    data, planted = generate(dataclasses.replace(SMALL, users=4000))
    probability = 1 / (1 + np.exp(-planted.logits(data, data.train)))
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (probability >= low) & (probability < low + 0.2)
        n, p = int(inside.sum()), float(probability[inside].mean())
        assert n > 500
        # Five standard deviations of the mean of n draws.
        assert abs(float(data.train.label[inside].mean()) - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_zipf_ranks_have_their_law() -> None:
    uniform = (np.arange(400_000) + 0.5) / 400_000
    for exponent in (0.7, 1.0, 1.4):
        counts = np.bincount(zipf_ranks(uniform, 50, exponent), minlength=50) / len(uniform)
        # The mass of rank r is the integral of x^−exponent over [r + 1, r + 2].
        grid = 1 + (np.arange(50 * 200) + 0.5) / 200
        mass = (grid**-exponent).reshape(50, 200).sum(1)
        np.testing.assert_allclose(counts, mass / mass.sum(), rtol=2e-3)
    assert int(zipf_ranks(np.array([np.nextafter(1, 0)]), 300_000_000, 1.1)[0]) == 300_000_000 - 1


def test_most_ids_are_rare() -> None:
    data, _ = generate(SyntheticConfig(users=2000, items=30_000))
    counts = np.bincount(data.log_item, minlength=data.num_items)[1:]
    assert np.median(counts[counts > 0]) <= 2
    assert np.sort(counts)[::-1][:300].sum() > 0.3 * counts.sum()  # 1 % of the ids hold a third of the behaviours


def test_a_function_of_its_config_alone() -> None:
    one, two = generate(SMALL), generate(SMALL)
    for field in ("train", "test"):
        a, b = getattr(one[0], field), getattr(two[0], field)
        assert all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    other = generate(dataclasses.replace(SMALL, seed=4))
    assert not np.array_equal(one[0].log_item, other[0].log_item)


def test_names_set_the_sizes() -> None:
    data = load("synthetic:users=50,items=90,categories=9,tail=1.5", max_history=5)
    assert (data.num_users, data.num_items, data.num_categories) == (50, 91, 10)
    assert SyntheticConfig.parse("synthetic:tail=1.5").tail == 1.5
    for name, message in (
        ("synthetic:user=5", "expected field=value with a field of users"),
        ("synthetic:users=many", "users must be int, got 'many'"),
        ("synthetic:users=0", "users must be at least 1"),
        ("synthetic:categories=3", "categories ≥ 6"),
    ):
        with pytest.raises(ValueError, match=message):
            SyntheticConfig.parse(name)


def test_grouped_spearman_is_scipys() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), rng.integers(2, 9, 40))
    one, other = rng.integers(0, 4, len(group)), rng.standard_normal(len(group))
    found = grouped_spearman(one, other, group)
    for number in range(40):
        own = group == number
        if len(np.unique(one[own])) == 1:
            assert np.isnan(found[number])
        else:
            assert found[number] == pytest.approx(spearmanr(one[own], other[own]).statistic)


def test_din_recovers_the_planted_weights() -> None:
    """Trained on clicks alone, the unit orders a user's behaviours as the planted weights do; untrained it does not."""
    data, planted = generate(SyntheticConfig(users=3000, items=600, categories=12, behaviours=20))
    samples = data.test.take(slice(0, 4000))
    batch, truth, sample = gather_batch(data, samples), planted.weights(data, samples), samples.positions()[0]
    options = Options(batch_size=256, epochs=4, lr=0.01, init_std=0.05, activation="prelu", interaction="product")
    torch.manual_seed(1)
    model = build("din", schema_of(data), options.model_config())

    def agreement() -> float:
        model.eval()
        with torch.no_grad():
            return recovery(model.activation_weights(batch).numpy(), truth, sample)  # type: ignore[operator]

    assert agreement() < 0.1
    result = training_loop.train(model, data, options, model_name="din", quiet=True)
    assert agreement() > 0.5
    best = evaluate_scores(data.test.label, planted.logits(data, data.test), data.test.user)
    torch.manual_seed(1)
    base = training_loop.train(build("base", schema_of(data), options.model_config()), data, options, quiet=True)
    assert base.scores.gauc + 0.01 < result.scores.gauc < best.gauc
