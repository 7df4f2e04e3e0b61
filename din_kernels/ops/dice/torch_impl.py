"""Dice in plain torch: the twin of the Triton kernels on any device, in float64 too.

Everything works on rows x [N, C]. Statistics are moments [3, C]: rows (count, mean, M2) with M2 = Σ(x − mean)², kept in
float32 (float64 for float64) and merged by Chan's formula, never as E[x²] − E[x]²: ε = 1e-8 would drown in its rounding.
Gradients are explicit: everything here runs where autograd records nothing.

On a CPU rows are walked in chunks that stay in the cache, because the intermediate steps (there is no fusion here) would
otherwise each go through memory; elsewhere a chunk is everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 18  # 1 MiB of float32: smaller chunks spend their time in the interpreter, larger ones in memory


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and sums for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(*tensors: Tensor | None) -> Iterator[Any]:
    """Matching chunks of rows of ``tensors`` (the first is never None)."""
    first = tensors[0]
    assert first is not None
    rows, width = first.shape
    if first.device.type != "cpu" or rows * width <= _CHUNK_ELEMENTS:
        yield tensors
        return
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield tuple(None if t is None else t[start : start + step] for t in tensors)


# ---- statistics -----------------------------------------------------------------------------------------------------


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


def _chunk_moments(values: Tensor, keep: Tensor | None) -> tuple[Tensor | float, Tensor, Tensor]:
    """(count, mean, M2) of one chunk: two passes, and what rounding left of the first one's mean corrected by the second."""
    if keep is None:
        count: Tensor | float = float(values.shape[0])
        at_least_one: Tensor | float = max(count, 1.0)
        mean = values.sum(0).div_(at_least_one)
        centred = values - mean
    else:
        keep = keep[:, None]
        count = keep.sum(0, dtype=values.dtype)
        at_least_one = count.clamp(min=1)
        mean = values.masked_fill(~keep, 0).sum(0).div_(at_least_one)
        centred = (values - mean).masked_fill_(~keep, 0)
    left = centred.sum(0).div_(at_least_one)
    m2 = centred.square_().sum(0).sub_(left.square().mul_(count)).clamp_(min=0)
    return count, mean.add_(left), m2


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor | float, Tensor, Tensor]:
    """(count, mean, M2) of the rows that count; the count is a number where the host knows it."""
    wide = wide_dtype(x.dtype)
    found = [_chunk_moments(values.to(wide), keep) for values, keep in _chunks(x, mask)]
    if len(found) == 1:
        return found[0]
    count, mean, m2 = merge(torch.stack([_stack(*part) for part in found])).unbind(0)
    return (count if mask is not None else float(x.shape[0])), mean, m2


def _stack(count: Tensor | float, mean: Tensor, last: Tensor) -> Tensor:
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


def _running_normaliser(mean: Tensor, var: Tensor, eps: float, wide: torch.dtype) -> Normaliser:
    return Normaliser(mean.to(wide), var.to(wide).add(eps).rsqrt_(), 0.0)


def _update(buffer: Tensor, value: Tensor, step: Tensor | float) -> None:
    """buffer += step·(value − buffer), computed in ``value``'s precision."""
    if buffer.dtype == value.dtype:
        buffer.lerp_(value, step)
    else:
        buffer.add_(((value - buffer.to(value.dtype)) * step).to(buffer.dtype))


def _batch_normaliser(
    count: Tensor | float, mean: Tensor, m2: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    tracked: Tensor | None,
    step: Tensor | float, eps: float,
) -> Normaliser:  # fmt: skip
    """The batch's moments normalise, and move the running statistics by ``step``; with fewer than two rows that count the
    running statistics (0 and 1 stand in for None) normalise, and stay as they are."""
    if not isinstance(count, Tensor) and count >= 2:
        if running_mean is not None and running_var is not None:
            _update(running_mean, mean, step)
            _update(running_var, m2 / (count - 1), step)
            if tracked is not None:
                tracked.add_(1)
        return Normaliser(mean, (m2 / count).add_(eps).rsqrt_(), 1 / count)
    old_mean = torch.zeros_like(mean) if running_mean is None else running_mean.to(mean.dtype, copy=True)
    old_var = torch.ones_like(mean) if running_var is None else running_var.to(mean.dtype, copy=True)
    if not isinstance(count, Tensor):
        return _running_normaliser(old_mean, old_var, eps, mean.dtype)
    enough = count >= 2  # decided on the device
    inverse = torch.where(enough, 1 / count.clamp(min=1), 0).expand_as(mean)
    if running_mean is not None and running_var is not None:
        step = enough.to(mean.dtype) * step
        _update(running_mean, mean, step)
        _update(running_var, m2 / (count - 1).clamp(min=1), step)
        if tracked is not None:
            tracked.add_(enough.reshape(-1)[0].to(tracked.dtype))
    var = torch.where(enough, m2 * inverse, old_var)
    return Normaliser(torch.where(enough, mean, old_mean), var.add_(eps).rsqrt_(), inverse)


