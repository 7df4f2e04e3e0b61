"""What every data set becomes: one behaviour log, samples that point into it, and the sizes of the id spaces.

A sample's history is a slice ``log_item[start:stop]`` of the log, so histories are never copied: 20 million samples
with long histories cost 20 million pairs of integers. Batches gather the slices into jagged ``values`` + ``offsets``.

Row 0 of the item and of the category space means "unknown": real ids start at 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[Any]  # any integer width: numpy's type stubs lose track of it through arithmetic
FloatArray = NDArray[Any]


class DataError(ValueError):
    """Input data that cannot be used; the message names the file or argument, what is wrong and how to fix it."""


@dataclass(frozen=True)
class Samples:
    """S impressions: ``user``, ``item`` [S] int32, ``label`` [S] float32 in {0, 1}, history ``[start, stop)`` [S]."""

    user: IntArray
    item: IntArray
    label: FloatArray
    start: IntArray
    stop: IntArray

    def __len__(self) -> int:
        return len(self.item)

    def take(self, index: NDArray[np.generic] | slice) -> Samples:
        """The samples at ``index`` (positions or a boolean mask)."""
        return Samples(self.user[index], self.item[index], self.label[index], self.start[index], self.stop[index])

    def history_lengths(self) -> IntArray:
        return self.stop - self.start

    def positions(self) -> tuple[IntArray, IntArray]:
        """Of every behaviour, samples back to back: whose it is, and where it lies in the log; both [N] int64."""
        lengths = self.history_lengths().astype(np.int64)
        sample = np.repeat(np.arange(len(self)), lengths)
        first = np.cumsum(lengths) - lengths
        return sample, np.arange(len(sample)) + (self.start - first)[sample]


@dataclass(frozen=True)
class ClickData:
    """A prepared data set.

    item_category   [num_items] int32, the category of each item (row 0: unknown)
    log_item        [L] int32, behaviours; histories are slices of it
    profile         [num_users, F] int32, ids of the user's fixed features (F may be 0), field f below profile_sizes[f]
    """

    name: str
    num_items: int
    num_categories: int
    item_category: IntArray
    log_item: IntArray
    train: Samples
    test: Samples
    profile: IntArray
    profile_sizes: tuple[int, ...] = ()
    profile_fields: tuple[str, ...] = ()
    item_names: tuple[str, ...] | None = None
    category_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check_range("item_category", self.item_category, self.num_categories, "num_categories")
        self._check_range("log_item", self.log_item, self.num_items, "num_items")
        if len(self.item_category) != self.num_items:
            raise DataError(
                f"{self.name}: item_category has {len(self.item_category)} entries but num_items = {self.num_items}"
            )
        for field, size in enumerate(self.profile_sizes):
            self._check_range(f"profile[:, {field}]", self.profile[:, field], size, f"profile_sizes[{field}]")
        for part, samples in (("train", self.train), ("test", self.test)):
            self._check_samples(part, samples)

    def _check_range(self, what: str, ids: IntArray, size: int, limit: str) -> None:
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= size):
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise DataError(f"{self.name}: {what} holds id {bad}, outside [0, {limit} = {size}): re-number the ids")

    def _check_samples(self, part: str, samples: Samples) -> None:
        self._check_range(f"{part}.item", samples.item, self.num_items, "num_items")
        self._check_range(f"{part}.user", samples.user, len(self.profile), "num_users")
        if not np.isin(samples.label, (0.0, 1.0)).all():
            raise DataError(f"{self.name}: {part}.label must be 0 or 1 (and not NaN): check the rating column")
        if (samples.stop < samples.start).any():
            at = int(np.flatnonzero(samples.stop < samples.start)[0])
            raise DataError(f"{self.name}: {part}.stop must not be below start, but is for sample {at}")
        if len(samples) and (int(samples.start.min()) < 0 or int(samples.stop.max()) > len(self.log_item)):
            raise DataError(f"{self.name}: {part} histories leave the log of {len(self.log_item)} behaviours")

    @property
    def num_users(self) -> int:
        return len(self.profile)

    def validation_split(self, fraction: float = 0.1, seed: int = 0) -> ClickData:
        """Train users cut in two: ``fraction`` of them become the ``test`` part, the real test users are left out.

        For choosing hyper-parameters without ever looking at the test part.
        """
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
        users = np.unique(self.train.user)
        held = np.random.default_rng([seed, 0x5A11D]).permutation(users)[: max(1, round(fraction * len(users)))]
        flag = np.zeros(self.num_users, dtype=bool)
        flag[held] = True
        mask = flag[self.train.user]
        return dataclasses.replace(
            self, name=f"{self.name} (validation)", train=self.train.take(~mask), test=self.train.take(mask)
        )

    def held_out(self, fraction: float = 0.2, seed: int = 0) -> ClickData:
        """A validation part cut from the train part as the test part was cut from the whole; the test part is left out.

        New users in the test: ``validation_split``. The same users, later: every train user's last samples (by the place
        of their history in the log), as many as a test user has on average; users with no more than that stay in training.
        """
        if not np.isin(self.test.user, self.train.user).any():
            return self.validation_split(fraction, seed)
        held = max(1, round(len(self.test) / len(np.unique(self.test.user))))
        own = np.bincount(self.train.user, minlength=self.num_users)
        order = np.lexsort((self.train.stop, self.train.user))
        user = self.train.user[order]
        to_last = np.cumsum(own)[user] - 1 - np.arange(len(order))
        mask = np.zeros(len(order), dtype=bool)
        mask[order] = (to_last < held) & (own[user] > held)
        return dataclasses.replace(
            self, name=f"{self.name} (validation)", train=self.train.take(~mask), test=self.train.take(mask)
        )

    def describe(self) -> str:
        lengths = self.train.history_lengths()
        mean = float(lengths.mean()) if len(lengths) else 0.0
        return (
            f"{self.name}: {len(np.unique(self.train.user)):,} + {len(np.unique(self.test.user)):,} users "
            "(train + test), "
            f"{self.num_items - 1:,} items, {self.num_categories - 1:,} categories, "
            f"{len(self.train):,} + {len(self.test):,} samples, "
            f"{float(self.train.label.mean()) if len(self.train) else 0.0:.1%} positive, mean history {mean:.1f}"
        )
