"""Dice in plain torch: chunks of rows, their statistics, and what normalises; ``torch_impl.py`` says how and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20  # 4 MiB of float32: smaller chunks spend their time in the interpreter, larger ones in memory
_TINY = 1 << 10  # elements below which Welford's slow but exact recurrence is one call and done

# Batch normalisation's own sums serve from so many channels and elements (before, calls cost more than they save), in chunks
# of so many rows.
_NATIVE_WIDTH, _NATIVE_ELEMENTS, _NATIVE_ROWS = 32, 1 << 18, 1 << 12


# On the CPU, whatever the default device is.
ONE = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and sums for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(x: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])


def chunks(step: int, *tensors: Tensor | None) -> Iterator[Any]:
    """Matching chunks of ``step`` rows of ``tensors`` (the first is never None)."""
    first = tensors[0]
    assert first is not None
    rows = first.shape[0]
    if rows <= step:
        yield tensors
        return
    for start in range(0, rows, step):
        yield tuple(None if t is None else t[start : start + step] for t in tensors)


def merge(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, M2) of a union from those of its P parts, [P, C] or [P, 1] each (Chan, Golub and LeVeque, 1979).

    Means are taken relative to one of them: their sum would round away what a small variance needs.
    """
    total = count.sum(0)
    base = torch.where(total > 0, torch.where(count > 0, mean, float("-inf")).amax(0), 0)
    away = torch.where(count > 0, mean - base, 0)
    shift = (count * away).sum(0) / total.clamp(min=1)
    return total, base + shift, (m2 + count * (away - shift).square()).sum(0)


