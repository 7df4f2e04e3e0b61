"""Amazon reviews: 5-core JSON (McAuley et al. 2014), S3-Rec's text form of it, and the DIN authors' CSV slices."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from .prepare import dense_ids, next_item_task, time_order
from .schema import ClickData, DataError, Samples

_CHUNK = 64 << 20  # bytes of JSON lines parsed at a time


def load_amazon_reviews(
    reviews: str | Path, metadata: str | Path, *, max_history: int = 50, seed: int = 0
) -> ClickData:
    """``reviews_NAME_5.json[.gz]`` and ``meta_NAME.json[.gz]``, prepared as in the paper.

    Users' reviews in time order; from the first k items predict item k + 1; each user's last item is the test; one
    sampled negative each. Category: the last entry of the last category path of the metadata.
    """
    import polars as pl

    reviews, metadata = Path(reviews), Path(metadata)
    frames = []
    schema = {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64}
    for block in _line_blocks(reviews):
        try:
            frames.append(pl.read_ndjson(io.BytesIO(block), schema=schema))
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"{reviews}: not JSON lines with reviewerID, asin and unixReviewTime ({str(error).splitlines()[0]})"
            ) from error
    table = pl.concat(frames) if frames else pl.DataFrame(schema=schema)
    if table.height == 0:
        raise DataError(f"{reviews} holds no reviews: truncated download?")
    for column in schema:
        if table[column].null_count():
            raise DataError(f"{reviews}: column {column} is missing in {table[column].null_count()} row(s)")
    users = table["reviewerID"].unique().sort()
    items = table["asin"].unique().sort()
    user = table["reviewerID"].cast(pl.Enum(users)).to_physical().to_numpy().astype(np.int32)
    item = table["asin"].cast(pl.Enum(items)).to_physical().to_numpy().astype(np.int32) + np.int32(1)
    order = time_order(user, table["unixReviewTime"].to_numpy())
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(users)))])

    leaf = read_leaf_categories(metadata)
    names = sorted({leaf[asin] for asin in items if asin in leaf})
    code = {name: place + 1 for place, name in enumerate(names)}
    category = np.zeros(len(items) + 1, dtype=np.int32)
    category[1:] = [code[leaf[asin]] if asin in leaf else 0 for asin in items]
    return next_item_task(
        reviews.name.split(".")[0],
        item[order],
        offsets,
        category,
        len(names) + 1,
        max_history=max_history,
        seed=seed,
        item_names=("unknown", *items),
        category_names=("unknown", *names),
    )


def _open(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise DataError(f"{path} is missing: download it and pass its path, or the folder that holds it")
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _line_blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks of whole lines, so that gigabytes of reviews never sit in memory at once."""
    rest = b""
    try:
        with _open(path) as file:
            while block := file.read(_CHUNK):
                block = rest + block
                cut = block.rfind(b"\n") + 1
                rest = block[cut:]
                if cut:
                    yield block[:cut]
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged archive ({error}): download it again") from error
    if rest.strip():
        yield rest


_ASIN = re.compile(rb"""['"]asin['"]:\s*['"]([^'"]+)['"]""")
_CATEGORIES = re.compile(rb"""['"]categories['"]:\s*(\[\[.*?\]\])""")


def read_leaf_categories(path: Path) -> dict[str, str]:
    """asin -> leaf category. The 2014 metadata is one Python literal a line; only its category part is evaluated."""
    leaf: dict[str, str] = {}
    for block in _line_blocks(path):
        for line in block.splitlines():
            asin, paths = _ASIN.search(line), _CATEGORIES.search(line)
            if asin and paths:
                try:
                    value = ast.literal_eval(paths.group(1).decode("utf-8"))
                    leaf[asin.group(1).decode("utf-8")] = str(value[-1][-1])
                except (ValueError, SyntaxError, IndexError, UnicodeDecodeError) as error:
                    raise DataError(f"{path}: cannot read the categories of {asin.group(1)!r}: {error}") from error
    if not leaf:
        raise DataError(f"{path}: no line has both 'asin' and 'categories': is this the metadata file?")
    return leaf


