"""Penalties inside the sparse update: the losses, weights and files of the run whose penalty goes through autograd."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from din_kernels import MBAEmbedding
from reference import checkpoint, fused_tables, regularizers, train
from reference.data import ClickData
from reference.models import build, schema_of
from tests.reference.test_trainer import TINY

SGD = dataclasses.replace(
    TINY, models=("din",), variants=("unfused", "fused"), optimizer="sgd", lr=0.5, reg_lambda=0.05
)


@pytest.mark.parametrize(("kind", "reg_lambda"), [("mba", 5.0), ("l2", 0.8)])
def test_same_losses_same_weights_same_files(
    tiny: ClickData, tmp_path: Path, kind: str, reg_lambda: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    real = fused_tables.optimizers
    monkeypatch.setattr(fused_tables, "optimizers", lambda *a: (entered.append(a), real(*a))[1])
    options = dataclasses.replace(SGD, regularizer=kind, reg_lambda=reg_lambda, out=str(tmp_path))
    unfused, fused = train.run(options, tiny, quiet=True)
    assert len(entered) == 1
    torch.testing.assert_close(torch.tensor(fused.losses), torch.tensor(unfused.losses), rtol=1e-4, atol=1e-5)
    assert not isinstance(fused.model.items.item, MBAEmbedding)
    assert list(fused.model.state_dict()) == list(unfused.model.state_dict())
    torch.testing.assert_close(fused.model.items.item.weight, unfused.model.items.item.weight, rtol=1e-3, atol=1e-4)
    free = train.run(dataclasses.replace(options, regularizer="none", variants=("unfused",)), tiny, quiet=True)[0]
    assert max(abs(a - b) for a, b in zip(free.losses, unfused.losses, strict=True)) > 2e-4  # the penalty shows
    plain = build("din", schema_of(tiny), options.model_config())
    saved = torch.load(tmp_path / "checkpoints" / "din-fused.pt", weights_only=True)
    plain.load_state_dict(saved["model"], strict=True)
    checkpoint.load_weights(tmp_path / "din-fused.safetensors", plain)


def test_resumed_run_is_the_uninterrupted_one(tiny: ClickData, tmp_path: Path) -> None:
    options = dataclasses.replace(SGD, regularizer="mba", variants=("fused",))
    whole = train.run(dataclasses.replace(options, out=str(tmp_path / "whole")), tiny, quiet=True)[0]
    parts = dataclasses.replace(options, out=str(tmp_path / "parts"))
    train.run(dataclasses.replace(parts, until_epoch=1), tiny, quiet=True)
    resumed = train.run(dataclasses.replace(parts, resume=True), tiny, quiet=True)[0]
    assert resumed.losses == whole.losses
    assert torch.equal(resumed.model.items.item.weight, whole.model.items.item.weight)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer": "adam"}, "Adam"),
        ({"clip_norm": 5.0}, "clipping"),
        ({"compile": True}, "compiled"),
        ({"regularizer": "difacto"}, "counts"),
    ],
)
def test_where_the_numbers_would_differ_the_penalty_stays_with_autograd(changes: dict, reason: str) -> None:
    assert reason in str(fused_tables.obstacle(dataclasses.replace(SGD, **changes)))
    assert fused_tables.obstacle(SGD) is None


def enter_and_fail(model: torch.nn.Module, penalty: regularizers.Regularizer) -> None:
    weight = model.items.item.weight
    with fused_tables.FusedTables(model, penalty):
        assert isinstance(model.items.item, MBAEmbedding)
        assert model.items.item.weight is weight
        raise RuntimeError("stop")


def test_the_model_is_put_back_after_an_error(tiny: ClickData) -> None:
    options = dataclasses.replace(SGD, regularizer="mba")
    model = build("din", schema_of(tiny), options.model_config())
    table, penalty = model.items.item, regularizers.make(options, tiny)
    with pytest.raises(RuntimeError, match="stop"):
        enter_and_fail(model, penalty)
    assert model.items.item is table
    assert not penalty.in_update
