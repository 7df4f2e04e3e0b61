"""Dice in plain torch: the twin of the Triton kernels on any device, in float64 too.

Everything works on rows x [N, C]. Statistics are moments [3, C]: rows (count, mean, M2) with M2 = Σ(x − mean)², kept in
float32 (float64 for float64) and merged by Chan's formula, never as E[x²] − E[x]²: ε = 1e-8 would drown in its rounding.
Gradients are explicit: everything here runs where autograd records nothing.

On a CPU rows are walked in chunks that stay in the cache, because the intermediate steps (there is no fusion here) would
otherwise each go through memory; elsewhere a chunk is everything. Steps write into the same few buffers from chunk to
chunk: fresh ones come page by page from the operating system, which costs as much as the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_small
from .torch_statistics import (
    ONE,
    Normaliser,
    batch_normaliser,
    chunks,
    merge,
    moments_of,
    rows_per_chunk,
    running_normaliser,
    stack,
    wide_dtype,
)

_SMALL = 1 << 17  # elements below which a pass costs less than finding out whether it is needed


# ---- forward and backward of rows -----------------------------------------------------------------------------------


def _one(like: Tensor) -> Tensor:
    return ONE[like.dtype] if like.device.type == "cpu" else like.new_ones(())


class _Gate:
    """p = σ(x̂·weight + bias) with x̂ = (x − mean)·rstd, and the gate α + (1 − α)·p that x goes through.

    Where no mean is more than 16 deviations (of x̂·weight), x̂·weight + bias is one pass, x·rate + level; beyond, its
    cancellation would show in float32, and the mean is subtracted first. ``base`` is what is subtracted, None or the mean;
    ``rest`` what then is left of the mean, [C] or None.
    """

    def __init__(
        self, x: Tensor, mean: Tensor, rstd: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        self.wide = wide_dtype(x.dtype)
        self.alpha = (alpha if alpha.dtype == self.wide else alpha.to(self.wide)).contiguous()
        self.rate = rstd if weight is None else rstd * weight.to(self.wide)
        self.base: Tensor | None = mean
        self.rest: Tensor | None = None
        self.level = None if bias is None else bias.to(self.wide)
        if x.device.type == "cpu" and x.numel() > _SMALL:
            away = mean * self.rate
            if not bool((away.abs() > 16).any()):
                self.base, self.rest = None, mean
                self.level = away.neg_() if self.level is None else self.level - away

    def centred(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """x − base."""
        return values if self.base is None else torch.sub(values, self.base, out=out)

    def open(self, centred: Tensor, out: Tensor | None = None) -> Tensor:
        """p, from what ``centred`` gave, which may be ``out``."""
        if self.base is None:
            assert self.level is not None
            return torch.addcmul(self.level, centred, self.rate, out=out).sigmoid_()
        p = torch.mul(centred, self.rate, out=out)
        return (p if self.level is None else p.add_(self.level)).sigmoid_()

    def gate(self, p: Tensor) -> Tensor:
        """α + (1 − α)·p, in the memory of p."""
        return torch.lerp(self.alpha, _one(self.alpha), p, out=p)


def _apply(x: Tensor, gate: _Gate, *, in_place: bool = False) -> Tensor:
    """y = x·(α + (1 − α)·p) in the dtype of x; in the memory of x if ``in_place``."""
    wide, step = gate.wide, rows_per_chunk(x)
    if x.dtype == wide and x.shape[0] <= step and x.is_contiguous():
        opened = gate.gate(gate.open(gate.centred(x)))
        return torch.mul(x, opened, out=x) if in_place else opened.mul_(x)
    y = x if in_place else x.new_empty(x.shape)
    direct = y.dtype == wide and not in_place  # then the output is the workspace
    work = y if direct else torch.empty((min(step, x.shape[0]), x.shape[1]), dtype=wide, device=x.device)
    for values, target in chunks(step, x, y):
        p = target if direct else work[: values.shape[0]]
        values = values.to(wide)
        opened = gate.gate(gate.open(gate.centred(values, p), p))
        if target.dtype == wide:
            torch.mul(values, opened, out=target)
        else:
            target.copy_(opened.mul_(values))
    return y


class _Sums:
    """Sums over the rows of all chunks: Σ g·x·(1 − p), and unless nobody needs them Σ t and Σ t·(x − base), with
    t = g·x·p·(1 − p)."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, ...]] = []

    def finished(self, gate: _Gate, rstd: Tensor) -> Tensor:
        """[3, C]: Σ dz, Σ dz·x̂ (0 where not needed), Σ g·x·(1 − p), dz = (1 − α)·t."""
        found = self.found[0]
        if len(self.found) > 1:
            found = tuple(torch.stack(some).sum(0) for some in zip(*self.found, strict=True))
        if len(found) == 1:
            zero = torch.zeros_like(found[0])
            return torch.stack((zero, zero, found[0]))
        closed, direct, slanted = found
        slope = torch.rsub(gate.alpha, 1)
        if gate.rest is not None:
            slanted = torch.addcmul(slanted, gate.rest, direct, value=-1)
        return torch.stack((direct * slope, slanted.mul(rstd).mul_(slope), closed))


