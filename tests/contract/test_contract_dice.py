"""``Dice`` as a stranger would check it: random shapes and masks against float64 NumPy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import din_kernels


def _numpy(tensor):
    return tensor.detach().double().cpu().numpy().copy()


def dice_by_formula(x, mask, alpha, mean, var, eps, training, gain, shift):
    """y, and the batch's (mean, biased variance, rows) when they were used; x [R, C], mask [R] or None."""
    rows = x if mask is None else x[mask]
    used = None
    if training and len(rows) > 1:
        mean, var = rows.mean(0), rows.var(0)
        used = (mean, var, len(rows))
    p = 1 / (1 + np.exp(-((x - mean) / np.sqrt(var + eps) * gain + shift)))
    return p * x + (1 - p) * alpha * x, used


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dice(seed, backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    rng = random.Random(1000 + seed)
    torch.manual_seed(seed)
    dtype = torch.float64 if backend == "torch" else torch.float32
    channels = rng.choice([1, 2, 7, 16, 33, 80])
    leading = rng.choice([(2,), (5,), (40,), (3, 4), (2, 3, 5), (129,)])
    momentum = rng.choice([0.1, 0.5, None])
    affine = rng.random() < 0.3
    eps = rng.choice([1e-8, 1e-3])
    layer = din_kernels.Dice(channels, eps=eps, momentum=momentum, affine=affine, backend=backend).to(device, dtype)
    with torch.no_grad():
        layer.alpha.uniform_(-0.5, 0.5)
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_var.uniform_(0.5, 2)
        if affine:
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-0.5, 0.5)
    training = rng.random() < 0.7
    layer.train(training)
    x = (torch.randn(*leading, channels, dtype=dtype, device=device) * 2 + 1).requires_grad_()
    given = x
    if len(leading) == 1 and rng.random() < 0.3:  # strided rows
        x = (torch.randn(*leading, channels + 3, dtype=dtype, device=device) * 2 + 1).requires_grad_()
        given = x[..., 1 : channels + 1]
    mask = torch.rand(leading, device=device) < rng.choice([0.0, 0.5, 0.9]) if rng.random() < 0.5 else None
    before = [_numpy(t) for t in (layer.alpha, layer.running_mean, layer.running_var)]
    gain, shift = (_numpy(layer.weight), _numpy(layer.bias)) if affine else (1.0, 0.0)
    flat_mask = None if mask is None else mask.reshape(-1).cpu().numpy()
    flat = _numpy(given).reshape(-1, channels)
    expected, used = dice_by_formula(flat, flat_mask, *before, eps, training, gain, shift)

    y = layer(given) if mask is None else layer(given, mask)
    exact = dtype == torch.float64
    np.testing.assert_allclose(
        _numpy(y).reshape(-1, channels), expected, rtol=1e-9 if exact else 1e-4, atol=1e-10 if exact else 1e-5
    )
    if used is not None:
        step = 1.0 if momentum is None else momentum  # the first batch of a cumulative average
        mean, var, rows = used
        for buffer, old, new in (
            (layer.running_mean, before[1], mean),
            (layer.running_var, before[2], var * rows / (rows - 1)),
        ):
            np.testing.assert_allclose(
                _numpy(buffer), (1 - step) * old + step * new, rtol=1e-9 if exact else 1e-4, atol=1e-6
            )
    else:
        np.testing.assert_array_equal(_numpy(layer.running_mean), before[1])
        np.testing.assert_array_equal(_numpy(layer.running_var), before[2])
    assert int(layer.num_batches_tracked) == (used is not None)

    # The gradient along a random direction, against central differences of the formula in float64.
    g = np.random.default_rng(seed).standard_normal(expected.shape)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad((y.reshape(-1, channels) * torch.from_numpy(g).to(y)).sum(), leaves)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    slope = sum(float((d.double() * grad.double()).sum()) for d, grad in zip(directions, grads, strict=True))
    names = [name for name, _ in layer.named_parameters()]
    along = dict(zip(names, (_numpy(d) for d in directions[1:]), strict=True))
    dx = _numpy(directions[0][..., 1 : channels + 1] if given is not x else directions[0]).reshape(-1, channels)

    def at(step):
        value, _ = dice_by_formula(
            flat + step * dx, flat_mask, before[0] + step * along["alpha"], *before[1:], eps, training,
            gain + step * along.get("weight", 0.0), shift + step * along.get("bias", 0.0),
        )  # fmt: skip
        return float((value * g).sum())

    numeric = (at(1e-6) - at(-1e-6)) / 2e-6
    assert slope == pytest.approx(numeric, rel=2e-5 if exact else 2e-3, abs=1e-5 if exact else 1e-2)


def test_one_row_in_training_raises_as_batch_norm_does(device):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        din_kernels.Dice(4).to(device)(torch.randn(1, 4, device=device))
