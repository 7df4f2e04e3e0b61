from __future__ import annotations

import pytest
import torch

pytest.importorskip("deepctr_torch")
from deepctr_torch.layers.activation import Dice
from deepctr_torch.layers.core import LocalActivationUnit
from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer

from ._parity import assert_parity, padded_inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "prelu", "dice"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("return_score", [False, True])
def test_attention_pooling(activation, softmax, return_score, dtype):
    layer = AttentionSequencePoolingLayer((9, 4), activation, softmax, return_score, embedding_dim=5)
    make = padded_inputs()
    report = assert_parity(
        layer,
        lambda seed: [make(seed)[0].unsqueeze(1), make(seed)[1], make(seed)[2].unsqueeze(1)],
        lambda module, inputs: module(*inputs),
        dtype=dtype,
    )
    whole = report.swapped[0].detail
    assert ("factorised" in whole) == (activation == "dice"), whole


def test_explicit_masks_and_lengths_beyond_the_padding():
    layer = AttentionSequencePoolingLayer((6,), "sigmoid", True, supports_masking=True, embedding_dim=5)
    make = padded_inputs()
    mask = torch.rand(6, 7) < 0.5

    def call(module, inputs):
        return module(*inputs, None, mask=mask)

    assert_parity(layer, lambda seed: [make(seed)[0].unsqueeze(1), make(seed)[1]], call)
    layer = AttentionSequencePoolingLayer((6,), "sigmoid", embedding_dim=5)
    assert_parity(
        layer,
        lambda seed: [make(seed)[0].unsqueeze(1), make(seed)[1], torch.tensor([0, 1, 7, 9, 2, 3])],
        lambda module, inputs: module(*inputs),
    )


@pytest.mark.parametrize(("dim", "shape"), [(2, (12, 5)), (3, (4, 3, 5))])
def test_dice(dim, shape):
    assert_parity(
        Dice(5, dim=dim),
        lambda seed: [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)],
        lambda module, inputs: module(*inputs),
        swapped={"Dice"},
    )


# Behind the library's Dice the draws fall on other elements (its output is a transposed view): same distribution, no parity.
@pytest.mark.parametrize(("activation", "dropout"), [("sigmoid", 0.0), ("sigmoid", 0.3), ("dice", 0.0)])
def test_unit_alone_and_dropout_draws_alike(activation, dropout):
    make = padded_inputs()
    report = assert_parity(
        LocalActivationUnit((8, 3), 5, activation, dropout_rate=dropout),
        lambda seed: [make(seed)[0].unsqueeze(1), make(seed)[1]],
        lambda module, inputs: module(*inputs),
    )
    if dropout and activation == "sigmoid":
        assert "training: first layer factorised (dropout)" in report.swapped[0].detail
