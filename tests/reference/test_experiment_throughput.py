"""The throughput table: the same batches for both variants, a real training step, and readable errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reference import throughput
from reference.data import Batch, ClickData, gather_batch, prefetched, train_batches
from reference.models import build, build_twin, schema_of
from tests.reference.conftest import small_data
from tests.reference.test_trainer import TINY

DATA = "synthetic:users=60,items=120,categories=6,behaviours=8,impressions=4"


def test_a_step_trains_fused_and_unfused_alike() -> None:
    data = small_data()
    unfused = build("din", schema_of(data), TINY.model_config())
    fused = build_twin("din", schema_of(data), TINY.model_config(), unfused, fused=True)
    batch = gather_batch(data, data.train.take(slice(100, 164)))
    options = dataclasses.replace(TINY, optimizer="sgd", lr=0.1)
    before = float(unfused.eval().loss(batch).detach())  # in evaluation mode: running statistics stay as they are
    for model in (unfused, fused):
        assert throughput.Stepper(model, options).seconds(batch) > 0
    assert float(unfused.eval().loss(batch).detach()) < before
    for key, value in fused.state_dict().items():
        torch.testing.assert_close(value, unfused.state_dict()[key], rtol=1e-4, atol=1e-6, msg=key)


def test_prefetched_batches_are_the_same_batches(tiny: ClickData) -> None:
    plain = list(train_batches(tiny, 64, seed=1, epoch=0))
    ahead = list(prefetched(train_batches(tiny, 64, seed=1, epoch=0)))
    assert len(ahead) == len(plain)
    for one, other in zip(ahead, plain, strict=True):
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_prefetching_stops_with_its_reader_and_hands_errors_on(tiny: ClickData) -> None:
    stream = prefetched(train_batches(tiny, 8, seed=1, epoch=0))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]

    def broken() -> Iterator[Batch]:
        yield from itertools.islice(train_batches(tiny, 8, seed=1, epoch=0), 3)
        raise ValueError("a truncated file")

    stream = prefetched(broken())
    assert len(list(itertools.islice(stream, 3))) == 3
    with pytest.raises(ValueError, match="a truncated file"):
        next(stream)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", DATA, "--batch-size", "16", "--steps", "4", "--mlp-hidden", "8", "--out", str(tmp_path)]
    assert throughput.main(arguments) == 0
    printed = capsys.readouterr().out
    for part in ("unfused / fused", "| base", "| din", "of the faster step"):
        assert part in printed
    rows = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["base", "din"]
    assert all(row["steps"] == 4 and min(row["unfused"], row["fused"], row["load"]) > 0 for row in rows)
    assert throughput.main(["--data", DATA, "--batch-size", "4096", "--out", str(tmp_path)]) == 1
    assert "lower --batch-size" in capsys.readouterr().err
