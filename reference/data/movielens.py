"""MovieLens 100k, 1M and 20M, in GroupLens' own formats and (100k) in RecBole's.

Category of a movie: its first genre, one per movie as in the paper (21 categories for 20M: 20 names + unknown).
Profile: gender, age group and occupation, where the data set has them (100k and 1M).
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from .download import WheelSource, ZipSource, fetch
from .prepare import PAPER_TRAIN_SHARE, Ratings, ratings_task
from .schema import ClickData, DataError

# u.item's flags, in its order
GENRES_100K = [
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
AGE_CUTS = (18, 25, 35, 45, 50, 56)  # MovieLens-1M's own age groups

_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_SOURCES: dict[str, list[WheelSource | ZipSource]] = {
    "ml-100k": [
        WheelSource(
            "recbole==1.2.1",
            "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            {f"recbole/dataset_example/ml-100k/ml-100k.{s}": f"ml-100k.{s}" for s in ("inter", "item", "user")},
        ),
        ZipSource(f"{_GROUPLENS}/ml-100k.zip", "0e33842e24a9c977be4e0107933c0723", 4.9),
    ],
    "ml-1m": [ZipSource(f"{_GROUPLENS}/ml-1m.zip", "c4d9eecfca2ab87c1945afe126590906", 5.9)],
    "ml-20m": [ZipSource(f"{_GROUPLENS}/ml-20m.zip", "cd245b17a1ae2cc31bb14903e1204af3", 198.7)],
}
_RATING_FILES = {"ml-100k": ["ml-100k.inter", "u.data"], "ml-1m": ["ratings.dat"], "ml-20m": ["ratings.csv"]}
_NUM_RATINGS = {"ml-100k": 100_000, "ml-1m": 1_000_209, "ml-20m": 20_000_263}


def load_movielens(
    name: str = "ml-100k",
    data_dir: str | Path | None = None,
    *,
    max_history: int = 50,
    history: str = "rated",
    train_share: float = PAPER_TRAIN_SHARE,
    split_seed: int = 0,
    expect_complete: bool | None = None,
) -> ClickData:
    """MovieLens ``name`` ("ml-100k", "ml-1m", "ml-20m") from ``data_dir``, the cache, pip's index or GroupLens.

    ``expect_complete`` checks the number of ratings against the published one (default: only where the files were
    brought here, so that a user's own subset in the same format can be used through ``data_dir``).
    """
    if name not in _SOURCES:
        raise ValueError(f"name must be one of {', '.join(_SOURCES)}, got {name!r}")
    if data_dir is None:
        folder = fetch(name, _SOURCES[name], _RATING_FILES[name])
        expect_complete = True if expect_complete is None else expect_complete
    else:
        folder = _find_folder(Path(data_dir).expanduser(), name)
    ratings, movies, users = _read(name, folder)
    if expect_complete and len(ratings.user) != _NUM_RATINGS[name]:
        raise DataError(
            f"{name}: {folder} holds {len(ratings.user):,} ratings, the published file {_NUM_RATINGS[name]:,}: "
            f"it is truncated; delete {folder} and run again"
        )
    genres = sorted({genre for _, genre in movies.values()} - {"unknown"})
    code = {"unknown": 0, **{genre: place + 1 for place, genre in enumerate(genres)}}
    fields: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    profile: dict[int, tuple[int, ...]] | None = None
    if users:
        jobs = sorted({job for _, _, job in users.values()})
        job_code = {job: place + 1 for place, job in enumerate(jobs)}
        profile = {
            user: (1 + (gender == "M"), 1 + int(np.searchsorted(AGE_CUTS, age, side="right")), job_code[job])
            for user, (gender, age, job) in users.items()
        }
        fields, sizes = ("gender", "age group", "occupation"), (3, len(AGE_CUTS) + 2, len(jobs) + 1)
    return ratings_task(
        name,
        ratings,
        item_category={movie: code[genre] for movie, (_, genre) in movies.items()},
        num_categories=len(code),
        max_history=max_history,
        history=history,
        train_share=train_share,
        split_seed=split_seed,
        profile_of=profile,
        profile_sizes=sizes,
        profile_fields=fields,
        names={movie: title for movie, (title, _) in movies.items()},
        category_names=("unknown", *genres),
    )


def _find_folder(root: Path, name: str) -> Path:
    for folder in (root, root / name):
        if any((folder / file).is_file() for file in _RATING_FILES[name]):
            return folder
    raise DataError(
        f"{name}: --data-dir {root} holds neither {' nor '.join(_RATING_FILES[name])}: "
        f"point it at the unpacked {name} folder, or leave it out to have the data brought here"
    )


Movies = dict[int, tuple[str, str]]  # file id -> (title, first genre)
Users = dict[int, tuple[str, int, str]]  # file id -> (gender, age, occupation)


def _read(name: str, folder: Path) -> tuple[Ratings, Movies, Users]:
    if name == "ml-1m":
        return (
            read_ratings(folder / "ratings.dat", ":", [0, 2, 4, 6], header=False),
            {
                int(row[0]): (row[1], _first_genre(row[2]))
                for row in _rows(folder / "movies.dat", "::", 3, encoding="latin-1")
            },
            {int(row[0]): (row[1], int(row[2]), row[3]) for row in _rows(folder / "users.dat", "::", 5)},
        )
    if name == "ml-20m":
        with _open(folder / "movies.csv", "utf-8") as file:
            table = list(csv.DictReader(file))
        if not table or not {"movieId", "title", "genres"} <= set(table[0]):
            raise DataError(f"{folder / 'movies.csv'}: needs the columns movieId, title, genres")
        movies = {int(row["movieId"]): (row["title"], _first_genre(row["genres"])) for row in table}
        return read_ratings(folder / "ratings.csv", ",", [0, 1, 2, 3], header=True), movies, {}
    if (folder / "ml-100k.inter").is_file():
        ratings = read_ratings(folder / "ml-100k.inter", "\t", [0, 1, 2, 3], header=True)
        items = _rows(folder / "ml-100k.item", "\t", 4, header=True)
        users = _rows(folder / "ml-100k.user", "\t", 5, header=True)
        return (
            ratings,
            {int(row[0]): (row[1], _first_genre(row[3].replace(" ", "|"))) for row in items},
            {int(row[0]): (row[2], int(row[1]), row[3]) for row in users},
        )
    ratings = read_ratings(folder / "u.data", "\t", [0, 1, 2, 3], header=False)
    movies = {}
    for row in _rows(folder / "u.item", "|", 5 + len(GENRES_100K), encoding="latin-1"):
        flags = [genre for genre, flag in zip(GENRES_100K, row[5:], strict=True) if flag == "1"]
        movies[int(row[0])] = (row[1], flags[0] if flags else "unknown")
    return ratings, movies, {int(r[0]): (r[2], int(r[1]), r[3]) for r in _rows(folder / "u.user", "|", 5)}


def _first_genre(genres: str) -> str:
    first = genres.split("|")[0].strip()
    return "unknown" if first in ("", "(no genres listed)") else first


def _open(path: Path, encoding: str):  # type: ignore[no-untyped-def]
    try:
        return path.open(encoding=encoding, newline="")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: it belongs beside the ratings file of the same data set") from None


def _rows(path: Path, separator: str, width: int, *, header: bool = False, encoding: str = "utf-8") -> list[list[str]]:
    with _open(path, encoding) as file:
        rows = [line.rstrip("\r\n").split(separator) for line in file if line.strip()]
    for number, row in enumerate(rows):
        if len(row) != width:
            raise DataError(f"{path}, line {number + 1}: expected {width} columns, found {len(row)}: file damaged?")
    return rows[1:] if header else rows


def read_ratings(path: Path, separator: str, columns: list[int], *, header: bool) -> Ratings:
    """User, item, rating and time from the given ``columns`` of a delimited file, read by polars in one pass."""
    import polars as pl

    if not path.is_file():
        raise DataError(f"{path} is missing")
    wanted = ("user", "item", "rating", "timestamp")
    types = (pl.Int64, pl.Int64, pl.Float32, pl.Int64)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: truncated download?")
    try:
        frame = pl.scan_csv(path, separator=separator, has_header=header, infer_schema=False, quote_char=None)
        width = len(frame.collect_schema())
        if width <= max(columns):
            raise DataError(
                f"{path}: expected columns user, item, rating, timestamp separated by {separator!r}, "
                f"found {width} column(s)"
            )
        names = list(frame.collect_schema())
        table = frame.select(
            pl.col(names[column]).cast(kind).alias(label)
            for column, kind, label in zip(columns, types, wanted, strict=True)
        ).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{path}: cannot be read as user, item, rating, timestamp columns ({str(error).splitlines()[0]}): "
            "wrong file, or damaged?"
        ) from error
    for label in wanted:
        if table[label].null_count():
            at = int(table[label].is_null().arg_max() or 0)
            raise DataError(f"{path}: {label} is missing in data row {at}: truncated or damaged file")
    return Ratings(*(table[label].to_numpy() for label in wanted))
