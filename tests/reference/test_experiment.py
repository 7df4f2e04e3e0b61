"""The tables' machinery: choices on the validation part only, runs that are kept, and a report that is arithmetic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from reference.data import ClickData, SyntheticConfig, generate
from reference.experiment import __main__ as command
from reference.experiment import laboratory as laboratory_module
from reference.experiment import report
from reference.experiment.laboratory import Choice, Laboratory
from reference.experiment.report import Measured
from reference.experiment.tables import PAPER, TABLES, Row, rows_of
from reference.metrics import rela_impr
from reference.options import Options, parse
from reference.train import DEMO
from reference.training_loop import RunResult, train
from tests.reference.conftest import small_data

DATA = "synthetic:users=60,items=120,categories=6,behaviours=8,impressions=6,tests=3"
TINY = Options(
    data=DATA,
    field_dim=4,
    unit_hidden=(8,),
    mlp_hidden=(8, 4),
    batch_size=32,
    epochs=2,
    interaction="product",
    max_history=8,
    resume=True,
)
GRID = {
    "lr": [0.02],
    "pooling": ["sum", "mean"],
    "softmax": [True],
    "reg_lambda": [0.1],
    "dropout": [0.5],
    "min_count": [3],
}


def without_timings(value: dict) -> dict:
    """What must repeat: not the timings, and not the commit, which may move on between two runs."""
    value = json.loads(json.dumps(value))
    del value["commit"]
    for row in value["rows"]:
        del row["seconds_per_step"]
    return value


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ClickData, Options]]:
    """Every training that really happens: (model, data, options)."""
    calls: list[tuple[str, ClickData, Options]] = []

    def spy(model, data, options, *, model_name, **rest):
        calls.append((model_name, data, options))
        return train(model, data, options, model_name=model_name, **rest)

    monkeypatch.setattr(laboratory_module, "train", spy)
    return calls


def run(table: str, out: Path, **changes) -> dict:
    keys = changes.pop("keys", None)
    options = dataclasses.replace(TINY, out=str(out), **changes)
    searched = {name for row in rows_of(table, keys) for name in row.grid}
    grid = {name: values for name, values in GRID.items() if name in searched}
    return command.experiment(table, options, [1, 2], [1], keys=keys, grid=grid, command="the command", quiet=True)


def test_table5_end_to_end(tmp_path: Path, trained: list) -> None:
    value = run("table5", tmp_path)
    assert [row["key"] for row in value["rows"]] == ["base", "din", "din-mba", "din-dice", "din-mba-dice"]
    assert json.loads((tmp_path / "table5.json").read_text()) == json.loads(json.dumps(value))
    text = (tmp_path / "table5.md").read_text()
    for part in ("the command", "DIN with MBA and Dice", "0.6083, +11.65 %", "planted model", "popularity", "Commit "):
        assert part in text
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert {
        "table5-curves.png",
        "table5-din-weights.png",
        "table5-din-embeddings.png",
        "table5-din-control.png",
    } <= pictures
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png"))
    for row in value["rows"]:
        assert len(row["gauc"]) == 2
        for seed in range(2):
            assert row["gauc"][seed] == row["gauc_by_epoch"][seed][row["epoch"] - 1]
        assert ("recovery" in row) == (row["model"] == "din")
        assert str(tmp_path) not in json.dumps(row)
    # "DIN with MBA" is what DIN chose, and λ; "with Dice" is it too, and Dice.
    chosen = {
        (o.activation, o.regularizer, o.lr, o.softmax)
        for m, d, o in trained
        if m == "din" and "validation" not in d.name
    }
    assert chosen == {
        ("prelu", "none", 0.02, True),
        ("prelu", "mba", 0.02, True),
        ("dice", "none", 0.02, True),
        ("dice", "mba", 0.02, True),
    }


def test_choices_never_see_the_test_part(tmp_path: Path, trained: list) -> None:
    """Trainings that settings are chosen by hold neither a test sample nor, as training data, what they score on."""
    run("table4", tmp_path, keys=["base", "mba"])
    searched = [data for _, data, _ in trained if "validation" in data.name]
    assert len(searched) == 2 + 1  # two poolings of the BaseModel, one λ
    whole, _ = generate(SyntheticConfig.parse(DATA), TINY.max_history)

    def rows(samples) -> set:
        return set(zip(samples.user.tolist(), samples.item.tolist(), samples.stop.tolist(), strict=True))

    for data in searched:
        assert len(data.train) + len(data.test) == len(whole.train)
        assert rows(data.train) | rows(data.test) == rows(whole.train)
        assert not (rows(data.test) & rows(whole.test) - rows(whole.train))


def test_validation_is_cut_as_the_test_is() -> None:
    later, _ = generate(SyntheticConfig.parse(DATA))
    held = later.held_out()
    for user in range(60):
        own, scored = held.train.user == user, held.test.user == user
        if own.any() and scored.any():
            assert held.train.stop[own].max() <= held.test.stop[scored].min()
    assert set(np.bincount(held.test.user).tolist()) == {3}  # as many as a test user has
    by_user = small_data()
    held = by_user.held_out(0.25)
    assert not set(held.train.user.tolist()) & set(held.test.user.tolist())
    assert not (set(held.train.user.tolist()) | set(held.test.user.tolist())) & set(by_user.test.user.tolist())


def test_an_interrupted_command_goes_on(tmp_path: Path, trained: list, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("table4", tmp_path / "whole", keys=["base", "dropout"])
    total = len(trained)
    trained.clear()
    counting = laboratory_module.train

    def interrupted(*arguments, **rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return counting(*arguments, **rest)

    monkeypatch.setattr(laboratory_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("table4", tmp_path / "parts", keys=["base", "dropout"])
    assert not (tmp_path / "parts" / "table4.json").exists()
    trained.clear()
    monkeypatch.setattr(laboratory_module, "train", counting)
    again = run("table4", tmp_path / "parts", keys=["base", "dropout"])
    assert len(trained) == total - 3
    assert without_timings(again) == without_timings(whole)
    trained.clear()
    run("table4", tmp_path / "parts", keys=["base", "dropout"])
    assert trained == []  # everything was kept
    run("table4", tmp_path / "parts", keys=["base"], init_std=0.2)
    assert len(trained) == 2 + 2  # other options are other runs
    trained.clear()
    run("table4", tmp_path / "parts", keys=["base"], init_std=0.2, resume=False)
    assert len(trained) == 2 + 2


class Scripted:
    """``train`` that gives the GAUC per epoch written down for a (lr, seed), or diverges."""

    def __init__(self, script: dict[tuple[float, int], list[float]]) -> None:
        self.script = script

    def __call__(self, model, data, options, **rest) -> RunResult:
        gauc = self.script[options.lr, options.seed]
        if not gauc:
            raise FloatingPointError("the loss is not finite")
        epochs = [{"gauc": g, "auc": g, "logloss": 1.0, "users": 9, "users_left_out": 0} for g in gauc]
        return RunResult("base", "unfused", model, 7, [1.0, 0.5], epochs, None, 0.1, 0)  # type: ignore[arg-type]


def chooser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: dict) -> Choice:
    monkeypatch.setattr(laboratory_module, "train", Scripted(script))
    data, _ = generate(SyntheticConfig.parse(DATA), TINY.max_history)
    laboratory = Laboratory(data, TINY, tmp_path, quiet=True)
    lrs = sorted({lr for lr, _ in script})
    return laboratory.choose(Row("base", "BaseModel", "base"), TINY, {"lr": lrs}, [1, 2], lambda: None)


def test_the_best_mean_over_seeds_and_its_epoch_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = {
        (0.1, 1): [0.60, 0.70, 0.65],
        (0.1, 2): [0.60, 0.70, 0.65],
        (0.2, 1): [0.50, 0.50, 0.90],  # one lucky seed is not enough
        (0.2, 2): [0.50, 0.50, 0.45],
        (0.3, 1): [0.99, 0.99, 0.99],  # diverges with the other seed
        (0.3, 2): [],
    }
    choice = chooser(tmp_path, monkeypatch, script)
    assert (choice.setting, choice.epoch, choice.options.lr) == ({"lr": 0.1}, 2, 0.1)
    assert [t["gauc"][1] for t in choice.tried] == [script[lr, 2] for lr in (0.1, 0.2, 0.3)]


def test_nothing_to_choose_from_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FloatingPointError, match="BaseModel: training diverged with every setting"):
        chooser(tmp_path, monkeypatch, {(0.1, 1): [0.6], (0.1, 2): []})


def test_comparisons_are_set_against_chance() -> None:
    def row(label: str, *gauc: float) -> dict:
        return {"label": label, "gauc": list(gauc)}

    base = row("BaseModel", 0.700, 0.702, 0.704)
    assert "+0.0080 GAUC (more than the 0.0040" in report.compare(row("DIN", 0.710, 0.710, 0.710), base)
    assert "a tie" in report.compare(row("DIN", 0.705, 0.705, 0.705), base)
    assert "WORSE" in report.compare(row("DIN", 0.650, 0.650, 0.650), base)
    assert "one seed" in report.compare(row("DIN", 0.710), row("BaseModel", 0.700))


def test_measured_takes_the_chosen_epoch() -> None:
    runs = [{"epochs": [{"gauc": 0.6}, {"gauc": 0.7}]}, {"epochs": [{"gauc": 0.5}, {"gauc": 0.8}]}]
    measured = Measured(Row("base", "BaseModel", "base"), Choice(TINY, {}, 2, []), runs)
    assert measured.values("gauc") == [0.7, 0.8]
    assert measured.mean() == pytest.approx(0.75)
    assert measured.spread() == pytest.approx(0.1)


def test_paper_figures_are_the_printed_ones() -> None:
    """RelaImpr follows from GAUC by eq. 11; the paper prints both, so a slip of the pen would show (in per cent)."""
    printed = {
        ("table3", "MovieLens-20M"): {
            "lr": -1.61,
            "wide-deep": 0.17,
            "pnn": 0.91,
            "deepfm": 1.04,
            "din": 1.61,
            "din-dice": 2.09,
        },
        ("table3", "Amazon Electronics"): {
            "lr": -24.34,
            "wide-deep": 0.36,
            "pnn": 1.52,
            "deepfm": 1.63,
            "din": 5.35,
            "din-dice": 6.82,
        },
        ("table5", "Alibaba"): {"din": 6.08, "din-mba": 9.28, "din-dice": 7.63, "din-mba-dice": 11.65},
    }
    for (table, column), expected in printed.items():
        gauc = PAPER[table][column]
        for key, value in expected.items():
            assert round(100 * rela_impr(gauc[key], gauc["base"]), 2) == pytest.approx(value, abs=0.011), (table, key)
        assert set(gauc) <= {row.key for row in TABLES[table]}


def test_rows_bring_those_they_start_from() -> None:
    assert [row.key for row in rows_of("table5", ["din-mba-dice"])] == ["din", "din-dice", "din-mba-dice"]
    with pytest.raises(ValueError, match=r"--rows must be among base, .*, got gpt"):
        rows_of("table5", ["gpt"])
    for table, rows in TABLES.items():
        seen: set[str] = set()
        for row in rows:
            assert row.after is None or row.after in seen, (table, row.key)
            assert row.key not in seen
            seen.add(row.key)


def test_presets_are_the_papers_recipes() -> None:
    public = parse(["--preset", "paper-public", "--epochs", "7"], DEMO)
    assert (public.optimizer, public.lr, public.lr_decay, public.batch_size, public.epochs) == ("sgd", 1.0, 0.1, 32, 7)
    alibaba = parse(["--preset", "paper-alibaba"], DEMO)
    assert (alibaba.optimizer, alibaba.lr, alibaba.lr_decay, alibaba.batch_size) == ("adam", 0.001, 0.9, 5000)
    assert (alibaba.field_dim, alibaba.mlp_hidden, alibaba.reg_lambda) == (12, (200, 80), 0.01)
    assert parse(["--preset", "paper-alibaba", "--lr", "0.5"], DEMO).lr == 0.5  # the command line has the last word
    with pytest.raises(SystemExit):
        parse(["--preset", "none-such"], DEMO)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["table4", "--data", DATA, "--rows", "base", "--seeds", "1", "--epochs", "1", "--batch-size", "64"]
    arguments += ["--out", str(tmp_path), "--grid", '{"lr": [0.01], "pooling": ["sum"]}', "--mlp-hidden", "8"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Table 4" in printed
    assert "| BaseModel" in printed
    assert str(tmp_path) not in (tmp_path / "table4.md").read_text()
    assert "--out FOLDER" in (tmp_path / "table4.md").read_text()
    assert command.main(["table4", "--data", "synthetic:users=0", "--out", str(tmp_path)]) == 1
    assert "error: synthetic: users must be at least 1" in capsys.readouterr().err
    for grid, message in (
        ('{"learning_rate": [1]}', "these rows search lr, pooling"),
        ('{"lr": 0.1}', "a list of values for 'lr'"),
    ):
        assert command.main([*arguments[:7], "--grid", grid]) == 1
        assert message in capsys.readouterr().err
    assert np.isfinite(json.loads((tmp_path / "table4.json").read_text())["rows"][0]["gauc"][0])
