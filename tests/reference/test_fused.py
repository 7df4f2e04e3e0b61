"""Fused and unfused models are the same model: the same weights, the same loss curve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from reference import report, train
from reference.data import ClickData, gather_batch
from reference.models import build, build_twin, schema_of
from tests.reference.test_trainer import TINY


@pytest.mark.parametrize("activation", ["dice", "prelu"])
@pytest.mark.parametrize("interaction", ["outer", "product"])
@pytest.mark.parametrize("softmax", [False, True])
def test_same_weights_same_logits_same_gradients(
    tiny: ClickData, activation: str, interaction: str, softmax: bool
) -> None:
    options = dataclasses.replace(TINY, activation=activation, interaction=interaction, softmax=softmax)
    unfused = build("din", schema_of(tiny), options.model_config())
    fused = build_twin("din", schema_of(tiny), options.model_config(), unfused, fused=True)
    assert list(fused.state_dict()) == list(unfused.state_dict())
    batch = gather_batch(tiny, tiny.train.take(slice(0, 64)))
    unfused.loss(batch).backward()
    fused.loss(batch).backward()
    gradients = dict(unfused.named_parameters())
    # fp32 sums of a few hundred terms in another order; relative to the largest gradient of the model, because some
    # true gradients are zero (the last bias under softmax) and consist of rounding only.
    scale = max(float(p.grad.abs().max()) for p in gradients.values())
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=2e-6 * scale, msg=name)
    unfused.eval(), fused.eval()
    torch.testing.assert_close(fused(batch), unfused(batch), rtol=1e-4, atol=1e-5)


def test_the_top_mlp_runs_dice_with_its_linear_layer(tiny: ClickData, monkeypatch: pytest.MonkeyPatch) -> None:
    import din_kernels

    calls = []
    real = din_kernels.modules.linear_dice
    monkeypatch.setattr(din_kernels.modules, "linear_dice", lambda *given: (calls.append(given), real(*given))[1])
    options = dataclasses.replace(TINY, activation="dice")
    for fused in (False, True):
        calls.clear()
        model = build("din", schema_of(tiny), dataclasses.replace(options.model_config(), fused=fused))
        model(gather_batch(tiny, tiny.train.take(slice(0, 8))))
        assert len(calls) == (len(options.model_config().mlp_hidden) if fused else 0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_loss_curves_agree_over_a_run(tiny: ClickData, tmp_path: Path, optimizer: str) -> None:
    options = dataclasses.replace(TINY, models=("din",), variants=("unfused", "fused"), optimizer=optimizer)
    results = train.run(dataclasses.replace(options, out=str(tmp_path)), tiny, quiet=True)
    assert [r.variant for r in results] == ["unfused", "fused"]
    assert report.fused_differences(results)["din"] < 1e-4  # the project's promise for the demo, not a rounding bound
    assert results[0].losses != [results[0].losses[0]] * len(results[0].losses)
