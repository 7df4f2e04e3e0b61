"""From raw logs to ``ClickData``: sorting, dense ids, user splits, histories, negatives. Whole arrays, no row loops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .schema import ClickData, DataError, FloatArray, IntArray, Samples

PAPER_TRAIN_SHARE = 100_000 / 138_493  # the paper trains on 100,000 of MovieLens-20M's 138,493 users


@dataclass(frozen=True)
class Ratings:
    """A raw rating log, rows in any order. ``item_ids`` etc. keep the file's own ids for names and profiles."""

    user: IntArray  # [L] as in the file
    item: IntArray  # [L] as in the file
    rating: FloatArray  # [L]
    timestamp: IntArray  # [L] seconds


def dense_ids(values: IntArray) -> tuple[IntArray, IntArray]:
    """``(codes, uniques)`` with ``values == uniques[codes]``; by a lookup table when the ids are small enough."""
    if values.size == 0:
        return values.astype(np.int32), values
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < 16 * values.size + 1024:
        seen = np.zeros(high + 1, dtype=bool)
        seen[values] = True
        uniques = np.flatnonzero(seen)
        table = np.empty(high + 1, dtype=np.int32)
        table[uniques] = np.arange(len(uniques), dtype=np.int32)
        return table[values], uniques.astype(values.dtype)
    uniques, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int32), uniques


def time_order(user: IntArray, timestamp: IntArray) -> IntArray:
    """Positions sorted by user, then time, then place in the file (stable)."""
    if user.size == 0:
        return np.empty(0, dtype=np.int64)
    start = int(timestamp.min())
    if int(timestamp.max()) - start >= 2**32:
        raise DataError("timestamp must span less than 2**32 seconds: are they in milliseconds?")
    key = (user.astype(np.int64) << 32) | (timestamp.astype(np.int64) - start)
    return np.argsort(key, kind="stable")


def ratings_task(
    name: str,
    ratings: Ratings,
    *,
    item_category: dict[int, int] | IntArray,
    num_categories: int,
    max_history: int = 50,
    threshold: float = 4.0,
    train_share: float = PAPER_TRAIN_SHARE,
    history: str = "rated",
    split_seed: int = 0,
    profile_of: dict[int, tuple[int, ...]] | None = None,
    profile_sizes: tuple[int, ...] = (),
    profile_fields: tuple[str, ...] = (),
    names: dict[int, str] | None = None,
    category_names: tuple[str, ...] | None = None,
) -> ClickData:
    """The paper's MovieLens task: is a rating ≥ ``threshold``, given what the user rated before?

    Users are split into train and test; a sample's history is that user's earlier rated movies (``history="rated"``, as
    in the paper) or those rated positive (``"liked"``), the most recent ``max_history`` of them. ``item_category`` maps
    the file's item ids to categories in [1, num_categories); items it does not know are category 0.
    """
    if history not in ("rated", "liked"):
        raise ValueError(f"history must be 'rated' or 'liked', got {history!r}")
    if max_history < 0:
        raise ValueError(f"max_history must not be negative, got {max_history}")
    if not 0.0 < train_share < 1.0:
        raise ValueError(f"train_share must lie between 0 and 1, got {train_share}")
    check_ratings(name, ratings)
    user, user_ids = dense_ids(ratings.user)
    order = time_order(user, ratings.timestamp)
    user = user[order]
    item, item_ids = dense_ids(ratings.item)
    item = item[order] + np.int32(1)  # row 0 is "unknown"
    label = (ratings.rating >= threshold)[order]
    del order
    num_users, num_items = len(user_ids), len(item_ids) + 1

    categories = np.zeros(num_items, dtype=np.int32)
    if isinstance(item_category, dict):
        categories[1:] = [item_category.get(int(i), 0) for i in item_ids]
    else:
        categories[1:] = item_category[item_ids]
    profile = np.zeros((num_users, len(profile_sizes)), dtype=np.int32)
    if profile_of is not None:
        unknown = (0,) * len(profile_sizes)
        profile[:] = [profile_of.get(int(u), unknown) for u in user_ids]

    positions = np.arange(len(user), dtype=np.int64)
    first_of_user = np.searchsorted(user, np.arange(num_users))
    if history == "liked":
        log = item[label]
        stop: IntArray = np.cumsum(label) - label
        begin: IntArray = stop[first_of_user][user]
    else:
        log, stop, begin = item, positions, first_of_user[user]
    samples = Samples(user, item, label.astype(np.float32), np.maximum(begin, stop - max_history), stop)

    shuffled = np.random.default_rng([split_seed, 0xD1]).permutation(num_users)
    is_train = np.zeros(num_users, dtype=bool)
    is_train[shuffled[: min(num_users - 1, max(1, round(train_share * num_users)))]] = True
    in_train = is_train[user]
    return ClickData(
        name=name,
        num_items=num_items,
        num_categories=num_categories,
        item_category=categories,
        log_item=log,
        train=samples.take(in_train),
        test=samples.take(~in_train),
        profile=profile,
        profile_sizes=profile_sizes,
        profile_fields=profile_fields,
        item_names=None if names is None else ("unknown", *(names.get(int(i), f"item {i}") for i in item_ids)),
        category_names=category_names,
    )