# ---- forward and backward of rows -----------------------------------------------------------------------------------


def _apply(
    x: Tensor,
    normaliser: Normaliser,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    in_place: bool = False,
) -> Tensor:
    """y = p·x + (1 − p)·α·x with p = σ(x̂·weight + bias), x̂ = (x − mean)·rstd; in the memory of x if ``in_place``."""
    wide = wide_dtype(x.dtype)
    mean, rstd, _ = normaliser
    alpha = alpha.to(wide)
    slope = alpha.neg().add_(1)
    rate = rstd if weight is None else rstd * weight
    y = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for values, target in _chunks(x, y):
        values = values.to(wide)
        # The output is the workspace where it has the precision for it and is not the input.
        p = values - mean if in_place or y.dtype != wide else torch.sub(values, mean, out=target)
        p.mul_(rate)
        if bias is not None:
            p.add_(bias)
        gate = torch.addcmul(alpha, p.sigmoid_(), slope, out=p)
        if y.dtype == wide:
            torch.mul(values, gate, out=target)
        else:
            target.copy_(gate.mul_(values))
    return y


class _Pieces(NamedTuple):
    """Of a chunk: x − mean, p, g·x, and t = g·x·p·(1 − p)."""

    centred: Tensor
    p: Tensor
    product: Tensor
    t: Tensor


