from __future__ import annotations

import pytest
import torch

pytest.importorskip("recbole")
from recbole.model.layers import Dice, SequenceAttLayer

import din_kernels

from ._parity import assert_parity, padded_inputs


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "dice", "tanh"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_attention(activation, softmax, weights):
    layer = SequenceAttLayer(torch.arange(7), (20, 8, 4), activation, softmax, weights)
    # With a softmax the library gives NaN for an empty history, and gradients of NaN: compared apart.
    make = padded_inputs(empty=not softmax)
    if activation == "dice":  # its alpha does not follow .to(float64), so the library itself cannot run there
        make_32 = make
        make = lambda seed: tuple(x.float() if x.is_floating_point() else x for x in make_32(seed))  # noqa: E731
    dtype = torch.float32 if activation == "dice" else torch.float64
    assert_parity(layer, lambda seed: list(make(seed)), lambda module, inputs: module(*inputs), dtype=dtype)


def test_an_empty_history_is_nan_under_softmax_as_in_the_library():
    layer = SequenceAttLayer(torch.arange(7), (20, 8), "sigmoid", True, False)
    query, keys, lengths = (x.float() if x.is_floating_point() else x for x in padded_inputs()(0))
    expected = layer(query, keys, lengths)
    converted, _ = din_kernels.convert(layer)
    torch.testing.assert_close(converted(query, keys, lengths), expected, equal_nan=True)
    assert expected[1].isnan().all()


@pytest.mark.parametrize("weights", [False, True])
def test_an_empty_history_is_zero_on_request(weights):
    layer = SequenceAttLayer(torch.arange(7), (20, 8), "sigmoid", True, weights)
    query, keys, lengths = (x.float() if x.is_floating_point() else x for x in padded_inputs()(0))
    expected = layer(query, keys, lengths).nan_to_num()
    converted, _ = din_kernels.convert(layer, empty_as_zero=True)
    out = converted(query.requires_grad_(), keys.requires_grad_(), lengths)
    torch.testing.assert_close(out, expected)
    assert not out[1].any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, keys, *layer.parameters()) if x.grad is not None)


def test_dice_is_silu_unless_its_alpha_was_set():
    layer = Dice(5)
    x = torch.randn(7, 5)
    expected = layer(x)
    converted, _ = din_kernels.convert(layer)
    torch.testing.assert_close(converted(x), expected)
    layer = Dice(5)
    layer.alpha += 0.5
    _, report = din_kernels.convert(layer)
    assert not report.swapped
    assert "alpha" in report.left[0].detail
