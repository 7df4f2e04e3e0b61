"""A click log whose truth is known: local activation is planted, and most item ids are rare.

Whether user and candidate v meet in a click is decided by the paper's model of interest itself (eq. 3), with weights
that this module chooses:

    logit = bias + quality_v + intensity · log(1 + Σ_j a*(e_j, v)),  a*(e, v) = strength_e · affinity[category_e, category_v]

    affinity    1 for the same category, 0.6 and 0.3 for two others that follow it (a phone, its case, its charger: the
                relation is directed), 0 for all else. Its rank is the number of categories, so a sum of behaviours that
                does not know the candidate cannot hold it when embeddings are narrower than that.
    strength    log-normal, one per item: some behaviours say more than others
    quality     normal, one per item: what is left to learn, and to overfit, about a candidate's own id

Items of a category are drawn by Zipf's law with exponent ``tail``: a few are everywhere, most are seen a few times. So
DIN can be asked for the planted weights (``recovery``), a perfect model's scores are known (``Planted.logits``), and a
regularizer has rare ids to be good for.

``load("synthetic:users=20000,items=100000")`` sets any field of ``SyntheticConfig``. Generation is vectorised: the cost
is some arrays of the number of items and some of the number of samples, whatever the sizes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ..metrics import grouped_spearman
from .schema import ClickData, FloatArray, IntArray, Samples

AFFINITIES = (1.0, 0.6, 0.3)  # of the category itself, of the next one and of the one after that


@dataclass(frozen=True)
class SyntheticConfig:
    """Sizes and constants of a generated log; ``items`` may run to hundreds of millions.

    behaviours    a user's log holds between a quarter of this and this many behaviours
    interests     categories a user is interested in
    impressions   training samples a user, at random moments; ``tests`` more at the end of the log
    tail          Zipf exponent of an item's popularity within its category
    """

    users: int = 10_000
    items: int = 30_000
    categories: int = 30
    behaviours: int = 40
    interests: int = 4
    impressions: int = 10
    tests: int = 5
    tail: float = 1.0
    intensity: float = 1.5
    bias: float = -2.2
    quality: float = 0.7
    strength: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("users", "items", "categories", "behaviours", "interests", "impressions", "tests"):
            if getattr(self, name) < 1:
                raise ValueError(f"synthetic: {name} must be at least 1, got {getattr(self, name)}")
        if self.items < self.categories or self.categories < 2 * len(AFFINITIES):
            raise ValueError(
                f"synthetic: needs items ≥ categories ≥ {2 * len(AFFINITIES)}, got {self.items} and {self.categories}"
            )
        if self.behaviours < 4:
            raise ValueError(f"synthetic: behaviours must be at least 4, got {self.behaviours}")

    @staticmethod
    def parse(name: str) -> SyntheticConfig:
        """From a data set's name: ``"synthetic"`` or ``"synthetic:users=20000,tail=1.2"``."""
        _, _, spec = name.partition(":")
        fields = {f.name: int if f.type == "int" else float for f in dataclasses.fields(SyntheticConfig)}
        values: dict[str, int | float] = {}
        for part in filter(None, spec.split(",")):
            key, equals, value = part.partition("=")
            if not equals or key not in fields:
                raise ValueError(f"{name!r}: expected field=value with a field of {', '.join(fields)}, got {part!r}")
            try:
                values[key] = fields[key](value)
            except ValueError as error:
                raise ValueError(f"{name!r}: {key} must be {fields[key].__name__}, got {value!r}") from error
        return SyntheticConfig(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Planted:
    """What the labels were drawn from. ``affinity`` [K + 1, K + 1] (row and column 0: unknown), the rest [num_items]."""

    affinity: FloatArray
    strength: FloatArray
    quality: FloatArray
    intensity: float
    bias: float

    def weights(self, data: ClickData, samples: Samples) -> FloatArray:
        """a*(e_j, v) of every behaviour of ``samples``, back to back [N]: the order of a batch's ``history_item``."""
        sample, where = samples.positions()
        behaviour = data.log_item[where]
        pairs = data.item_category[behaviour], data.item_category[samples.item][sample]
        return self.strength[behaviour] * self.affinity[pairs]

    def logits(self, data: ClickData, samples: Samples) -> FloatArray:
        """The log-odds that each label was drawn with, [S]: no model can rank better, but by luck."""
        sample, _ = samples.positions()
        total = np.bincount(sample, weights=self.weights(data, samples), minlength=len(samples))
        return self.bias + self.quality[samples.item] + self.intensity * np.log1p(total)


def generate(config: SyntheticConfig, max_history: int = 50) -> tuple[ClickData, Planted]:
    """The log and its truth; a function of ``config`` alone. Histories are cut to ``max_history`` before the click."""
    rng = np.random.default_rng([config.seed, 0x51])
    kinds = config.categories
    ranks = config.items // kinds  # items in each category
    num_items = ranks * kinds + 1

    ring = rng.permutation(kinds)
    place = np.argsort(ring)
    affinity = np.zeros((kinds + 1, kinds + 1), dtype=np.float32)
    for step, value in enumerate(AFFINITIES):
        affinity[1 + ring, 1 + np.roll(ring, -step)] = value
    planted = Planted(
        affinity,
        np.exp(config.strength * rng.standard_normal(num_items, dtype=np.float32)),
        config.quality * rng.standard_normal(num_items, dtype=np.float32),
        config.intensity,
        config.bias,
    )

    def item_of(category: IntArray) -> IntArray:
        """An item of each category [S] in [0, kinds) by popularity; ids are dense, row 0 stays unknown."""
        return (1 + zipf_ranks(rng.random(len(category)), ranks, config.tail) * kinds + category).astype(np.int32)

    # Behaviours: 85 % from the user's interests, the rest from anywhere.
    lengths = rng.integers(max(2, config.behaviours // 4), config.behaviours + 1, size=config.users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    user = np.repeat(np.arange(config.users, dtype=np.int32), lengths)
    interests = rng.integers(0, kinds, size=(config.users, config.interests))
    taste = interests[user, rng.integers(0, config.interests, size=len(user))]
    anywhere = rng.integers(0, kinds, size=len(user))
    behaviour_kind = np.where(rng.random(len(user)) < 0.85, taste, anywhere)
    log_item = item_of(behaviour_kind)

    def part(per_user: int, at_end: bool) -> Samples:
        """Impressions: most candidates come from a category that some behaviour of the user activates."""
        shown_to = np.repeat(np.arange(config.users, dtype=np.int32), per_user)
        length = lengths[shown_to]
        moment = length if at_end else rng.integers(1, length)
        stop = offsets[shown_to] + moment
        hint = behaviour_kind[offsets[shown_to] + (rng.random(len(shown_to)) * length).astype(np.int64)]
        step = rng.choice(len(AFFINITIES), size=len(shown_to), p=(0.5, 0.25, 0.25))
        related = ring[(place[hint] + step) % kinds]
        kind = np.where(rng.random(len(shown_to)) < 0.7, related, rng.integers(0, kinds, size=len(shown_to)))
        start = np.maximum(offsets[shown_to], stop - max_history)
        return Samples(shown_to, item_of(kind), np.zeros(len(shown_to), dtype=np.float32), start, stop)

    data = ClickData(
        name=f"synthetic ({config.users:,} users, {num_items - 1:,} items)",
        num_items=num_items,
        num_categories=kinds + 1,
        item_category=np.concatenate([[0], 1 + np.arange(num_items - 1) % kinds]).astype(np.int32),
        log_item=log_item,
        train=part(config.impressions, at_end=False),
        test=part(config.tests, at_end=True),
        profile=np.zeros((config.users, 0), dtype=np.int32),
        category_names=("unknown", *(f"category {place[kind]}" for kind in range(kinds))),
    )
    return dataclasses.replace(
        data, train=_clicked(data, planted, data.train, rng), test=_clicked(data, planted, data.test, rng)
    ), planted


_CHUNK = 1_000_000  # samples whose behaviours are expanded at a time


def _clicked(data: ClickData, planted: Planted, samples: Samples, rng: np.random.Generator) -> Samples:
    label = np.empty(len(samples), dtype=np.float32)
    for begin in range(0, len(samples), _CHUNK):
        cut = slice(begin, begin + _CHUNK)
        logit = planted.logits(data, samples.take(cut))
        label[cut] = rng.random(len(logit)) < 1.0 / (1.0 + np.exp(-logit))
    return dataclasses.replace(samples, label=label)


def zipf_ranks(uniform: FloatArray, ranks: int, exponent: float) -> IntArray:
    """Ranks in [0, ``ranks``) of density ∝ (rank + 1)^−exponent, from numbers in [0, 1) by the continuous inverse.

    No table of probabilities, so ``ranks`` may be anything.
    """
    if exponent == 1.0:
        x = np.exp(uniform * np.log(ranks + 1.0))
    else:
        power = 1.0 - exponent
        x = ((np.power(ranks + 1.0, power) - 1.0) * uniform + 1.0) ** (1.0 / power)
    return np.minimum(x.astype(np.int64) - 1, ranks - 1)


def recovery(weights: FloatArray, planted: FloatArray, sample: IntArray) -> float:
    """How well weights [N] found by a model order each sample's behaviours as the planted ones do.

    Mean of Spearman's rank correlation within the samples that have an order to recover (ties, such as all the zeros of
    unrelated behaviours, share their rank). Up to one sign for all: the MLP above undoes a unit that learnt −a.
    """
    correlation = grouped_spearman(weights, planted, sample)
    return float(np.abs(np.nanmean(correlation)))
