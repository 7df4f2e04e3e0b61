"""Time and memory of preparing a MovieLens-20M-sized input: ``python -m reference.data.measure [--rows 20000000]``.

Writes generated ratings in ml-20m's format to a temporary folder (a long tail of activity and of popularity), reads
and prepares them in a fresh process, and measures how fast batches leave the loader.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def write_ml20m(folder: Path, rows: int, seed: int = 0, block: int = 1_000_000) -> None:
    """``ratings.csv`` and ``movies.csv`` with about ``rows / 144`` users, as the real file has, in blocks."""
    import polars as pl

    rng = np.random.default_rng(seed)
    items, users = 27_278, max(2, rows // 144)
    activity = rng.pareto(1.3, users) + 0.15
    activity *= rows / activity.sum()
    popularity = 1.0 / np.arange(1, items + 1) ** 0.9
    cumulative = np.cumsum(popularity / popularity.sum())
    cumulative /= cumulative[-1]  # rounding must not leave a gap below 1
    edges = np.cumsum(activity) / activity.sum() * rows
    with (folder / "ratings.csv").open("wb") as file:
        for begin in range(0, rows, block):
            count = min(block, rows - begin)
            user = np.searchsorted(edges, np.arange(begin, begin + count) + 0.5).clip(max=users - 1) + 1
            table = pl.DataFrame(
                {
                    "userId": user,
                    "movieId": np.searchsorted(cumulative, rng.random(count)).clip(max=items - 1) + 1,
                    "rating": rng.integers(1, 11, count) / 2,
                    "timestamp": rng.integers(789_652_009, 1_427_784_002, count),
                }
            )
            table.write_csv(file, include_header=begin == 0)
    genres = ("Action", "Comedy|Romance", "Drama", "Horror|Thriller", "(no genres listed)")
    lines = [f'{item},"Movie, The ({item})",{genres[item % 5]}' for item in range(1, items + 1)]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "\n".join(lines) + "\n")


def measure_preparation(folder: Path, batch_size: int = 4096, batches: int = 50) -> dict[str, float]:
    """Load, prepare and draw some batches in this process."""
    from . import load, train_batches

    began = time.perf_counter()
    data = load("ml-20m", folder)
    prepared = time.perf_counter()
    drawn = 0
    stream = train_batches(data, batch_size, seed=0, epoch=0)
    next(stream)  # the epoch's permutation is drawn before the first batch
    loading = time.perf_counter()
    for _, batch in zip(range(batches), stream, strict=False):
        drawn += len(batch)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "rows": len(data.train) + len(data.test),
        "prepare_seconds": prepared - began,
        "shuffle_seconds": loading - prepared,
        "samples_per_second": drawn / max(1e-9, time.perf_counter() - loading),
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the child process' own
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure_preparation(options.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(f"generating {options.rows:,} ratings", file=sys.stderr)
        write_ml20m(Path(scratch), options.rows)
        command = [sys.executable, "-m", "reference.data.measure", "--folder", scratch]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(
        f"{measured['rows']:,} rows: prepared in {measured['prepare_seconds']:.1f} s "
        f"with {measured['peak_gigabytes']:.2f} GB of memory at most; "
        f"epoch shuffled in {measured['shuffle_seconds']:.1f} s; "
        f"loader {measured['samples_per_second']:,.0f} samples/s (batch 4096, history ≤ 50)"
    )


if __name__ == "__main__":
    main()
