"""A table's results as JSON and Markdown: ours beside the paper's, and notes that say what the table does not."""

from __future__ import annotations

import math
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..baselines import BASELINES
from ..data import ClickData
from ..metrics import rela_impr
from ..options import Options
from .laboratory import Choice, Record
from .tables import CORRECTION, Row, paper_columns

TITLES = {
    "table3": "Table 3: models",
    "table4": "Table 4: regularizers of the embeddings",
    "table5": "Table 5: DIN with each technique on and off",
}


@dataclass(frozen=True)
class Measured:
    """A row with what it chose and its runs on the test part, one a seed."""

    row: Row
    choice: Choice
    runs: list[Record]

    def values(self, metric: str) -> list[float]:
        """Per seed, after the epoch that was chosen on the validation part; NaN where the run diverged or has none."""
        epochs = [run.get("epochs") for run in self.runs]
        return [e[self.choice.epoch - 1].get(metric, float("nan")) if e else float("nan") for e in epochs]

    def mean(self, metric: str = "gauc") -> float:
        return float(np.mean(self.values(metric)))

    def spread(self, metric: str = "gauc") -> float:
        """Largest minus smallest over the seeds: what chance alone does."""
        return float(np.ptp(self.values(metric)))


def commit() -> str:
    """The commit of this project that is running, with a + if tracked files differ from it."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder.parent))
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summary(
    table: str,
    command: str,
    at_commit: str,
    data: ClickData,
    options: Options,
    seeds: list[int],
    measured: list[Measured],
    truth: dict,
) -> dict[str, Any]:
    base = next((m.mean() for m in measured if m.row.key == "base"), float("nan"))
    device = torch.device(options.device)
    paper = paper_columns(table, options.data)
    return {
        "table": table,
        "command": command,
        "commit": at_commit,
        "data": data.describe(),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "variant": options.variants[0],
        },
        "options": {**options.as_dict(), "data_dir": None, "out": None},
        "seeds": seeds,
        "untrained": {name: score(data).as_dict() for name, score in BASELINES.items()},
        "truth": truth,
        "rows": [
            {
                "key": m.row.key,
                "label": m.row.label,
                "model": m.row.model,
                "in_the_paper": not m.row.ours,
                "chosen": m.choice.setting,
                "epoch": m.choice.epoch,
                "validation": m.choice.tried,
                "parameters": m.runs[0].get("parameters"),
                "seconds_per_step": float(np.median([r.get("seconds_per_step", float("nan")) for r in m.runs])),
                **{metric: m.values(metric) for metric in ("gauc", "auc", "logloss", *_extra(m))},
                "rela_impr": rela_impr(m.mean(), base),
                "paper_gauc": {name: column.get(m.row.key) for name, column in paper.items()},
                "gauc_by_epoch": [[e["gauc"] for e in run.get("epochs", [])] for run in m.runs],
                "training_loss": [run.get("loss", []) for run in m.runs],
            }
            for m in measured
        ],
    }


def _extra(measured: Measured) -> list[str]:
    known = {"gauc", "auc", "logloss", "users", "users_left_out"}
    return sorted({key for run in measured.runs for epoch in run.get("epochs", [])[:1] for key in epoch} - known)


def markdown(value: dict[str, Any]) -> str:
    """The table and its notes; everything in it is taken from ``summary``'s value."""
    from tabulate import tabulate

    extra = sorted({key for row in value["rows"] for key in row if key == "recovery"})
    columns = list(value["rows"][0]["paper_gauc"])
    paper_base = {c: next((r["paper_gauc"][c] for r in value["rows"] if r["key"] == "base"), None) for c in columns}
    header = ["model", "GAUC", "RelaImpr", "AUC", "logloss", "parameters", "chosen on validation"]
    header += ["rank correlation with the planted weights" for _ in extra] + [
        f"paper, {c}: GAUC, RelaImpr" for c in columns
    ]
    lines = []
    for row in value["rows"]:
        chosen = ", ".join(f"{key} {_short(v)}" for key, v in row["chosen"].items())
        cells = [
            row["label"] + ("" if row["in_the_paper"] else " (not in the paper)"),
            f"{np.mean(row['gauc']):.4f}" + (f" ± {np.ptp(row['gauc']) / 2:.4f}" if len(row["gauc"]) > 1 else ""),
            "" if math.isnan(row["rela_impr"]) else f"{100 * row['rela_impr']:+.2f} %",
            f"{np.mean(row['auc']):.4f}",
            f"{np.mean(row['logloss']):.4f}",
            f"{row['parameters']:,}" if row["parameters"] else "",
            ", ".join(filter(None, [chosen, f"epoch {row['epoch']}"])),
        ]
        cells += [f"{np.mean(row[key]):.3f}" if key in row else "" for key in extra]
        for column in columns:
            gauc, base = row["paper_gauc"][column], paper_base[column]
            impr = f", {100 * rela_impr(gauc, base):+.2f} %" if gauc and base else ""
            cells.append(f"{gauc:.4f}{impr}" if gauc else "")
        lines.append(cells)
    for name, scores in value["untrained"].items():
        lines.append([f"{name} (no model)", f"{scores['gauc']:.4f}", "", f"{scores['auc']:.4f}", "", "", ""])
    if value["truth"]:
        truth = value["truth"]
        lines.append(
            ["the planted model", f"{truth['gauc']:.4f}", "", f"{truth['auc']:.4f}", f"{truth['logloss']:.4f}", "", ""]
        )
    lines = [row + [""] * (len(header) - len(row)) for row in lines]
    body = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    environment = value["environment"]
    told = [f"# {TITLES[value['table']]}", "", value["data"] + ".", "", body, "", *(f"- {n}" for n in notes(value)), ""]
    told += ["```", value["command"], "```", ""]
    told.append(
        f"Commit {value['commit']}; torch {environment['torch']}, Python {environment['python']}, "
        f"{environment['device']}, {environment['threads']} thread(s), {environment['variant']} modules."
    )
    return "\n".join(told) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def notes(value: dict[str, Any]) -> list[str]:
    """How the numbers came about, and whether the order of the paper holds here: also where it does not."""
    rows = {row["key"]: row for row in value["rows"]}
    seeds = value["seeds"]
    over = f"mean over the seeds {', '.join(map(str, seeds))} ± half of the range between them"
    told = [
        f"GAUC: {over if len(seeds) > 1 else f'seed {seeds[0]}'}, on the test part. "
        "Options and the epoch to stop after were chosen on a validation part cut from the train part."
    ]
    if "base" in rows:
        base = rows["base"]
        for row in value["rows"]:
            if row["key"].startswith("din") or row["key"] in ("mba", "dropout", "filter", "difacto", "no-ids"):
                told.append(compare(row, base))
    if "base-cross" in rows and "din-cross" in rows:
        told.append(compare(rows["din-cross"], rows["base-cross"]))
    if any("Amazon" in column for row in value["rows"] for column in row["paper_gauc"]):
        told.append(CORRECTION)
    if any("recovery" in row for row in value["rows"]):
        told.append(
            "Rank correlation: mean of Spearman's over test samples between DIN's weights and the planted ones, up to one "
            "sign for all; weights that ignore the candidate get about 0."
        )
    return told


def compare(row: dict[str, Any], base: dict[str, Any]) -> str:
    """One sentence: the lead of ``row`` over ``base``, set against what seeds alone do."""
    lead = float(np.mean(row["gauc"]) - np.mean(base["gauc"]))
    chance = max(float(np.ptp(row["gauc"])), float(np.ptp(base["gauc"])))
    if len(row["gauc"]) < 2:
        verdict = "one seed: no spread to set it against"
    elif abs(lead) <= chance:
        verdict = f"a tie: seeds alone move either by up to {chance:.4f}"
    else:
        verdict = f"{'more' if lead > 0 else 'WORSE, by more'} than the {chance:.4f} that seeds alone do"
    return f"{row['label']} against {base['label']}: {lead:+.4f} GAUC ({verdict})."
