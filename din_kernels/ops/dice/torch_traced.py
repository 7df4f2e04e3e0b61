"""Dice for ``torch.compile`` where no kernel of ours serves: operations of torch, which its compiler fuses and differentiates.

An operator of ours would be opaque to it, and its own loops over a CPU are faster than torch's operations one by one. With
a = x − x[0], a constant as far as gradients go,

    mean = E[a],  var = Var[a],  p = σ((a − mean)/√(var + ε)),  y = x·(α + (1 − α)·p)

so that nothing is lost where the deviations are small beside the mean, whatever the order in which the compiler adds up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_statistics import update, wide_dtype


def _update(running: Any, mean: Tensor, unbiased_var: Tensor, enough: Tensor | None) -> None:
    """The running statistics move towards the batch's, unless too few rows count (``enough`` [] bool, None: they do)."""
    if running.mean is None or running.var is None:
        return
    counted: Tensor | int = 1 if enough is None else enough.to(torch.int64)
    step = running.momentum
    if step is None:
        step = 1.0 / (running.tracked + 1).to(mean.dtype)
    if enough is not None:
        step = step * enough.to(mean.dtype)
    update(running.mean, mean, step)
    update(running.var, unbiased_var, step)
    if running.tracked is not None:
        running.tracked.add_(counted)


def _of_all(x: Tensor, running: Any) -> tuple[Tensor, Tensor]:
    """(x − mean [N, C], variance [C]) of all rows."""
    rows = x.shape[0]
    first = x[0].detach()
    away = x - first
    var, mean = torch.var_mean(away, 0, correction=0)
    with torch.no_grad():
        _update(running, first + mean, var * (rows / (rows - 1)), None)
    return away - mean, var


def _of_some(x: Tensor, mask: Tensor, running: Any) -> tuple[Tensor, Tensor]:
    """(x − mean [N, C], variance [C]) of the rows that count; with fewer than two, running statistics, or 0 and 1."""
    keep = mask[:, None]
    count = keep.sum(0, dtype=x.dtype)
    at_least_one = count.clamp(min=1)
    first = x.detach().index_select(0, mask.to(torch.int64).argmax(0, keepdim=True))[0]
    away = torch.where(keep, x - first, 0.0)
    mean = away.sum(0) / at_least_one
    var = torch.where(keep, away - mean, 0.0).square().sum(0) / at_least_one
    enough = count[0] >= 2
    old_mean = torch.zeros_like(mean) if running.mean is None else running.mean.to(x.dtype, copy=True)
    old_var = torch.ones_like(mean) if running.var is None else running.var.to(x.dtype, copy=True)
    with torch.no_grad():
        unbiased = torch.where(enough, var * (count / (count - 1).clamp(min=1)), old_var)
        _update(running, torch.where(enough, first + mean, old_mean), unbiased, enough)
    return x - torch.where(enough, first + mean, old_mean), torch.where(enough, var, old_var)


def dice(
    x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    running: Any, training: bool,
) -> Tensor:  # fmt: skip
    """y [N, C]; ``running`` is a ``function.Running``, whose statistics are updated in place in training."""
    values = x.to(wide_dtype(x.dtype))
    if shift is not None:
        values = values + shift
    if not training:
        centred, var = values - running.mean, running.var.to(values.dtype)
    elif x.shape[0] == 0:  # nothing to normalise, and nothing to learn from
        centred, var = values, values.new_ones(x.shape[1])
    else:
        centred, var = _of_all(values, running) if mask is None else _of_some(values, mask, running)
    z = centred * torch.rsqrt(var + running.eps)
    if weight is not None and bias is not None:
        z = z * weight + bias
    alpha = alpha.to(values.dtype)
    return (values * (alpha + (1 - alpha) * torch.sigmoid(z))).to(x.dtype)
