"""What the tables compare, what each row may choose on the validation part, and what the paper reports.

A row is a model with some options fixed. Its ``grid`` is searched on the validation part, starting from what the row
``after`` chose: so "DIN with MBA" differs from "DIN" in λ alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LR: list[Any] = [0.003, 0.01]
LAMBDAS: dict[str, list[Any]] = {"mba": [0.03, 0.3, 3.0], "difacto": [1e-4, 1e-3, 1e-2]}
NEVER = 2**62  # more samples than any item has


@dataclass(frozen=True)
class Row:
    """``model`` with ``fixed`` options; ``grid``: option -> values to choose from; ``note``: what is not in the paper."""

    key: str
    label: str
    model: str
    fixed: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    after: str | None = None
    ours: bool = False


# Models without attention choose how they pool, DIN whether its weights are normalised: each is a choice its authors had.
_POOLED: dict[str, list[Any]] = {"lr": LR, "pooling": ["sum", "mean"]}
_ATTENTIVE: dict[str, list[Any]] = {"lr": LR, "softmax": [False, True]}
_PRELU = {"activation": "prelu", "regularizer": "none"}
_DICE = {"activation": "dice", "regularizer": "none"}

BASE = Row("base", "BaseModel", "base", _PRELU, _POOLED)
DIN = Row("din", "DIN", "din", _PRELU, _ATTENTIVE)
DIN_DICE = Row("din-dice", "DIN with Dice", "din", {"activation": "dice"}, {"lr": LR}, after="din")


def _mba(after: Row, key: str, label: str) -> Row:
    return Row(key, label, after.model, {"regularizer": "mba"}, {"reg_lambda": LAMBDAS["mba"]}, after=after.key)


TABLES: dict[str, tuple[Row, ...]] = {
    "table3": (
        Row("lr", "LR", "lr", _PRELU, {"lr": LR}),
        BASE,
        Row("wide-deep", "Wide&Deep", "wide-deep", _PRELU, _POOLED),
        Row("pnn", "PNN", "pnn", _PRELU, _POOLED),
        Row("deepfm", "DeepFM", "deepfm", _PRELU, _POOLED),
        DIN,
        DIN_DICE,
        # The candidate ∘ pooled product is what PNN has and the paper's DIN has not: the same for both.
        Row(
            "base-cross", "BaseModel, candidate ∘ pooled", "base", {"cross": True}, {"lr": LR}, after="base", ours=True
        ),
        Row("din-cross", "DIN, candidate ∘ pooled", "din", {"cross": True}, {"lr": LR}, after="din", ours=True),
    ),
    "table4": (
        BASE,
        Row(
            "no-ids",
            "without item ids",
            "base",
            {"regularizer": "filter", "min_count": NEVER},
            after="base",
        ),
        Row(
            "dropout",
            "with item ids, Dropout",
            "base",
            {"regularizer": "dropout"},
            {"dropout": [0.2, 0.5]},
            after="base",
        ),
        Row(
            "filter",
            "with item ids, Filter",
            "base",
            {"regularizer": "filter"},
            {"min_count": [5, 20]},
            after="base",
        ),
        Row(
            "difacto",
            "with item ids, DiFacto",
            "base",
            {"regularizer": "difacto"},
            {"reg_lambda": LAMBDAS["difacto"]},
            after="base",
        ),
        _mba(BASE, "mba", "with item ids, MBA"),
    ),
    "table5": (
        BASE,
        DIN,
        _mba(DIN, "din-mba", "DIN with MBA"),
        DIN_DICE,
        _mba(DIN_DICE, "din-mba-dice", "DIN with MBA and Dice"),
    ),
}

# User-weighted AUC as printed (Zhou et al. 2018, tables 3 to 5).
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "table3": {
        "MovieLens-20M": {
            "lr": 0.7263,
            "base": 0.7300,
            "wide-deep": 0.7304,
            "pnn": 0.7321,
            "deepfm": 0.7324,
            "din": 0.7337,
            "din-dice": 0.7348,
        },
        "Amazon Electronics": {
            "lr": 0.7742,
            "base": 0.8624,
            "wide-deep": 0.8637,
            "pnn": 0.8679,
            "deepfm": 0.8683,
            "din": 0.8818,
            "din-dice": 0.8871,
        },
    },
    "table4": {
        "Alibaba": {
            "base": 0.5959,
            "dropout": 0.5970,
            "filter": 0.5983,
            "difacto": 0.5954,
            "mba": 0.6031,
        }
    },
    "table5": {
        "Alibaba": {"base": 0.5970, "din": 0.6029, "din-mba": 0.6060, "din-dice": 0.6044, "din-mba-dice": 0.6083},
    },
}
CORRECTION = (
    "The authors later gave 0.8698 for DIN and 0.8711 for DIN with Dice on Amazon Electronics: batch normalisation had let "
    "labels through (their repository's README)."
)


def paper_columns(table: str, data: str) -> dict[str, dict[str, float]]:
    """The paper's columns that a data set's own figures belong beside."""
    columns = PAPER[table]
    if table != "table3":
        return columns
    wanted = "MovieLens-20M" if data.startswith("ml-") else "Amazon Electronics"
    return {wanted: columns[wanted]}


def rows_of(table: str, keys: list[str] | None = None) -> list[Row]:
    """The rows ``keys`` of a table, with the rows that they start from, in the table's order."""
    rows = TABLES[table]
    if keys is None:
        return list(rows)
    known = {row.key: row for row in rows}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(f"--rows must be among {', '.join(known)}, got {', '.join(unknown)}")
    wanted = set(keys)
    for row in reversed(rows):
        if row.key in wanted and row.after is not None:
            wanted.add(row.after)
    return [row for row in rows if row.key in wanted]
