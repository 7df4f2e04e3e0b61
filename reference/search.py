"""Choose hyper-parameters on a part held out of the *train* part, never on the test: ``python -m reference.search``.

Every model runs every setting of a small grid, over seeds; the table shows the mean validation GAUC and its spread.
All options of ``reference.train`` that are not searched apply here too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import ClickData, load
from .files import write_json
from .models import build, schema_of
from .options import Options, check, from_arguments, parse_with_preset, parser
from .training_loop import train

GRID: dict[str, list[Any]] = {"lr": [0.003, 0.01], "reg_lambda": [0.0, 0.003, 0.01, 0.03]}


def settings_of(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def search(
    options: Options, data: ClickData, grid: dict[str, list[Any]], seeds: list[int], out: Path, *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Rows of {model, setting, gauc (one per seed), logloss}, best first; ``resume`` keeps the rows in ``out``."""
    held = data.held_out(options.validation or 0.2, options.split_seed)
    done: dict[str, dict[str, Any]] = {}
    if options.resume and out.is_file():
        done = {row["key"]: row for row in json.loads(out.read_text())}
    for name, setting in itertools.product(options.models, settings_of(grid)):
        # λ = 0 is "none": the same thing, without the cost.
        regularizer = options.regularizer if setting.get("reg_lambda", options.reg_lambda) else "none"
        tried = dataclasses.replace(options, **setting, regularizer=regularizer)
        check(tried)
        key = json.dumps([name, seeds, tried.what_training_depends_on()], sort_keys=True)
        if key in done:
            continue
        runs = []
        for seed in seeds:
            seeded = dataclasses.replace(tried, seed=seed)
            torch.manual_seed(seed)
            model = build(name, schema_of(held), seeded.model_config())
            runs.append(train(model, held, seeded, model_name=name, quiet=quiet))
        done[key] = {
            "key": key,
            "model": name,
            "setting": setting,
            "gauc": [r.scores.gauc for r in runs],
            "logloss": [r.scores.logloss for r in runs],
        }
        write_json(out, list(done.values()))
    return sorted(done.values(), key=lambda row: -float(np.mean(row["gauc"])))


def table(rows: list[dict[str, Any]]) -> str:
    from tabulate import tabulate

    cells = [
        [
            row["model"],
            ", ".join(f"{key} {value:g}" for key, value in row["setting"].items()),
            f"{np.mean(row['gauc']):.4f} ± {np.std(row['gauc']):.4f}",
            f"{np.mean(row['logloss']):.4f}",
        ]
        for row in rows
    ]
    return tabulate(cells, ["model", "setting", "validation GAUC", "logloss"], disable_numparse=True)


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    p.prog, p.description = "python -m reference.search", (__doc__ or "").split("\n")[0]
    p.set_defaults(regularizer="l2", out="runs/search")
    p.add_argument("--grid", type=json.loads, default=GRID, help="JSON: option name -> list of values")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    given = parse_with_preset(p, sys.argv[1:] if arguments is None else arguments)
    given.pop("demo")
    grid, seeds = given.pop("grid"), given.pop("seeds")
    options = from_arguments(given)
    unknown = set(grid) - {f.name for f in dataclasses.fields(Options)}
    if unknown:
        p.error(f"--grid names options that do not exist: {', '.join(sorted(unknown))}")
    try:
        check(options)
        data = load(
            options.data,
            options.data_dir,
            max_history=options.max_history,
            history=options.history,
            split_seed=options.split_seed,
        )
        rows = search(options, data, grid, seeds, Path(options.out) / "search.json")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
