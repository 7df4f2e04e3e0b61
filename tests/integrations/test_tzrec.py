"""TorchEasyRec's own ``DINEncoder`` and ``Dice``, from the installed package (see conftest.py)."""

from __future__ import annotations

import pytest
import torch

from ._parity import assert_parity, padded_inputs


@pytest.mark.parametrize("activation", ["nn.ReLU", "nn.Sigmoid", "nn.PReLU", "Dice", "nn.Tanh"])
@pytest.mark.parametrize("options", [{}, {"use_bn": True}, {"use_ln": True}, {"dropout_ratio": 0.3}])
def test_din_encoder(tzrec, activation, options):
    if activation == "Dice" and "dropout_ratio" in options:
        pytest.skip("behind the library's Dice dropout draws in another order: same distribution, no parity")
    mlp = {"hidden_units": [8, 4], "activation": activation, **options}
    encoder = tzrec.DINEncoder(5, 3, "click", mlp, max_seq_length=6)
    make = padded_inputs()

    def inputs(seed):
        query, keys, lengths = make(seed)
        return [query[:, :3], keys, lengths]

    def call(module, given):
        names = ("click.query", "click.sequence", "click.sequence_length")
        return module(dict(zip(names, given, strict=True)))

    assert_parity(encoder, inputs, call)


@pytest.mark.parametrize(("dim", "shape"), [(2, (12, 5)), (3, (4, 3, 5))])
def test_dice(tzrec, dim, shape):
    assert_parity(
        tzrec.Dice(5, dim=dim),
        lambda seed: [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)],
        lambda module, inputs: module(*inputs),
    )
