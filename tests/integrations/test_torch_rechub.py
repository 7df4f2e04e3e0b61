from __future__ import annotations

import pytest

pytest.importorskip("torch_rechub")
from torch_rechub.models.ranking.din import ActivationUnit

from ._parity import assert_parity, padded_inputs


@pytest.mark.parametrize("activation", ["dice", "relu", "prelu", "sigmoid"])
@pytest.mark.parametrize("softmax", [False, True])
def test_activation_unit(activation, softmax):
    make = padded_inputs()
    report = assert_parity(
        ActivationUnit(5, [8, 4], activation, softmax),
        lambda seed: [make(seed)[1], make(seed)[0]],
        lambda module, inputs: module(*inputs),
        swapped={"ActivationUnit"},
    )
    detail = report.swapped[0].detail
    if activation == "dice":
        assert len(report.left) == 2
        assert "not the paper's Dice" in report.left[0].detail
    else:
        assert (
            detail == "training: first layer factorised (BatchNorm on the batch's statistics); evaluation: whole unit"
        )