def check_ratings(name: str, ratings: Ratings) -> None:
    rows = len(ratings.user)
    if rows == 0:
        raise DataError(f"{name}: the ratings file holds no rows: is it truncated?")
    if np.isnan(ratings.rating).any():
        at = int(np.flatnonzero(np.isnan(ratings.rating))[0])
        raise DataError(f"{name}: rating is missing or NaN in data row {at}: remove the row or repair the file")
    for column, ids in (("user", ratings.user), ("item", ratings.item)):
        if int(ids.min()) < 0:
            raise DataError(f"{name}: {column} ids must not be negative, row {int(ids.argmin())} has {int(ids.min())}")
    if len(np.unique(ratings.user[: min(rows, 1_000_000)])) < 2 and len(np.unique(ratings.user)) < 2:
        raise DataError(f"{name}: the split by user needs at least 2 users, found 1")


def next_item_task(
    name: str,
    sequence_item: IntArray,
    offsets: IntArray,
    item_category: IntArray,
    num_categories: int,
    *,
    max_history: int = 50,
    seed: int = 0,
    item_names: tuple[str, ...] | None = None,
    category_names: tuple[str, ...] | None = None,
) -> ClickData:
    """The paper's Amazon task: from a user's first k items predict item k + 1; the last item is the test.

    Every positive gets one negative, uniform over the items the user has not touched, with the same history. Users with
    fewer than 2 items give no sample.

    sequence_item [L] ids in [1, num_items), users one after another in time order; offsets [U + 1]; item_category
    [num_items].
    """
    check_jagged(name, offsets, len(sequence_item))
    num_items, num_users = len(item_category), len(offsets) - 1
    if sequence_item.size and int(sequence_item.max()) >= num_items:
        raise DataError(
            f"{name}: item id {int(sequence_item.max())} in the sequences, but item_category has only {num_items} rows"
        )
    lengths = np.diff(offsets)
    user = np.repeat(np.arange(num_users, dtype=np.int32), lengths)
    position = np.arange(len(sequence_item), dtype=np.int64)
    begin = np.repeat(offsets[:-1], lengths)
    keep = position > begin  # the first item has no history to be predicted from
    last = position == np.repeat(offsets[1:], lengths) - 1
    negative = sample_negatives(user, sequence_item, num_items, np.random.default_rng([seed, 0xA3]))

    def part(mask: IntArray) -> Samples:
        at = position[mask]
        start = np.maximum(begin[mask], at - max_history)
        pair = np.repeat(np.arange(len(at)), 2)
        label = np.tile(np.array([1.0, 0.0], dtype=np.float32), len(at))
        item = np.where(label > 0, sequence_item[at][pair], negative[at][pair]).astype(np.int32)
        return Samples(user[at][pair], item, label, start[pair], at[pair])

    return ClickData(
        name=name,
        num_items=num_items,
        num_categories=num_categories,
        item_category=item_category.astype(np.int32),
        log_item=sequence_item.astype(np.int32),
        train=part(keep & ~last),
        test=part(keep & last),
        profile=np.zeros((num_users, 0), dtype=np.int32),
        item_names=item_names,
        category_names=category_names,
    )


def sample_negatives(user: IntArray, item: IntArray, num_items: int, rng: np.random.Generator) -> IntArray:
    """One item per row, uniform over [1, num_items) without the items of the row's user. ``user`` must be sorted."""
    touched = np.unique(user.astype(np.int64) * num_items + item)
    per_user = np.bincount((touched // num_items).astype(np.int64)) if touched.size else np.zeros(1, dtype=np.int64)
    if int(per_user.max()) >= num_items - 1:
        raise DataError(f"user {int(per_user.argmax())} has touched every item: no negative is left to draw")
    negative = rng.integers(1, num_items, size=len(item))
    todo = np.arange(len(item))
    while todo.size:
        key = user[todo].astype(np.int64) * num_items + negative[todo]
        at = np.minimum(np.searchsorted(touched, key), len(touched) - 1)
        todo = todo[touched[at] == key]
        negative[todo] = rng.integers(1, num_items, size=len(todo))
    return negative


def check_jagged(name: str, offsets: IntArray, num_values: int) -> None:
    """``offsets`` must start at 0, never decrease and end at ``num_values``."""
    if offsets.ndim != 1 or len(offsets) < 1:
        raise DataError(f"{name}: offsets must be one-dimensional with at least one entry, got shape {offsets.shape}")
    steps = np.diff(offsets)
    if (steps < 0).any():
        at = int(np.flatnonzero(steps < 0)[0])
        raise DataError(
            f"{name}: offsets must not decrease, but offsets[{at}] = {offsets[at]} and "
            f"offsets[{at + 1}] = {offsets[at + 1]}"
        )
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_values:
        raise DataError(
            f"{name}: offsets must run from 0 to the number of values, {num_values}; got {offsets[0]} .. {offsets[-1]}"
        )