def _walk(grad: Tensor, x: Tensor, gate: _Gate, dx: Tensor | None, *, of_statistics: bool) -> _Sums:
    """One walk over all rows: their sums (all three with ``of_statistics``), and into ``dx``
    (if given) what g contributes directly, g·(α + (1 − α)·p) + rate·dz."""
    step = rows_per_chunk(x)
    work = None
    if x.shape[0] > step:
        work = torch.empty((3, step, x.shape[1]), dtype=gate.wide, device=x.device)
    inner, sums = torch.rsub(gate.alpha, 1).mul_(gate.rate), _Sums()
    for g, values, target in chunks(step, grad, x, dx):
        first, second, third = (None, None, None) if work is None else work[:, : values.shape[0]].unbind(0)
        g, values = g.to(gate.wide), values.to(gate.wide)
        centred = gate.centred(values, third)
        p = gate.open(centred, first)
        closed = torch.mul(g, values, out=second)
        torch.addcmul(closed, closed, p, value=-1, out=closed)
        of_closed = closed.sum(0)
        t = closed.mul_(p)
        if of_statistics:
            sums.found.append((of_closed, t.sum(0), torch.mul(t, centred, out=third).sum(0)))
        else:
            sums.found.append((of_closed,))
        if target is not None:
            torch.addcmul(t.mul_(inner), gate.gate(p), g, out=target)
    return sums


def _through_statistics(
    dx: Tensor, x: Tensor, mask: Tensor | None, gate: _Gate, rstd: Tensor, inverse: Tensor, total: Tensor
) -> None:
    """dx −= rate·(Σ dz + x̂·Σ dz·x̂)/count, in rows that count."""
    share = gate.rate * inverse
    slope = share * total[1] * rstd
    level = share * total[0]
    if gate.rest is not None:
        level = torch.addcmul(level, gate.rest, slope, value=-1)
    step = rows_per_chunk(x)
    work = None
    if x.shape[0] > step and (mask is not None or gate.base is not None):
        work = torch.empty((step, x.shape[1]), dtype=gate.wide, device=x.device)
    for target, values, keep in chunks(step, dx, x, mask):
        values = values.to(gate.wide)
        if mask is None and gate.base is None:
            target.addcmul_(values, slope, value=-1).sub_(level)
            continue
        buffer = None if work is None else work[: values.shape[0]]
        through = torch.addcmul(level, gate.centred(values, buffer), slope, out=buffer)
        target.sub_(through if keep is None else through.masked_fill_(~keep[:, None], 0))


# ---- what the operators call ----------------------------------------------------------------------------------------


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """(count, mean, M2) [3, C] of the rows of x [N, C] that ``mask`` [N] selects (None: all); zeros without rows."""
    return stack(*moments_of(x, mask))


