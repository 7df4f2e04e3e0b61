"""Metrics against scikit-learn user by user, and against sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from reference import metrics


def gauc_by_loop(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> tuple[float, int, int]:
    total = weight = 0.0
    counted = left_out = 0
    for user in np.unique(users):
        own = users == user
        if labels[own].min() == labels[own].max():
            left_out += 1
            continue
        counted += 1
        total += own.sum() * roc_auc_score(labels[own], scores[own])
        weight += own.sum()
    return (total / weight if weight else math.nan), counted, left_out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(st.integers(-3, 12), st.booleans(), st.integers(-4, 4)),
        min_size=1,
        max_size=120,
    )
)
def test_gauc_equals_a_loop_over_users_with_many_ties(rows: list[tuple[int, bool, int]]) -> None:
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    labels, scores = labels.astype(float), scores / 3
    expected, counted, left_out = gauc_by_loop(labels, scores, users)
    got = metrics.user_auc(labels, scores, users)
    assert (got.users, got.users_left_out) == (counted, left_out)
    # Ranks are small integers and halves: the only rounding is one division per user and the weighted sum.
    assert got.gauc == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_gauc_by_hand() -> None:
    # User 1: two positives (0.9, 0.4), one negative (0.5): one of two pairs is in order, AUC 1/2, 3 impressions.
    # User 2: positive 0.3 and negative 0.3: a tie, AUC 1/2, 2 impressions. User 3: positives only, left out.
    # User 4: positive 0.8 over negatives 0.1, 0.2, 0.3: AUC 1, 4 impressions.
    users = np.array([1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4])
    labels = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0])
    scores = np.array([0.9, 0.4, 0.5, 0.3, 0.3, 0.1, 0.2, 0.8, 0.1, 0.2, 0.3])
    got = metrics.user_auc(labels, scores, users)
    assert got.gauc == pytest.approx((3 * 0.5 + 2 * 0.5 + 4 * 1.0) / 9)
    assert (got.users, got.users_left_out, got.impressions_left_out) == (3, 1, 2)


def test_gauc_does_not_depend_on_the_order_or_on_monotone_maps() -> None:
    rng = np.random.default_rng(3)
    users, labels, scores = rng.integers(0, 30, 900), rng.integers(0, 2, 900), rng.normal(size=900).round(1)
    shuffle = rng.permutation(900)
    one = metrics.user_auc(labels, scores, users).gauc
    assert metrics.user_auc(labels[shuffle], scores[shuffle], users[shuffle]).gauc == pytest.approx(one, abs=1e-13)
    assert metrics.user_auc(labels, np.exp(scores), users).gauc == pytest.approx(one, abs=1e-13)
    assert metrics.user_auc(labels, -scores, users).gauc == pytest.approx(1 - one, abs=1e-13)


def test_no_user_with_both_classes_is_nan_and_counted() -> None:
    got = metrics.user_auc(np.array([1, 1, 0]), np.zeros(3), np.array([1, 1, 2]))
    assert math.isnan(got.gauc)
    assert got.users_left_out == 2


def test_auc_and_logloss_against_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    labels, logits = rng.integers(0, 2, 500), rng.normal(size=500) * 3
    assert metrics.auc(labels, logits) == roc_auc_score(labels, logits)
    assert metrics.logloss(labels, logits) == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))), rel=1e-12)
    assert math.isnan(metrics.auc(np.ones(4), np.arange(4.0)))


def test_logloss_stays_finite_where_probabilities_round_to_one() -> None:
    assert metrics.logloss(np.array([0.0]), np.array([800.0])) == pytest.approx(800.0)
    assert metrics.logloss(np.array([1.0]), np.array([800.0])) == 0.0


def test_rela_impr_is_the_papers_number() -> None:
    # Table 5: DIN with MBA and Dice 0.6083 over BaseModel 0.5970 is 11.65 %.
    assert 100 * metrics.rela_impr(0.6083, 0.5970) == pytest.approx(11.65, abs=0.005)
    assert math.isnan(metrics.rela_impr(0.6, 0.5))


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1, math.nan], "NaN"),
        ([0, 2], [0.1, 0.2], "labels must be 0 or 1"),
        ([0, 1, 1], [0.1, 0.2], "equally long"),
    ],
)
def test_bad_input_is_named(labels: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.user_auc(np.array(labels), np.array(scores), np.zeros(len(labels)))