def _native_moments(x: Tensor) -> tuple[float, Tensor, Tensor]:
    """(count, mean, M2) of all rows, at least one, by torch's batch normalisation: one call, and a pass less than by hand. It
    sums in float32 one row after the other, so it is handed few rows, and their differences from a mean of some: what is left
    of the mean then loses no more than rounding, in the sums and when the chunks are merged."""
    rows, wide = x.shape[0], wide_dtype(x.dtype)
    step = min(rows, rows_per_chunk(x), _NATIVE_ROWS)
    every = max(1, rows // 32)
    near = x[every // 2 :: every].to(wide).mean(0)
    work = torch.empty((step, x.shape[1]), dtype=wide, device=x.device)
    counts, means, variances = [], [], []
    for (values,) in chunks(step, x):
        away = torch.sub(values.to(wide), near, out=work[: values.shape[0]])
        mean, var = torch.batch_norm_update_stats(away, None, None, 0.0)
        counts.append(float(values.shape[0]))
        means.append(mean)
        variances.append(var)
    if len(counts) == 1:
        return counts[0], means[0].add_(near), variances[0].mul_(rows)
    count = work.new_tensor(counts)[:, None]
    _, mean, m2 = merge(count, torch.stack(means), torch.stack(variances).mul_(count))
    return float(rows), mean.add_(near), m2


def _chunk_moments(values: Tensor, keep: Tensor | None, work: Tensor | None) -> tuple[Tensor | float, Tensor, Tensor]:
    """(count, mean, M2) of one chunk: two passes, and what rounding left of the first one's mean corrected by the second."""
    if keep is None:
        rows = values.shape[0]
        if rows * values.shape[1] <= _TINY and values.device.type == "cpu" and rows:
            var, mean = torch.var_mean(values, 0, correction=0)
            return float(rows), mean, var.mul_(rows)
        count: Tensor | float = float(rows)
        at_least_one: Tensor | float = max(count, 1.0)
        mean = values.sum(0).div_(at_least_one)
        centred = torch.sub(values, mean, out=work)
    else:
        keep = keep[:, None]
        count = keep.sum(0, dtype=values.dtype)
        at_least_one = count.clamp(min=1)
        mean = values.masked_fill(~keep, 0).sum(0).div_(at_least_one)
        centred = torch.sub(values, mean, out=work).masked_fill_(~keep, 0)
    left = centred.sum(0).div_(at_least_one)
    m2 = centred.square_().sum(0).sub_(left.square().mul_(count)).clamp_(min=0)
    return count, mean.add_(left), m2


def moments_of(x: Tensor, mask: Tensor | None) -> tuple[Tensor | float, Tensor, Tensor]:
    """(count, mean, M2) of the rows that count; the count is a number where the host knows it."""
    wide, step = wide_dtype(x.dtype), rows_per_chunk(x)
    if mask is None and x.is_cpu and x.shape[1] >= _NATIVE_WIDTH and x.numel() >= _NATIVE_ELEMENTS:
        return _native_moments(x)
    if x.shape[0] <= step:
        if (
            mask is not None and x.device.type == "cpu"
        ):  # the host may know how many count, which saves most of the calls
            x, mask = x[mask], None
        return _chunk_moments(x.to(wide), mask, None)
    work = torch.empty((step, x.shape[1]), dtype=wide, device=x.device)
    parts = []
    for values, keep in chunks(step, x, mask):
        parts.append(_chunk_moments(values.to(wide), keep, work[: values.shape[0]]))
    counts, means, m2s = zip(*parts, strict=True)
    count = work.new_tensor(counts)[:, None] if mask is None else torch.stack(counts)
    total, mean, m2 = merge(count, torch.stack(means), torch.stack(m2s))
    return (float(x.shape[0]) if mask is None else total), mean, m2


def stack(count: Tensor | float, mean: Tensor, last: Tensor) -> Tensor:
    first = count.expand_as(mean) if isinstance(count, Tensor) else torch.full_like(mean, count)
    return torch.stack((first, mean, last))


class Normaliser(NamedTuple):
    """mean and 1/√(var + ε) [C]; 1/count ([C] or a number), 0 where running statistics serve."""

    mean: Tensor
    rstd: Tensor
    inverse: Tensor | float

    def packed(self) -> Tensor:
        """[3, C], as the backward pass takes it."""
        inverse = self.inverse
        third = inverse if isinstance(inverse, Tensor) else torch.full_like(self.mean, inverse)
        return torch.stack((self.mean, self.rstd, third))


def running_normaliser(mean: Tensor, var: Tensor, eps: float, wide: torch.dtype) -> Normaliser:
    if mean.dtype != wide or var.dtype != wide:
        mean, var = mean.to(wide), var.to(wide)
    return Normaliser(mean, (var + eps).rsqrt_(), 0.0)


def update(buffer: Tensor, value: Tensor, step: Tensor | float) -> None:
    """buffer += step·(value − buffer), computed in ``value``'s precision."""
    if buffer.dtype == value.dtype:
        buffer.lerp_(value, step)
    else:
        buffer.add_(((value - buffer.to(value.dtype)) * step).to(buffer.dtype))


def batch_normaliser(
    count: Tensor | float, mean: Tensor, m2: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    tracked: Tensor | None,
    step: Tensor | float, eps: float,
) -> Normaliser:  # fmt: skip
    """The batch's moments normalise, and move the running statistics by ``step``; with fewer than two rows that count the
    running statistics (0 and 1 stand in for None) normalise, and stay as they are."""
    if not isinstance(count, Tensor) and count >= 2:
        if running_mean is not None and running_var is not None:
            update(running_mean, mean, step)
            update(running_var, m2 / (count - 1), step)
            if tracked is not None:
                tracked.add_(1)
        return Normaliser(mean, (m2 / count).add_(eps).rsqrt_(), 1 / count)
    old_mean = torch.zeros_like(mean) if running_mean is None else running_mean.to(mean.dtype, copy=True)
    old_var = torch.ones_like(mean) if running_var is None else running_var.to(mean.dtype, copy=True)
    if not isinstance(count, Tensor):
        return running_normaliser(old_mean, old_var, eps, mean.dtype)
    enough = count >= 2  # decided on the device
    inverse = torch.where(enough, 1 / count.clamp(min=1), 0).expand_as(mean)
    if running_mean is not None and running_var is not None:
        step = enough.to(mean.dtype) * step
        update(running_mean, mean, step)
        update(running_var, m2 / (count - 1).clamp(min=1), step)
        if tracked is not None:
            tracked.add_(enough.reshape(-1)[0].to(tracked.dtype))
    var = torch.where(enough, m2 * inverse, old_var)
    return Normaliser(torch.where(enough, mean, old_mean), var.add_(eps).rsqrt_(), inverse)
