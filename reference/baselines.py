"""Scores that need no model: what a network must beat to have learnt anything about a user."""

from __future__ import annotations

import numpy as np

from .data import ClickData
from .metrics import Scores, evaluate_scores

PRIOR_STRENGTH = 5.0  # impressions' worth of the global rate mixed into every item's own


def popularity(data: ClickData) -> Scores:
    """Rank by the number of positives an item has in the train part. The logit is log(1 + count) minus its mean."""
    positives = np.bincount(data.train.item, weights=data.train.label, minlength=data.num_items)
    score = np.log1p(positives)
    return _score(data, score - np.average(score, weights=np.bincount(data.train.item, minlength=data.num_items)))


def item_rate(data: ClickData) -> Scores:
    """Rank by an item's smoothed share of positives in the train part: the best that is the same for every user."""
    shown = np.bincount(data.train.item, minlength=data.num_items)
    positives = np.bincount(data.train.item, weights=data.train.label, minlength=data.num_items)
    prior = np.clip(data.train.label.mean(), 1e-6, 1 - 1e-6)
    rate = (positives + PRIOR_STRENGTH * prior) / (shown + PRIOR_STRENGTH)
    return _score(data, np.log(rate / (1 - rate)))


def _score(data: ClickData, item_logit: np.ndarray) -> Scores:
    return evaluate_scores(data.test.label, item_logit[data.test.item], data.test.user)


BASELINES = {"popularity": popularity, "item's mean label": item_rate}
