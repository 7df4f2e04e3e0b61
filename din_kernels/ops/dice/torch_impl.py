"""Dice in plain torch: the twin of the Triton kernels on any device, in float64 too.

Everything works on rows x [N, C]. Statistics are moments [3, C]: rows (count, mean, M2) with M2 = Σ(x − mean)², kept in
float32 (float64 for float64) and merged by Chan's formula, never as E[x²] − E[x]²: ε = 1e-8 would drown in its rounding.
Gradients are explicit, so nothing is recorded for autograd.

On a CPU rows are walked in chunks that stay in the cache, because the intermediate steps (there is no fusion here) would
otherwise each go through memory; elsewhere a chunk is everything.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 16  # 256 KiB of float32: input, output and one temporary fit a core's second-level cache


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and sums for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(x: Tensor) -> Iterator[slice]:
    rows, width = x.shape
    step = max(1, _CHUNK_ELEMENTS // width) if x.device.type == "cpu" else max(1, rows)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def merge(parts: Tensor) -> Tensor:
    """Moments of a union from the moments of its parts: [P, 3, C] -> [3, C] (Chan, Golub and LeVeque, 1979).

    Means are taken relative to one of them: their sum would round away what a small variance needs.
    """
    count, mean, m2 = parts.unbind(1)
    total = count.sum(0)
    base = torch.where(count > 0, mean, float("-inf")).amax(0)
    base = torch.where(total > 0, base, 0)
    away = torch.where(count > 0, mean - base, 0)
    shift = (count * away).sum(0) / total.clamp(min=1)
    return torch.stack((total, base + shift, (m2 + count * (away - shift).square()).sum(0)))


@torch.no_grad()
def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """(count, mean, M2) [3, C] of the rows of x [N, C] that ``mask`` [N] selects (None: all); zeros without rows.

    Two passes over each chunk, and what rounding left of the first one's mean corrected by the second.
    """
    wide = wide_dtype(x.dtype)
    parts = []
    for rows in _chunks(x):
        values = x[rows].to(wide)
        if mask is None:
            count = values.new_full((x.shape[1],), values.shape[0])
            mean = values.mean(0)
            centred = values - mean
        else:
            keep = mask[rows, None]
            count = keep.sum(0, dtype=wide).expand(x.shape[1])
            mean = values.masked_fill(~keep, 0).sum(0) / count.clamp(min=1)
            centred = (values - mean).masked_fill_(~keep, 0)
        left = centred.sum(0) / count.clamp(min=1)
        m2 = (centred.square_().sum(0) - count * left.square()).clamp_(min=0)
        parts.append(torch.stack((count, mean + left, m2)))
    if not parts:
        return x.new_zeros((3, x.shape[1]), dtype=wide)
    return parts[0] if len(parts) == 1 else merge(torch.stack(parts))


def _update(buffer: Tensor, value: Tensor, step: Tensor | float) -> None:
    """buffer += step·(value − buffer), computed in ``value``'s precision."""
    buffer.add_(((value - buffer.to(value.dtype)) * step).to(buffer.dtype))


def _normaliser(
    batch: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    step: Tensor | float,
    eps: float,
) -> Tensor:
    """What normalises, [3, C]: mean, 1/√(var + ε), and 1/count where the batch's moments ``batch`` [3, C] serve, else 0.

    The running statistics serve (0 and 1 stand in for None), and stay as they are, where fewer than two rows count; else
    they move by ``step``. Decided without asking the device.
    """
    count, mean, m2 = batch.unbind(0)
    enough = count >= 2
    old_mean = mean.new_zeros(()) if running_mean is None else running_mean.to(mean.dtype)
    old_var = mean.new_ones(()) if running_var is None else running_var.to(mean.dtype)
    inverse = torch.where(enough, 1 / count.clamp(min=1), 0)
    result = torch.stack(
        (torch.where(enough, mean, old_mean), torch.rsqrt(torch.where(enough, m2 * inverse, old_var) + eps), inverse)
    )
    if running_mean is not None and running_var is not None:
        step = enough.to(mean.dtype) * step
        _update(running_mean, mean, step)
        _update(running_var, m2 / (count - 1).clamp(min=1), step)
        if tracked is not None:
            tracked.add_(enough[0].to(tracked.dtype))
    return result