def _is_small(x: Tensor, training: bool, alpha: Tensor, *others: Tensor | None) -> bool:
    """Whether ``torch_small`` serves, and what it makes of x is contiguous, as the operators promise."""
    return torch_small.serves(x, training) and x.is_contiguous() and torch_small.is_uniform(x, alpha, *others)


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
    plain = shift is None and gathered is None
    if plain and isinstance(step, float) and _is_small(x, True, alpha, weight, bias, running_mean, running_var):
        y, used = torch_small.forward(x, mask, alpha, weight, bias, running_mean, running_var, tracked, step, eps)
        return y, Normaliser(used.mean, used.rstd, 1 / used.rows if used.rows else 0.0).packed()
    z = _shifted(x, shift)
    count, mean, m2 = moments_of(z, mask) if gathered is None else merge(*gathered.unbind(1))
    normaliser = batch_normaliser(count, mean, m2, running_mean, running_var, tracked, step, eps)
    gate = _Gate(z, normaliser.mean, normaliser.rstd, alpha, weight, bias)
    return _apply(z, gate).to(x.dtype), _packed(normaliser, shift)


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
    if shift is None and _is_small(x, False, alpha, weight, bias, mean, var):
        return torch_small.inference(x, alpha, weight, bias, mean, var, eps, in_place=in_place)
    mean, rstd, _ = running_normaliser(mean, var, eps, wide_dtype(x.dtype))
    if shift is not None:
        x = x.add_(shift) if in_place else (x + shift).to(x.dtype)
    return _apply(x, _Gate(x, mean, rstd, alpha, weight, bias), in_place=in_place or shift is not None)


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
    if shift is None and _is_small(x, False, alpha, weight, bias, mean, var):
        y, used = torch_small.evaluate(x, alpha, weight, bias, mean, var, eps)
        return y, Normaliser(used.mean, used.rstd, 0.0).packed()
    normaliser = running_normaliser(mean, var, eps, wide_dtype(x.dtype))
    z = _shifted(x, shift)
    gate = _Gate(z, normaliser.mean, normaliser.rstd, alpha, weight, bias)
    return _apply(z, gate).to(x.dtype), _packed(normaliser, shift)


def sums(
    grad: Tensor, x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Sums over all rows [3, C]: Σ dz, Σ dz·x̂, Σ g·x·(1 − p), which are also the gradients of bias, weight and α.

    dz = g·x·(1 − α)·p·(1 − p), the gradient of the sigmoid's argument.
    """
    mean, rstd, _ = normaliser.to(wide_dtype(x.dtype)).unbind(0)
    gate = _Gate(x, mean, rstd, alpha, weight, bias)
    return _walk(grad, x, gate, None, of_statistics=True).finished(gate, rstd)


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
    mean, rstd, inverse = normaliser.to(wide_dtype(x.dtype)).unbind(0)
    plain = mask is None and gathered is None and grad.dtype is x.dtype
    if plain and _is_small(x, training, alpha, weight, bias):
        used = torch_small.Used(mean, rstd, x.shape[0] if training else 0)
        dx, of_alpha, *affine = torch_small.backward(grad, x, None, used, alpha, weight, bias)
        of_weight, of_bias = (torch.zeros_like(mean),) * 2 if weight is None else affine
        return dx, torch.stack((of_bias, of_weight, of_alpha))
    gate = _Gate(x, mean, rstd, alpha, weight, bias)
    dx = torch.empty(x.shape, dtype=gate.wide, device=x.device)
    needed = weight is not None or (training and gathered is None)
    sums = _walk(grad, x, gate, dx, of_statistics=needed)
    total = sums.finished(gate, rstd) if gathered is None else gathered.sum(0)
    if training:
        _through_statistics(dx, x, mask, gate, rstd, inverse, total)
    return dx.to(x.dtype), total