class _Backward:
    """The two halves of the backward pass, which share what is constant along rows."""

    def __init__(
        self, wide: torch.dtype, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
    ):
        self.wide = wide
        self.mean, self.rstd, self.inverse = normaliser.to(wide).unbind(0)
        self.alpha = alpha.to(wide)
        self.slope = self.alpha.neg().add_(1)
        self.scale = self.rstd if weight is None else self.rstd * weight.to(wide)
        self.offset = None if bias is None else bias.to(wide)

    def pieces(self, g: Tensor, values: Tensor) -> _Pieces:
        centred = values - self.mean
        p = centred * self.scale
        if self.offset is not None:
            p.add_(self.offset)
        p.sigmoid_()
        product = g * values
        return _Pieces(centred, p, product, torch.ops.aten.sigmoid_backward(product, p))

    def sums(self, pieces: _Pieces, all_three: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Σ t, Σ t·(x − mean), Σ g·x·(1 − p) over the chunk; the first two 0 if not ``all_three``."""
        centred, p, product, t = pieces
        closed = torch.addcmul(product, product, p, value=-1).sum(0)
        if not all_three:
            return torch.zeros_like(closed), torch.zeros_like(closed), closed
        return t.sum(0), (t * centred).sum(0), closed

    def finished(self, sums: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """[3, C]: Σ dz, Σ dz·x̂, Σ g·x·(1 − p) from those of all chunks, dz = (1 − α)·t."""
        direct, slanted, closed = (
            sums[0] if len(sums) == 1 else (torch.stack(some).sum(0) for some in zip(*sums, strict=True))
        )
        return torch.stack((direct * self.slope, (slanted * self.rstd).mul_(self.slope), closed))

    def gradient(self, g: Tensor, pieces: _Pieces, keep: Tensor | None, total: Tensor | None, target: Tensor) -> None:
        """dx = g·(α + (1 − α)·p) + rstd·w·(dz − [row counts]·(Σ dz + x̂·Σ dz·x̂)/count), from ``total`` as ``finished``
        gives it; without the last term where it is None."""
        centred, p, _, t = pieces
        result = t.mul_(self.slope * self.scale)
        if total is not None:
            share = self.scale * self.inverse
            through = torch.addcmul(share * total[0], centred, share * total[1] * self.rstd, out=centred)
            result.sub_(through if keep is None else through.masked_fill_(~keep[:, None], 0))
        gate = torch.addcmul(self.alpha, p, self.slope, out=p)
        if target.dtype == self.wide:
            torch.addcmul(result, gate, g, out=target)
        else:
            target.copy_(result.addcmul_(gate, g))


# ---- what the operators call ----------------------------------------------------------------------------------------


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """(count, mean, M2) [3, C] of the rows of x [N, C] that ``mask`` [N] selects (None: all); zeros without rows."""
    return _stack(*_moments(x, mask))


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x.to(wide_dtype(x.dtype)) + shift


def forward(
    x: Tensor, shift: Tensor | None, mask: Tensor | None, gathered: Tensor | None, alpha: Tensor, weight: Tensor | None,
    bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None,
    step: Tensor | float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Training: (y [N, C], normaliser [3, C]); running statistics are updated in place.

    shift     [C], added to x; the mean in ``normaliser`` is that of x without it; or None
    gathered  moments [W, 3, C] of all processes, to be used instead of those of x; or None, as with a shift
    step      weight of this batch in the running statistics
    """
    z = _shifted(x, shift)
    count, mean, m2 = _moments(z, mask) if gathered is None else merge(gathered).unbind(0)
    normaliser = _batch_normaliser(count, mean, m2, running_mean, running_var, tracked, step, eps)
    return _apply(z, normaliser, alpha, weight, bias).to(x.dtype), _packed(normaliser, shift)


def _packed(normaliser: Normaliser, shift: Tensor | None) -> Tensor:
    packed = normaliser.packed()
    if shift is not None:
        packed[0] -= shift
    return packed


def inference(
    x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """y [N, C] of ``evaluate`` alone; in the memory of x if ``in_place``."""
    normaliser = _running_normaliser(mean, var, eps, wide_dtype(x.dtype))
    if shift is not None:
        x = x.add_(shift) if in_place else (x + shift).to(x.dtype)
    return _apply(x, normaliser, alpha, weight, bias, in_place=in_place or shift is not None)


def evaluate(
    x: Tensor,
    shift: Tensor | None,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Evaluation with running statistics ``mean``, ``var`` [C]: (y [N, C], normaliser [3, C])."""
    normaliser = _running_normaliser(mean, var, eps, wide_dtype(x.dtype))
    return _apply(_shifted(x, shift), normaliser, alpha, weight, bias).to(x.dtype), _packed(normaliser, shift)


def sums(
    grad: Tensor, x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Sums over all rows [3, C]: Σ dz, Σ dz·x̂, Σ g·x·(1 − p), which are also the gradients of bias, weight and α.

    dz = g·x·(1 − α)·p·(1 − p), the gradient of the sigmoid's argument.
    """
    half = _Backward(wide_dtype(x.dtype), normaliser, alpha, weight, bias)
    return half.finished(
        [half.sums(half.pieces(g.to(half.wide), values.to(half.wide))) for g, values in _chunks(grad, x)]
    )


def backward(
    grad: Tensor, x: Tensor, shift: Tensor | None, mask: Tensor | None, normaliser: Tensor, gathered: Tensor | None,
    alpha: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx [N, C], sums [3, C] as from ``sums``; a fourth row, Σ dx, with a shift).

    gathered  sums [W, 3, C] of all processes, to be used instead of those of x; or None
    training  whether gradients go through the batch's statistics (where 1/count is not 0)
    """
    if shift is not None:
        wide = torch.cat((normaliser[:1] + shift, normaliser[1:]))
        z = _shifted(x, shift)
        dx, total = backward(grad, z, None, mask, wide, gathered, alpha, weight, bias, training)
        return dx.to(x.dtype), torch.cat((total, dx.sum(0, keepdim=True)))
    half = _Backward(wide_dtype(x.dtype), normaliser, alpha, weight, bias)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chunks = [(g.to(half.wide), values, keep, target) for g, values, keep, target in _chunks(grad, x, mask, dx)]
    if not training:  # one pass does it
        found = []
        for g, values, _, target in chunks:
            pieces = half.pieces(g, values.to(half.wide))
            found.append(half.sums(pieces, all_three=weight is not None))
            half.gradient(g, pieces, None, None, target)
        return dx, half.finished(found)
    kept = None
    if gathered is None:
        found = []
        for g, values, _, _ in chunks:
            kept = half.pieces(g, values.to(half.wide))
            found.append(half.sums(kept))
        total = half.finished(found)
    else:
        total = gathered.sum(0)
    for g, values, keep, target in chunks:
        # With one chunk the pieces are still there; of several they would not fit the cache and are made again.
        pieces = kept if kept is not None and len(chunks) == 1 else half.pieces(g, values.to(half.wide))
        half.gradient(g, pieces, keep, total, target)
    return dx, total