def _apply(x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y = x·(α + (1 − α)·p) with p = σ(x̂·weight + bias), x̂ = (x − mean)·rstd; normaliser [3, C] from ``_normaliser``."""
    wide = wide_dtype(x.dtype)
    mean, rstd, _ = normaliser.to(wide).unbind(0)
    alpha = alpha.to(wide)
    slope = 1 - alpha
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in _chunks(x):
        values = x[rows].to(wide)
        # The output is the workspace where it has the precision for it.
        p = torch.sub(values, mean, out=y[rows]) if y.dtype == wide else values - mean
        p.mul_(rstd)
        if weight is not None:
            assert bias is not None
            torch.addcmul(bias.to(wide), p, weight.to(wide), out=p)
        p.sigmoid_()
        torch.addcmul(alpha, p, slope, out=p).mul_(values)
        if y.dtype != wide:
            y[rows] = p
    return y


def _parts(
    grad: Tensor, x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x̂, p, g·x and dz = g·x·(1 − α)·p·(1 − p) of some rows, where z is the argument of the sigmoid."""
    mean, rstd, _ = normaliser.unbind(0)
    normalised = (x - mean).mul_(rstd)
    z = normalised if weight is None or bias is None else torch.addcmul(bias, normalised, weight)
    p = torch.sigmoid(z)
    product = grad * x
    dz = (p - p * p).mul_(product).mul_(1 - alpha)
    return normalised, p, product, dz


@torch.no_grad()
def sums(
    grad: Tensor, x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Sums over all rows [3, C]: Σ dz, Σ dz·x̂, Σ g·x·(1 − p), which are also the gradients of bias, weight and α."""
    wide = wide_dtype(x.dtype)
    normaliser, alpha, weight, bias = _widen(wide, normaliser, alpha, weight, bias)
    total = torch.zeros((3, x.shape[1]), dtype=wide, device=x.device)
    for rows in _chunks(x):
        normalised, p, product, dz = _parts(grad[rows].to(wide), x[rows].to(wide), normaliser, alpha, weight, bias)
        total[0] += dz.sum(0)
        total[1] += dz.mul_(normalised).sum(0)
        total[2] += p.neg_().add_(1).mul_(product).sum(0)
    return total


def _gradient(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    normaliser: Tensor,
    total: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """dx = g·(p + α(1 − p)) + rstd·w·(dz − [row counts]·(Σ dz + x̂·Σ dz·x̂)/count)."""
    wide = wide_dtype(x.dtype)
    normaliser, alpha, weight, bias = _widen(wide, normaliser, alpha, weight, bias)
    _, rstd, inverse = normaliser.unbind(0)
    scale = rstd if weight is None else rstd * weight
    first, second = total[0] * inverse, total[1] * inverse
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in _chunks(x):
        g = grad[rows].to(wide)
        normalised, p, _, dz = _parts(g, x[rows].to(wide), normaliser, alpha, weight, bias)
        through = torch.addcmul(first, normalised, second, out=normalised)
        if mask is not None:
            through = through.masked_fill_(~mask[rows, None], 0)
        through = dz.sub_(through).mul_(scale)
        dx[rows] = torch.addcmul(alpha, p, 1 - alpha, out=p).mul_(g).add_(through)
    return dx


def _widen(
    wide: torch.dtype, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return (
        normaliser.to(wide),
        alpha.to(wide),
        None if weight is None else weight.to(wide),
        None if bias is None else bias.to(wide),
    )


@torch.no_grad()
def forward(
    x: Tensor, mask: Tensor | None, gathered: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None, step: Tensor | float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Training: (y [N, C], normaliser [3, C]); running statistics are updated in place.

    gathered  moments [W, 3, C] of all processes, to be used instead of those of x; or None
    step      weight of this batch in the running statistics
    """
    batch = moments(x, mask) if gathered is None else merge(gathered)
    normaliser = _normaliser(batch, running_mean, running_var, tracked, step, eps)
    return _apply(x, normaliser, alpha, weight, bias), normaliser


@torch.no_grad()
def evaluate(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Evaluation with running statistics ``mean``, ``var`` [C]: (y [N, C], normaliser [3, C])."""
    wide = wide_dtype(x.dtype)
    mean, var = mean.to(wide), var.to(wide)
    normaliser = torch.stack((mean, torch.rsqrt(var + eps), torch.zeros_like(mean)))
    return _apply(x, normaliser, alpha, weight, bias), normaliser


@torch.no_grad()
def backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, normaliser: Tensor, gathered: Tensor | None, alpha: Tensor,
    weight: Tensor | None, bias: Tensor | None, training: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx [N, C], sums [3, C] as from ``sums``).

    gathered  sums [W, 3, C] of all processes, to be used instead of those of x; or None
    training  whether gradients may go through the batch's statistics
    """
    total = sums(grad, x, normaliser, alpha, weight, bias) if gathered is None else gathered.sum(0)
    return _gradient(grad, x, mask, normaliser, total, alpha, weight, bias), total
