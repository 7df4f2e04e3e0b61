"""Metrics of the paper: AUC, user-weighted AUC (GAUC, eq. 10), RelaImpr (eq. 11), logloss. All on numpy arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class UserAUC:
    """GAUC with what it rests on. ``users_left_out`` have positives only or negatives only: no AUC is defined."""

    gauc: float
    users: int
    users_left_out: int
    impressions_left_out: int


@dataclass(frozen=True)
class Scores:
    gauc: float
    auc: float
    logloss: float
    users: int
    users_left_out: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def _checked(labels: Array, scores: Array, users: Array | None = None) -> tuple[Array, Array]:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1 or (users is not None and np.shape(users) != labels.shape):
        shapes = [labels.shape, scores.shape] + ([] if users is None else [np.shape(users)])
        raise ValueError(f"labels, scores and users must be one-dimensional and equally long, got {shapes}")
    if np.isnan(scores).any():
        raise ValueError(
            f"scores holds {int(np.isnan(scores).sum())} NaN: training has diverged, lower the learning rate"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    return labels.astype(bool), scores


def auc(labels: Array, scores: Array) -> float:
    """Area under the ROC curve over all impressions (scikit-learn's); NaN where only one class is present."""
    from sklearn.metrics import roc_auc_score

    labels, scores = _checked(labels, scores)
    if labels.all() or not labels.any():
        return float("nan")
    return float(roc_auc_score(labels, scores))


def mean_ranks(values: Array, group: Array) -> Array:
    """Rank of each value [N] among those of its group [N] (0, 1, …; in any order), from 1; ties share their mean rank."""
    order = np.lexsort((values, group))
    values, group = values[order], group[order]
    size = np.bincount(group)
    first_of_group = np.cumsum(size) - size
    new_run = np.ones(len(group), dtype=bool)
    new_run[1:] = (group[1:] != group[:-1]) | (values[1:] != values[:-1])
    run = np.cumsum(new_run) - 1
    first = np.flatnonzero(new_run)
    last = np.append(first[1:], len(group)) - 1
    rank = np.empty(len(group))
    rank[order] = (first + last)[run] / 2 + 1 - first_of_group[group]
    return rank


def grouped_spearman(one: Array, other: Array, group: Array) -> Array:
    """Spearman's rank correlation of two score lists [N] within each group [N]: [G], NaN where either is constant."""
    a, b = mean_ranks(np.asarray(one), group), mean_ranks(np.asarray(other), group)
    size = np.maximum(np.bincount(group), 1)
    a, b = (r - ((size + 1) / 2)[group] for r in (a, b))  # ranks of n values, ties shared, always have mean (n + 1)/2
    spread = np.sqrt(np.bincount(group, a * a) * np.bincount(group, b * b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, np.bincount(group, a * b) / spread, np.nan)


def user_auc(labels: Array, scores: Array, users: Array) -> UserAUC:
    """GAUC = Σ_i impressions_i · AUC_i / Σ_i impressions_i over the users i who have both classes (paper eq. 10).

    By ranks, without a loop over users: with the positives' ranks r among the user's P + N impressions (ties share
    their mean rank), AUC = (Σ r − P(P + 1)/2) / (P·N).
    """
    labels, scores = _checked(labels, scores, users)
    if labels.size == 0:
        return UserAUC(float("nan"), 0, 0, 0)
    _, user = np.unique(users, return_inverse=True)
    impressions = np.bincount(user)
    rank = mean_ranks(scores, user)

    positives = np.bincount(user, weights=labels)
    negatives = impressions - positives
    defined = (positives > 0) & (negatives > 0)
    rank_sum = np.bincount(user, weights=np.where(labels, rank, 0.0))
    pairs = np.where(defined, positives * negatives, 1.0)
    each = (rank_sum - positives * (positives + 1) / 2) / pairs
    weight = impressions * defined
    gauc = float((weight * each).sum() / weight.sum()) if weight.any() else float("nan")
    return UserAUC(gauc, int(defined.sum()), int((~defined).sum()), int(impressions[~defined].sum()))


def logloss(labels: Array, logits: Array) -> float:
    """Mean negative log-likelihood from logits, without ever forming a probability that rounds to 0 or 1."""
    labels, logits = _checked(labels, logits)
    return float(np.mean(np.logaddexp(0.0, logits * np.where(labels, -1.0, 1.0)))) if labels.size else float("nan")


def rela_impr(measured: float, base: float) -> float:
    """Relative improvement over ``base`` as a fraction (paper eq. 11): (measured − ½) / (base − ½) − 1."""
    if base == 0.5:
        return float("nan")
    return (measured - 0.5) / (base - 0.5) - 1.0


def evaluate_scores(labels: Array, logits: Array, users: Array) -> Scores:
    by_user = user_auc(labels, logits, users)
    return Scores(by_user.gauc, auc(labels, logits), logloss(labels, logits), by_user.users, by_user.users_left_out)
