"""Preparation against plain loops over the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from reference.data import DataError, gather_batch, make_batch, next_item_task, train_batches
from reference.data.batches import Batch, batch_bounds
from reference.data.prepare import Ratings, check_ratings, dense_ids, sample_negatives, time_order
from reference.data.schema import ClickData, Samples
from tests.reference.conftest import make_ratings, small_data


def histories(data: ClickData, samples: Samples) -> list[list[int]]:
    return [data.log_item[a:b].tolist() for a, b in zip(samples.start, samples.stop, strict=True)]


@pytest.mark.parametrize("history", ["rated", "liked"])
def test_histories_are_the_users_earlier_movies(history: str) -> None:
    ratings = make_ratings()
    data = small_data(history=history, max_history=7)
    order = np.lexsort((np.arange(len(ratings.user)), ratings.timestamp))
    seen: dict[int, list[int]] = {}
    expected: dict[tuple[int, int], tuple[list[int], float]] = {}
    for row in order:
        user, item, positive = int(ratings.user[row]) - 1, int(ratings.item[row]), float(ratings.rating[row] >= 4)
        before = seen.setdefault(user, [])
        expected[user, item] = before[-7:], positive
        if history == "rated" or positive:
            before.append(item)
    for samples in (data.train, data.test):
        for user, item, label, past in zip(
            samples.user, samples.item, samples.label, histories(data, samples), strict=True
        ):
            assert expected.pop((int(user), int(item))) == (past, float(label))
    assert not expected


def test_users_are_either_train_or_test_and_the_split_is_stable() -> None:
    one, two, other = small_data(), small_data(), small_data(split_seed=5)
    train, test = set(one.train.user.tolist()), set(one.test.user.tolist())
    assert train & test == set()
    assert len(train) == round(40 * 100_000 / 138_493)
    assert train == set(two.train.user.tolist())
    assert train != set(other.train.user.tolist())


def test_validation_split_holds_out_train_users_and_never_shows_test_users(tiny: ClickData) -> None:
    held = tiny.validation_split(0.25, seed=3)
    train, validation = set(held.train.user.tolist()), set(held.test.user.tolist())
    assert train | validation == set(tiny.train.user.tolist())
    assert train & validation == set()
    assert validation & set(tiny.test.user.tolist()) == set()
    with pytest.raises(ValueError, match="fraction"):
        tiny.validation_split(1.0)


def test_max_history_zero_gives_empty_histories_and_a_batch_of_them() -> None:
    data = small_data(max_history=0)
    assert data.train.history_lengths().max() == 0
    batch = gather_batch(data, data.train.take(slice(0, 8)))
    assert batch.history_item.numel() == 0
    assert batch.offsets.tolist() == [0] * 9


def test_time_order_is_stable_and_dense_ids_invert() -> None:
    user = np.array([2, 1, 2, 1, 2])
    assert time_order(user, np.array([5, 9, 5, 3, 1])).tolist() == [3, 1, 4, 0, 2]
    for values in (np.array([7, 3, 7, 9]), np.array([10**12, 5, 10**12]), np.array([-4, 8, -4])):
        codes, uniques = dense_ids(values)
        assert uniques[codes].tolist() == values.tolist()
        assert sorted(set(codes.tolist())) == list(range(len(uniques)))
    with pytest.raises(DataError, match="milliseconds"):
        time_order(np.zeros(2, dtype=int), np.array([0, 2**33]))


def test_next_item_task_by_hand() -> None:
    # Users: [1 2 3], [4] (too short for a sample), [5 1].
    sequences, offsets = np.array([1, 2, 3, 4, 5, 1]), np.array([0, 3, 4, 6])
    data = next_item_task("hand", sequences, offsets, np.array([0, 1, 1, 2, 2, 2]), 3, max_history=50)
    positives = data.train.label == 1
    assert data.train.user[positives].tolist() == [0]
    assert data.train.item[positives].tolist() == [2]
    assert histories(data, data.train) == [[1], [1]]
    assert data.test.item[data.test.label == 1].tolist() == [3, 1]
    assert histories(data, data.test) == [[1, 2], [1, 2], [5], [5]]
    own = {0: {1, 2, 3}, 2: {5, 1}}
    for samples in (data.train, data.test):
        negative = samples.label == 0
        assert negative.sum() * 2 == len(samples)
        for user, item in zip(samples.user[negative], samples.item[negative], strict=True):
            assert int(item) not in own[int(user)]
            assert 1 <= item <= 5


def test_negatives_are_uniform_over_untouched_items() -> None:
    user = np.zeros(60_000, dtype=np.int64)
    touched = np.array([2, 4])[np.arange(60_000) % 2]
    drawn = sample_negatives(user, touched, 7, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=7)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    # 15,000 each, standard deviation √(60000·¼·¾) ≈ 106: five of them.
    assert np.abs(counts[[1, 3, 5, 6]] - 15_000).max() < 530
    with pytest.raises(DataError, match="no negative"):
        sample_negatives(np.zeros(2, dtype=int), np.array([1, 2]), 3, np.random.default_rng(0))


def test_batches_hold_every_sample_once_and_their_own_history(tiny: ClickData) -> None:
    seen = []
    for batch in train_batches(tiny, 64, seed=1, epoch=0):
        offsets = batch.offsets.tolist()
        assert len(offsets) == len(batch) + 1
        for row, (user, item) in enumerate(zip(batch.user.tolist(), batch.item.tolist(), strict=True)):
            seen.append((user, item, batch.history_item[offsets[row] : offsets[row + 1]].tolist()))
        assert batch.category.tolist() == tiny.item_category[batch.item.numpy()].tolist()
        assert batch.history_category.tolist() == tiny.item_category[batch.history_item.numpy()].tolist()
    train = tiny.train
    expected = list(zip(train.user.tolist(), train.item.tolist(), histories(tiny, train), strict=True))
    assert sorted(seen) == sorted(expected)
    assert seen != expected  # shuffled


def test_order_depends_on_seed_and_epoch_only(tiny: ClickData) -> None:
    def first(seed: int, epoch: int, skip: int = 0) -> list[int]:
        return next(iter(train_batches(tiny, 32, seed, epoch, first=skip))).item.tolist()

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(2, 0)
    assert first(1, 0) != first(1, 1)
    batches = list(train_batches(tiny, 32, 1, 0))
    assert batches[3].item.tolist() == first(1, 0, skip=3)


def test_no_batch_of_one_sample() -> None:
    assert batch_bounds(9, 4) == [(0, 4), (4, 9)]
    assert batch_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batch_bounds(0, 4) == []
    with pytest.raises(ValueError, match="batch_size"):
        batch_bounds(9, 1)


def test_from_padded_equals_jagged_and_checks_lengths(tiny: ClickData) -> None:
    item, padded = np.array([1, 2]), np.array([[3, 4, 59], [5, 59, 59]])
    batch = Batch.from_padded(tiny, item, padded, np.array([2, 1]))
    assert batch.history_item.tolist() == [3, 4, 5]
    assert batch.offsets.tolist() == [0, 2, 3]
    with pytest.raises(DataError, match=r"lengths must lie in \[0, T = 3\]"):
        Batch.from_padded(tiny, item, padded, np.array([4, 1]))
    with pytest.raises(DataError, match="lengths must have shape"):
        Batch.from_padded(tiny, item, padded, np.array([1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0, 2, 1]}, r"offsets must not decrease, but offsets\[1\] = 2"),
        ({"offsets": [0, 1, 2]}, "offsets must run from 0 to the number of values, 3"),
        ({"offsets": [0, 3]}, "offsets must have 3 entries"),
        ({"values": [1, 2, 61]}, "history ids must lie in"),
        ({"values": [1, -2, 6]}, "history ids must lie in"),
        ({"item": [1, 99]}, "item ids must lie in"),
        ({"user": [1, 400]}, "user ids must be below"),
        ({"label": [0.0, np.nan]}, "label holds NaN"),
    ],
)
def test_bad_batches_name_the_argument(tiny: ClickData, change: dict, message: str) -> None:
    good: dict = {"user": [0, 1], "item": [1, 2], "label": [0.0, 1.0], "values": [3, 4, 5], "offsets": [0, 1, 3]}
    arrays = {key: np.array(value) for key, value in {**good, **change}.items()}
    with pytest.raises(DataError, match=message):
        make_batch(tiny, **arrays)


def test_bad_ratings_name_the_row() -> None:
    good = make_ratings()
    bad = good.rating.copy()
    bad[17] = np.nan
    with pytest.raises(DataError, match="NaN in data row 17"):
        check_ratings("x", Ratings(good.user, good.item, bad, good.timestamp))
    empty = np.array([], dtype=np.int64)
    with pytest.raises(DataError, match="no rows"):
        check_ratings("x", Ratings(empty, empty, empty.astype(np.float32), empty))
    with pytest.raises(DataError, match="at least 2 users"):
        check_ratings("x", Ratings(np.ones(3, int), np.arange(3), np.ones(3, np.float32), np.arange(3)))
    with pytest.raises(DataError, match="item ids must not be negative"):
        check_ratings("x", Ratings(np.arange(3), np.array([1, -1, 2]), np.ones(3, np.float32), np.arange(3)))


def test_click_data_checks_id_ranges(tiny: ClickData) -> None:
    import dataclasses

    with pytest.raises(DataError, match=r"log_item holds id 61, outside \[0, num_items = 61\)"):
        dataclasses.replace(tiny, log_item=np.array([61]))
    with pytest.raises(DataError, match="histories leave the log"):
        dataclasses.replace(tiny, log_item=tiny.log_item[:5])
