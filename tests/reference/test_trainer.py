"""The main job end to end on tiny data: reproducible, resumable, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reference import checkpoint, report, train, training_loop
from reference.baselines import item_rate, popularity
from reference.data import ClickData
from reference.files import replacing, write_json
from reference.models import build, schema_of
from reference.options import Options, check, parse
from tests.reference.conftest import small_data, write_ml100k

TINY = Options(
    models=("base", "din"),
    field_dim=4,
    unit_hidden=(8,),
    mlp_hidden=(16, 8),
    batch_size=64,
    epochs=2,
    lr=0.01,
    max_history=12,
)
PNG = b"\x89PNG\r\n\x1a\n"


def without_timings(path: Path) -> dict:
    value = json.loads(path.read_text())
    for result in value["results"].values():
        del result["seconds_per_step"], result["peak_bytes"]
    del value["options"]["out"], value["environment"]
    return value


def test_same_seed_same_numbers_and_all_outputs(tiny: ClickData, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        train.run(dataclasses.replace(TINY, out=str(folder)), tiny, quiet=True)
    assert without_timings(folders[0] / "metrics.json") == without_timings(folders[1] / "metrics.json")
    names = sorted(str(p.relative_to(folders[0])) for p in folders[0].rglob("*") if p.is_file())
    assert names == [
        "activation_weights.png",
        "base-unfused.safetensors",
        "checkpoints/base-unfused.pt",
        "checkpoints/din-unfused.pt",
        "din-unfused.safetensors",
        "loss_curves.png",
        "metrics.json",
    ]
    for picture in folders[0].glob("*.png"):
        assert picture.read_bytes().startswith(PNG)
    other = dataclasses.replace(TINY, seed=2, models=("din",), out=str(tmp_path / "three"))
    [result] = train.run(other, tiny, quiet=True)
    assert result.losses != json.loads((folders[0] / "metrics.json").read_text())["results"]["din-unfused"]["losses"]


def test_it_learns_and_beats_popularity(tiny: ClickData, tmp_path: Path) -> None:
    """The tiny users like one genre each: whoever reads the behaviours wins over every item-only score."""
    data = small_data(history="liked")
    options = dataclasses.replace(TINY, models=("din",), epochs=12, out=str(tmp_path))
    [result] = train.run(options, data, quiet=True)
    assert np.mean(result.losses[-10:]) < np.mean(result.losses[:10]) - 0.05
    assert result.scores.gauc > max(popularity(data).gauc, item_rate(data).gauc) + 0.05


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resume_equals_uninterrupted(tiny: ClickData, tmp_path: Path, optimizer: str) -> None:
    options = dataclasses.replace(TINY, models=("din",), epochs=3, optimizer=optimizer, regularizer="l2")
    [whole] = train.run(dataclasses.replace(options, out=str(tmp_path / "whole")), tiny, quiet=True)
    parts = dataclasses.replace(options, out=str(tmp_path / "parts"))
    [half] = train.run(dataclasses.replace(parts, until_epoch=1), tiny, quiet=True)
    assert half.losses == whole.losses[: len(half.losses)]
    [resumed] = train.run(dataclasses.replace(parts, resume=True), tiny, quiet=True)
    assert resumed.losses == whole.losses
    assert resumed.epochs == whole.epochs
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    # A finished run that is resumed has nothing left to do and still reports.
    [again] = train.run(dataclasses.replace(parts, resume=True), tiny, quiet=True)
    assert again.losses == whole.losses
    assert again.scores == whole.scores


def test_checkpoints_of_other_options_or_damaged_ones_are_refused(tiny: ClickData, tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, models=("din",), out=str(tmp_path), epochs=1)
    train.run(options, tiny, quiet=True)
    with pytest.raises(ValueError, match=r"other options \(lr: 0.01 then, 0.02 now\)"):
        train.run(dataclasses.replace(options, lr=0.02, resume=True), tiny, quiet=True)
    path = tmp_path / "checkpoints" / "din-unfused.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        train.run(dataclasses.replace(options, resume=True), tiny, quiet=True)


def test_saved_weights_give_the_same_scores(tiny: ClickData, tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, models=("din",), out=str(tmp_path), epochs=1)
    [result] = train.run(options, tiny, quiet=True)
    model = build("din", schema_of(tiny), options.model_config())
    checkpoint.load_weights(tmp_path / "din-unfused.safetensors", model)
    assert training_loop.evaluate(model, tiny, options) == result.scores


def test_learning_rate_falls_exponentially() -> None:
    options = Options(lr=1.0, lr_decay=0.1)
    assert training_loop.learning_rate(options, 0, 100) == 1.0
    assert training_loop.learning_rate(options, 50, 100) == pytest.approx(10**-0.5)
    assert training_loop.learning_rate(options, 100, 100) == pytest.approx(0.1)


def test_loss_difference_by_hand() -> None:
    assert report.loss_difference([1.0, 2.2, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="3 and 2 steps"):
        report.loss_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_a_diverging_run_says_so(tiny: ClickData, tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, models=("base",), optimizer="sgd", lr=1e30, out=str(tmp_path))
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train.run(options, tiny, quiet=True)
    assert not (tmp_path / "metrics.json").exists()


def test_bf16_autocast_runs(tiny: ClickData, tmp_path: Path) -> None:
    [result] = train.run(dataclasses.replace(TINY, models=("din",), amp="bf16", out=str(tmp_path)), tiny, quiet=True)
    assert np.isfinite(result.losses).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("gpt",)}, "--models must be among"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({"regularizer": "l1"}, "--regularizer must be one of"),
        ({"mlp_hidden": (8, 0)}, "--mlp-hidden must be positive"),
        ({"validation": 1.0}, "--validation must be in"),
    ],
)
def test_options_are_checked_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(TINY, **change))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_ml100k(tmp_path / "ml-100k")
    arguments = ["--data-dir", str(folder), "--epochs", "1", "--batch-size", "64", "--out", str(tmp_path / "out")]
    arguments += ["--models", "din", "base", "--field-dim", "4", "--max-history", "8", "--optimizer", "sgd"]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    for part in ("GAUC", "RelaImpr", "popularity", "din (unfused)", "per step", "peak memory", "left out"):
        assert part in printed
    assert train.main(["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "no")]) == 1
    assert "error: ml-100k: --data-dir" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    with pytest.raises(SystemExit):
        train.main(["--lr", "-1"])
    assert "--lr must be positive" in capsys.readouterr().err


def test_demo_defaults_can_be_overridden() -> None:
    options = parse(["--demo", "--epochs", "7"], train.DEMO)
    assert options == dataclasses.replace(train.DEMO, epochs=7)
    assert train.planned_runs(train.DEMO, demo=True) == [
        ("base-mean", "unfused"),
        ("din", "unfused"),
        ("din", "fused"),
    ]


def test_replacing_leaves_no_half_file(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_search_scores_validation_users_only_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reference import search

    data, seen = small_data(), []

    def spy(model: torch.nn.Module, held: ClickData, options: Options, **rest: object) -> training_loop.RunResult:
        seen.append(held)
        return training_loop.train(model, held, options, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "train", spy)
    options = dataclasses.replace(TINY, models=("din",), epochs=1, regularizer="l2")
    out, grid = tmp_path / "search.json", {"lr": [1e-4, 0.02], "reg_lambda": [0.0]}
    rows = search.search(options, data, grid, [1, 2], out, quiet=True)
    assert [len(row["gauc"]) for row in rows] == [2, 2]
    assert np.mean(rows[0]["gauc"]) >= np.mean(rows[1]["gauc"])
    test_users = set(data.test.user.tolist())
    for held in seen:
        assert not test_users & (set(held.train.user.tolist()) | set(held.test.user.tolist()))
    seen.clear()
    again = search.search(dataclasses.replace(options, resume=True), data, grid, [1, 2], out, quiet=True)
    assert again == rows
    assert seen == []
    assert "validation GAUC" in search.table(rows)


def test_the_report_calls_a_tie_a_tie_and_a_loss_a_loss(tiny: ClickData) -> None:
    def result(name: str, gauc: float) -> training_loop.RunResult:
        scores = training_loop.Scores(gauc, 0.6, 0.6, 10, 1)
        return training_loop.RunResult(name, "unfused", torch.nn.Identity(), 0, [1.0], [], scores, 0.1, 0)

    def notes(base: float, din: float) -> str:
        return "\n".join(report.notes([result("base-mean", base), result("din", din)], {}, "test"))

    assert "tie" in notes(0.7191, 0.7197)
    assert "tie" not in notes(0.71, 0.73)
    assert "NOT" not in notes(0.71, 0.73)
    assert "does NOT beat base-mean (0.7300)" in notes(0.73, 0.71)
    two = [result("base", 0.6), result("base-mean", 0.7), result("din", 0.75)]
    assert report.base_gauc(two) == 0.7  # the better pooling is the one to beat
