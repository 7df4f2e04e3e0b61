"""Tiny generated data: files in the real formats, and prepared data sets. Nothing here touches the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reference.data import ClickData, ratings_task
from reference.data.prepare import Ratings

USERS, ITEMS, ROWS = 40, 60, 1500
GENRES = ("Action", "Comedy", "Drama", "Film-Noir")


def make_ratings(seed: int = 0, users: int = USERS, items: int = ITEMS, rows: int = ROWS) -> Ratings:
    """Users like items of their own genre (item mod 4 against user mod 4), so there is something to learn."""
    rng = np.random.default_rng(seed)
    pairs = rng.choice(users * items, size=rows, replace=False)
    user, item = pairs // items + 1, pairs % items + 1
    liked = rng.random(rows) < np.where(user % 4 == item % 4, 0.9, 0.3)
    rating = np.where(liked, rng.integers(4, 6, rows), rng.integers(1, 4, rows)).astype(np.float32)
    return Ratings(user, item, rating, 10**9 + rng.integers(0, 10**6, rows))


def write_ml100k(folder: Path, ratings: Ratings | None = None) -> Path:
    """GroupLens' ml-100k layout: u.data, u.item, u.user."""
    ratings = make_ratings() if ratings is None else ratings
    folder.mkdir(parents=True, exist_ok=True)
    columns = zip(ratings.user, ratings.item, ratings.rating.astype(int), ratings.timestamp, strict=True)
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in columns))
    lines = []
    for item in range(1, ITEMS + 1):
        flags = ["0"] * 19
        flags[(1, 5, 8, 10)[item % 4]] = "1"
        lines.append(f"{item}|Movie {item} (1990)|01-Jan-1990||http://|{'|'.join(flags)}")
    (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")
    jobs = ("artist", "writer", "other")
    users = [f"{u}|{20 + u}|{'MF'[u % 2]}|{jobs[u % 3]}|00000" for u in range(1, USERS + 1)]
    (folder / "u.user").write_text("\n".join(users) + "\n")
    return folder


def small_data(**options: object) -> ClickData:
    ratings = make_ratings()
    settings: dict = {
        "item_category": {item: 1 + item % 4 for item in range(1, ITEMS + 1)},
        "num_categories": 5,
        "max_history": 12,
        "profile_of": {user: (1 + user % 2,) for user in range(1, USERS + 1)},
        "profile_sizes": (3,),
        "profile_fields": ("gender",),
        "names": {item: f"Movie {item}" for item in range(1, ITEMS + 1)},
        "category_names": ("unknown", *GENRES),
    }
    settings.update(options)
    return ratings_task("tiny", ratings, **settings)


@pytest.fixture(scope="session")
def tiny() -> ClickData:
    return small_data()


@pytest.fixture
def ml100k(tmp_path: Path) -> Path:
    return write_ml100k(tmp_path / "ml-100k")