def load_amazon_sequences(folder: str | Path, name: str, *, max_history: int = 50, seed: int = 0) -> ClickData:
    """S3-Rec's files: ``NAME.txt`` (user id, then item ids in time order, one user a line) and
    ``NAME_item2attributes.json`` (item id -> attribute ids, the last one is the leaf category)."""
    folder = Path(folder).expanduser()
    path, attributes = folder / f"{name}.txt", folder / f"{name}_item2attributes.json"
    for file in (path, attributes):
        if not file.is_file():
            found = sorted(p.stem for p in folder.glob("*.txt")) if folder.is_dir() else []
            raise DataError(f"{file} is missing: --data-dir must hold it" + (f" (it has {found})" if found else ""))
    lines = path.read_bytes().splitlines()
    try:
        tokens = np.array(path.read_bytes().split(), dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{path}: expected integers only ({error})") from error
    counts = np.array([line.count(b" ") + 1 for line in (raw.strip() for raw in lines) if line], dtype=np.int64)
    if counts.sum() != len(tokens) or len(tokens) == 0:
        raise DataError(f"{path}: expected one user a line, numbers separated by single spaces")
    starts = np.cumsum(counts) - counts
    is_item = np.ones(len(tokens), dtype=bool)
    is_item[starts] = False
    items = tokens[is_item]
    if items.size and int(items.min()) < 1:
        raise DataError(f"{path}: item ids must be at least 1, got {int(items.min())}")
    offsets = np.concatenate([[0], np.cumsum(counts - 1)])
    try:
        table = {int(key): value for key, value in json.loads(attributes.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{attributes}: not a JSON object of item id -> list of attributes ({error})") from error
    num_items = int(items.max()) + 1
    raw = np.full(num_items, -1, dtype=np.int64)
    for item, values in table.items():
        if item < num_items and values:
            raw[item] = values[-1]
    known = raw >= 0
    codes, names = dense_ids(raw[known])
    category = np.zeros(num_items, dtype=np.int32)
    category[known] = codes + 1
    return next_item_task(
        f"amazon-{name}",
        items.astype(np.int32),
        offsets,
        category,
        len(names) + 1,
        max_history=max_history,
        seed=seed,
        category_names=("unknown", *(f"attribute {n}" for n in names)),
    )


def load_electronics_csv(folder: str | Path, *, max_history: int = 50) -> ClickData:
    """The DIN authors' Amazon Electronics rows as CSV: ``train_set_mini.csv`` (user, [history], item, label),
    ``test_set_mini.csv`` (user, [history], (positive, negative)) and ``cate_list.csv`` (category of item 0, 1, …)."""
    folder = Path(folder).expanduser()
    train_path, test_path, categories_path = (
        folder / name for name in ("train_set_mini.csv", "test_set_mini.csv", "cate_list.csv")
    )
    for file in (train_path, test_path, categories_path):
        if not file.is_file():
            raise DataError(f"{file} is missing: --data-dir must hold it")
    category = np.concatenate([[0], np.loadtxt(categories_path, dtype=np.int64, ndmin=1) + 1]).astype(np.int32)
    users: list[int] = []
    items: list[int] = []
    labels: list[float] = []
    log: list[int] = []
    stops: list[int] = []
    lengths: list[int] = []

    def add(user: str, item: int, label: float, history: list[int]) -> None:
        users.append(int(user))
        items.append(item + 1)
        labels.append(label)
        stops.append(len(log))
        lengths.append(len(history))

    for row in _csv_rows(train_path, 4):
        history = [int(x) for x in json.loads(row[1])]
        log.extend(x + 1 for x in history)
        add(row[0], int(row[2]), float(row[3]), history)
    num_train = len(users)
    for row in _csv_rows(test_path, 3):
        history = [int(x) for x in json.loads(row[1])]
        log.extend(x + 1 for x in history)
        positive, negative = ast.literal_eval(row[2])
        add(row[0], int(positive), 1.0, history)
        add(row[0], int(negative), 0.0, history)
    user, user_ids = dense_ids(np.array(users, dtype=np.int64))
    stop = np.array(stops, dtype=np.int64)
    start = stop - np.minimum(lengths, max_history)
    samples = Samples(user, np.array(items, dtype=np.int32), np.array(labels, dtype=np.float32), start, stop)
    return ClickData(
        name="amazon-electronics-csv",
        num_items=len(category),
        num_categories=int(category.max()) + 1,
        item_category=category,
        log_item=np.array(log, dtype=np.int32),
        train=samples.take(slice(0, num_train)),
        test=samples.take(slice(num_train, None)),
        profile=np.zeros((len(user_ids), 0), dtype=np.int32),
    )


def _csv_rows(path: Path, width: int) -> Iterator[list[str]]:
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file)):
            if len(row) != width:
                raise DataError(f"{path}, line {number + 1}: expected {width} columns, found {len(row)}")
            yield row
