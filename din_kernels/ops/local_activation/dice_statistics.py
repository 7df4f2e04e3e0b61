"""Dice's statistics inside the unit: from moments to what normalises, and the running averages.

A few lines of torch, and launches of ``kernels_statistics.py``, which on a GPU take the place of thirty small operations per
layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._launch import launch, on_device

BLOCK_P, BLOCK_H = 32, 16


class Moments(NamedTuple):
    """rows [] float64: how many there were; mean [H], m2 [H] = Σ (z − mean)²."""

    rows: Tensor
    mean: Tensor
    m2: Tensor


class Used(NamedTuple):
    """Moments of a batch, and what Dice makes of them in training: used_mean [H] and rstd [H] normalise, the running ones
    where fewer than two rows were seen; inverse [] is 1/rows, or 0 there."""

    rows: Tensor
    mean: Tensor
    m2: Tensor
    used_mean: Tensor
    rstd: Tensor
    inverse: Tensor


def used(moments: Moments, running_mean: Tensor, running_var: Tensor, eps: float) -> Used:
    rows, mean, m2 = moments
    enough, wide = rows >= 2, m2.dtype
    inverse = torch.where(enough, 1 / rows.clamp(min=1), 0).to(wide)
    used_mean = torch.where(enough, mean, running_mean.to(wide))
    var = torch.where(enough, m2 / rows.clamp(min=1).to(wide), running_var.to(wide))
    return Used(rows, mean, m2, used_mean, torch.rsqrt(var + eps), inverse)


def _launch_finish(
    counts: Tensor, means: Tensor, m2s: Tensor, found: Used, running: tuple[Tensor, Tensor] | None, eps: float
) -> None:
    from . import kernels_statistics as kernels

    width, (running_mean, running_var) = means.shape[1], running or (means, means)
    operands = {
        "counts": counts, "means": means, "m2s": m2s, "running_mean": running_mean, "running_var": running_var,
        "count": found.rows, "mean": found.mean, "m2": found.m2, "used_mean": found.used_mean, "used_rstd": found.rstd,
        "inverse": found.inverse, "num_parts": counts.shape[0], "eps": eps,
        "H": width, "BLOCK_H": BLOCK_H, "BLOCK_P": BLOCK_P, "NORMALISE": running is not None,
    }  # fmt: skip
    with on_device(means):
        launch(kernels.finish_moments, (-(-width // BLOCK_H),), operands, num_warps=4)


def _empty(like: Tensor) -> Moments:
    width, device = like.shape[1], like.device
    return Moments(
        torch.empty((), dtype=torch.float64, device=device), torch.empty(width, dtype=torch.float32, device=device),
        torch.empty(width, dtype=torch.float32, device=device),
    )  # fmt: skip


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> Moments:
    """Moments of all rows from those of P programs, counts [P] int64, means and m2s [P, H] fp32 (Triton)."""
    moments = _empty(means)
    _launch_finish(counts, means, m2s, Used(*moments, *moments), None, 0.0)
    return moments


def finish(counts: Tensor, means: Tensor, m2s: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Used:
    """``used(merge(...), ...)`` in one launch."""
    rows, mean, m2 = _empty(means)
    found = Used(
        rows,
        mean,
        m2,
        torch.empty_like(mean),
        torch.empty_like(mean),
        torch.empty((), dtype=torch.float32, device=mean.device),
    )
    _launch_finish(counts, means, m2s, found, (running_mean.contiguous(), running_var.contiguous()), eps)
    return found


@torch.no_grad()
def update_running(
    moments: Moments, running_mean: Tensor, running_var: Tensor, tracked: Tensor | None, momentum: float | None
) -> None:
    """One BatchNorm-style update in place, on the device; none when fewer than two rows were counted. ``momentum`` None: the
    average over all batches, counted by ``tracked`` []."""
    rows, mean, m2 = moments
    enough = rows >= 2
    if tracked is not None:
        tracked.add_(enough.to(tracked.dtype))
    if momentum is None:
        assert tracked is not None
        step = 1.0 / tracked.clamp(min=1).to(mean.dtype)
    else:
        step = torch.full((), momentum, dtype=mean.dtype, device=mean.device)
    step = torch.where(enough, step, torch.zeros_like(step))
    unbiased = m2 / (rows - 1).clamp(min=1).to(m2.dtype)
    for buffer, value in ((running_mean, mean), (running_var, unbiased)):
        buffer.add_(((value - buffer.to(value.dtype)) * step).to(buffer.dtype))


def launch_update_running(
    moments: Moments, running_mean: Tensor, running_var: Tensor, tracked: Tensor | None, momentum: float | None
) -> None:
    """``update_running`` in one launch (Triton)."""
    from . import kernels_statistics as kernels

    width = moments.mean.shape[0]
    operands = {
        "count": moments.rows, "mean": moments.mean, "m2": moments.m2,
        "running_mean": running_mean, "running_var": running_var,
        "tracked": moments.rows if tracked is None else tracked, "momentum": momentum or 0.0,
        "H": width, "BLOCK_H": max(16, 1 << (width - 1).bit_length()), "TRACKED": tracked is not None,
        "CUMULATIVE": momentum is None,
    }  # fmt: skip
    with on_device(moments.mean):
        launch(kernels.update_running, (1,), operands, num_warps=4)
    # Autograd must notice a graph that was recorded with the old values and is used after this.
    torch.autograd.graph.increment_version([t for t in (running_mean, running_var, tracked) if t is not None])
