"""Data sets by name. ``load("ml-100k")`` brings its own files; the others take a folder (see ``DATASETS``)."""

from __future__ import annotations

from pathlib import Path

from .amazon import load_amazon_reviews, load_amazon_sequences, load_electronics_csv
from .batches import Batch, eval_batches, gather_batch, make_batch, prefetched, train_batches
from .movielens import load_movielens
from .prepare import next_item_task, ratings_task
from .schema import ClickData, DataError, Samples
from .synthetic import SyntheticConfig, generate

DATASETS = {
    "ml-100k": "MovieLens 100k (brought here by itself)",
    "ml-1m": "MovieLens 1M (downloaded from GroupLens, or --data-dir)",
    "ml-20m": "MovieLens 20M (downloaded from GroupLens, or --data-dir)",
    "amazon-NAME": "NAME.txt + NAME_item2attributes.json in --data-dir, e.g. amazon-Beauty (S3-Rec's form)",
    "amazon-reviews-NAME": "reviews_NAME_5.json[.gz] + meta_NAME.json[.gz] in --data-dir (McAuley 2014)",
    "synthetic": "generated clicks with planted activation weights, e.g. synthetic:users=20000,items=100000",
    "amazon-electronics-csv": "the DIN authors' rows as CSV in --data-dir",
}


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    max_history: int = 50,
    history: str = "rated",
    split_seed: int = 0,
) -> ClickData:
    """The data set ``name`` (a key of ``DATASETS``; NAME stands for the file's own). Errors say what to supply."""
    if name in ("ml-100k", "ml-1m", "ml-20m"):
        return load_movielens(name, data_dir, max_history=max_history, history=history, split_seed=split_seed)
    if name.partition(":")[0] == "synthetic":
        return generate(SyntheticConfig.parse(name), max_history)[0]
    if not name.startswith("amazon-"):
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    if data_dir is None:
        raise DataError(f"{name} needs --data-dir: {DATASETS.get(name, 'the folder with its files')}")
    folder = Path(data_dir).expanduser()
    if name == "amazon-electronics-csv":
        return load_electronics_csv(folder, max_history=max_history)
    if name.startswith("amazon-reviews-"):
        stem = name.removeprefix("amazon-reviews-")
        reviews, meta = (_json_or_gz(folder, file) for file in (f"reviews_{stem}_5.json", f"meta_{stem}.json"))
        return load_amazon_reviews(reviews, meta, max_history=max_history, seed=split_seed)
    return load_amazon_sequences(folder, name.removeprefix("amazon-"), max_history=max_history, seed=split_seed)


def _json_or_gz(folder: Path, file: str) -> Path:
    plain = folder / file
    return plain if plain.is_file() else folder / f"{file}.gz"


__all__ = [
    "DATASETS",
    "Batch",
    "ClickData",
    "DataError",
    "Samples",
    "SyntheticConfig",
    "eval_batches",
    "gather_batch",
    "generate",
    "load",
    "load_amazon_reviews",
    "load_amazon_sequences",
    "load_electronics_csv",
    "load_movielens",
    "make_batch",
    "next_item_task",
    "prefetched",
    "ratings_task",
    "train_batches",
]
