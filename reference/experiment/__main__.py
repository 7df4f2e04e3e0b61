"""The paper's tables 3 to 5 on a data set of one's own: ``python -m reference.experiment table3``.

Every row chooses its learning rate, regularizer strength and so on, and the epoch to stop after, on a validation part
cut from the train part; then it is trained on the whole train part with every seed and scored on the test part. Runs
are kept in ``--out``: a command that was cut off goes on where it stopped. All options of ``reference.train`` apply.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data import ClickData, DataError, SyntheticConfig, generate, load
from ..data.synthetic import Planted, recovery
from ..files import replacing, write_json
from ..metrics import evaluate_scores
from ..models import DIN
from ..options import Options, check, from_arguments, output_folder, parse_with_preset, parser
from ..training_loop import behaviour_weights, reproducible
from . import pictures, report
from .laboratory import Laboratory, Probe
from .report import Measured
from .tables import TABLES, Row, rows_of

PROBED = 5000  # test samples on which the planted weights are compared


def prepare(options: Options) -> tuple[ClickData, Planted | None]:
    """The data set, with the truth where it is generated."""
    if options.data.partition(":")[0] == "synthetic":
        return generate(SyntheticConfig.parse(options.data), options.max_history)
    data = load(
        options.data,
        options.data_dir,
        max_history=options.max_history,
        history=options.history,
        split_seed=options.split_seed,
    )
    return data, None


def probe_of(planted: Planted | None, options: Options) -> Probe | None:
    """Rank correlation of a DIN's weights with the planted ones, after every epoch."""
    if planted is None:
        return None

    def probe(model: nn.Module, data: ClickData) -> dict[str, float]:
        if not isinstance(model, DIN):
            return {}
        samples = data.test.take(slice(0, PROBED))
        weights = behaviour_weights(model, data, samples, options)
        return {"recovery": recovery(weights, planted.weights(data, samples), samples.positions()[0])}

    return probe


def grids_of(rows: list[Row], given: dict[str, list[Any]]) -> dict[str, dict[str, list[Any]]]:
    """Each row's own grid, with the values of ``--grid`` for the options that it searches."""
    searched = {name for row in rows for name in row.grid}
    for name, values in given.items():
        if name not in searched:
            raise ValueError(f"--grid names {name!r}, but these rows search {', '.join(sorted(searched)) or 'nothing'}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"--grid must give a list of values for {name!r}, got {values!r}")
    return {row.key: {name: given.get(name, values) for name, values in row.grid.items()} for row in rows}


def experiment(
    table: str,
    options: Options,
    seeds: list[int],
    search_seeds: list[int],
    *,
    keys: list[str] | None = None,
    grid: dict[str, list[Any]] | None = None,
    command: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Everything the command does, files included; returns what the JSON holds."""
    from tqdm import tqdm

    check(options)
    at_commit = report.commit()  # of the code that runs, whatever happens to the files meanwhile
    rows = rows_of(table, keys)
    grids = grids_of(rows, grid or {})
    data, planted = prepare(options)
    out = output_folder(options)
    if not quiet:
        print(data.describe(), file=sys.stderr)
    laboratory = Laboratory(data, options, out, probe=probe_of(planted, options), quiet=quiet)
    searched = sum(math.prod(len(v) for v in grids[row.key].values()) for row in rows)
    measured: dict[str, Measured] = {}
    with tqdm(
        total=searched * len(search_seeds) + len(rows) * len(seeds), unit="run", disable=True if quiet else None
    ) as bar:
        for row in rows:
            bar.set_description(row.label)
            start = options if row.after is None else measured[row.after].choice.options
            choice = laboratory.choose(row, start, grids[row.key], search_seeds, lambda: bar.update())
            runs = []
            for seed in seeds:
                keep = choice.epoch if row.model == "din" and seed == seeds[0] else 0
                runs.append(laboratory.run(row.model, replace(choice.options, seed=seed), "test", keep_epoch=keep))
                bar.update()
            measured[row.key] = Measured(row, choice, runs)
            if not quiet:
                bar.write(
                    f"{row.label}: test GAUC {measured[row.key].mean():.4f} with {choice.setting}", file=sys.stderr
                )

    truth: dict[str, float] = {}
    if planted is not None:
        truth = evaluate_scores(data.test.label, planted.logits(data, data.test), data.test.user).as_dict()
    value = report.summary(table, command, at_commit, data, options, seeds, list(measured.values()), truth)
    write_json(out / f"{table}.json", value)
    with replacing(out / f"{table}.md") as temporary:
        temporary.write_text(report.markdown(value))
    pictures.learning_curves(value, out / f"{table}-curves.png")
    for row in rows:
        if row.model == "din":
            pictures.of_din(
                laboratory, measured[row.key], replace(options, seed=seeds[0]), out, prefix=f"{table}-{row.key}"
            )
    return value


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    p = parser()
    p.prog, p.description = "python -m reference.experiment", (__doc__ or "").split("\n")[0]
    p.set_defaults(out="runs/experiment", resume=True)
    p.add_argument("table", choices=TABLES)
    p.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (and those they start from)")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the runs on the test part")
    p.add_argument("--search-seeds", type=int, nargs="+", default=[1], help="of the runs on the validation part")
    p.add_argument("--grid", type=json.loads, default={}, help='JSON in place of a row\'s own values: {"lr": [0.01]}')
    for action in p._actions:
        if action.dest in ("models", "seed", "until_epoch", "demo"):  # the table says
            action.help = argparse.SUPPRESS
    given = parse_with_preset(p, arguments)
    given.pop("demo")
    table, keys, seeds = given.pop("table"), given.pop("rows"), given.pop("seeds")
    search_seeds, grid = given.pop("search_seeds"), given.pop("grid")
    options = from_arguments(given)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    try:
        with reproducible(options):
            value = experiment(
                table, options, seeds, search_seeds, keys=keys, grid=grid, command=command_line(arguments)
            )
    except (DataError, ValueError, NotImplementedError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.markdown(value))
    print(
        f"Written to {options.out}/: {table}.json, {table}.md and pictures; runs are kept in {Path(options.out) / 'runs'}"
    )
    return 0


def command_line(arguments: list[str]) -> str:
    """The command without this machine's folders."""
    shown = list(arguments)
    for place, argument in enumerate(arguments[:-1]):
        if argument in ("--data-dir", "--out"):
            shown[place + 1] = "FOLDER"
    return shlex.join(["python", "-m", "reference.experiment", *shown])


if __name__ == "__main__":
    sys.exit(main())
