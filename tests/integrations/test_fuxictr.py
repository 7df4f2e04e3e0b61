from __future__ import annotations

import pytest
import torch

pytest.importorskip("fuxictr")
from fuxictr.pytorch.layers.activations import Dice
from fuxictr.pytorch.layers.attentions.target_attention import DIN_Attention

from ._parity import assert_parity, padded_inputs


def masks(kind):
    def make(seed):
        generator = torch.Generator().manual_seed(100 + seed)
        if kind == "none":
            return None
        mask = torch.rand(6, 7, generator=generator) < 0.6
        mask[1] = False  # an empty history
        return {"bool": mask, "float": mask.float(), "int": mask.int(), "fraction": mask * 0.5}[kind]

    return make


@pytest.mark.parametrize("activation", ["ReLU", "Sigmoid", "Dice"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "fraction"])
def test_attention(activation, softmax, kind):
    layer = DIN_Attention(5, [8, 4], activation, use_softmax=softmax)
    make, make_mask = padded_inputs(), masks(kind)
    state = {}

    def inputs(seed):
        state["mask"] = make_mask(seed)
        return list(make(seed)[:2])

    assert_parity(layer, inputs, lambda module, given: module(*given, mask=state["mask"]))


@pytest.mark.parametrize(
    "options",
    [
        {"output_activation": "Sigmoid"},
        {"batch_norm": True},
        {"batch_norm": True, "hidden_activations": "Sigmoid", "use_softmax": True},
        {"dropout_rate": 0.4},
        {"dropout_rate": 0.4, "batch_norm": True, "hidden_activations": "Dice", "output_activation": "Sigmoid"},
        {"hidden_activations": "Tanh"},
    ],
)
def test_options(options):
    layer = DIN_Attention(5, [8, 4], **options)
    make, make_mask = padded_inputs(), masks("float")
    assert_parity(
        layer, lambda seed: list(make(seed)[:2]), lambda module, given: module(*given, mask=make_mask(0).bool())
    )


def test_dice():
    assert_parity(
        Dice(5),
        lambda seed: [torch.randn(12, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)],
        lambda module, inputs: module(*inputs),
    )
