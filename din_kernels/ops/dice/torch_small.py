"""Dice in plain torch for small inputs on a CPU, where calling an operation takes longer than what it does.

The same as ``torch_impl.py`` in as few calls as it takes, without process groups, and with an autograd Function that packs
nothing. Statistics are those of x − x[0] of the rows that count, two passes. No such row is more than √N deviations from the
mean, and then neither the mean nor what is left of x loses more than rounding; torch's own batch normalisation, which serves
where it pays to use all threads, sums in float32 one row after the other and subtracts means last.

Backward: with t = g·x·p·(1 − p), dx = α·g + (1 − α)·(g·p + N(t)), where N goes through the normalisation, and in training
through its statistics. N is linear in each channel, so that 1 − α comes last: both products and their sum are one ``lerp``.

x is [N, C] in training, [..., C] of any strides in evaluation, whose y then lies in memory as x does, as that of torch's own
operations; α is [C] or has one element, for all channels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .torch_statistics import ONE, wide_dtype

_MOST_ELEMENTS = 1 << 18
_MOST_ROWS = 1024  # what a sum over them one by one may lose stays within a few units in the last place

# Elements up to which torch's operations run on the calling thread. Its batch normalisation always wakes the others, which may
# take longer than everything else here, and where processors are busy milliseconds.
_SERIAL = 1 << 15

# Elements from which finding out whether x·rate + level would cancel costs less than the pass over x that it saves.
_FOLDED = 1 << 16

# Elements below which torch converts x to the dtype of statistics twice in less time than a call takes.
_CONVERTED = 1 << 12

_ONE_MORE = torch.ones((), dtype=torch.int64, device="cpu")


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor that nobody writes to: torch takes longer over a Python number than over an addition."""
    return torch.full((), value, dtype=dtype, device="cpu")


def serves(x: Tensor, training: bool) -> bool:
    """Whether x ([N, C] in training) is small, on a CPU, and in training its rows few enough. In evaluation x that is not
    contiguous may be of any size: walking it in chunks of rows, as ``torch_impl`` does, would tear its memory apart."""
    if not x.is_cpu:
        return False
    if training:
        return x.numel() <= _MOST_ELEMENTS and 2 <= x.shape[0] <= _MOST_ROWS
    return x.numel() <= _MOST_ELEMENTS or not x.is_contiguous()


def is_uniform(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None = None,
    var: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether all is of one dtype, that of statistics."""
    dtype = x.dtype
    return (
        dtype in ONE and alpha.dtype is dtype
        and (mean is None or mean.dtype is dtype) and (var is None or var.dtype is dtype)
        and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype)
    )  # fmt: skip


def _widened(wide: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """In the dtype of statistics, ``wide``; copied where it takes one."""
    return [t if t is None or t.dtype is wide else t.to(wide) for t in tensors]


def _by_hand(x: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's batch normalisation is of no use: few elements, a mask, or memory that it would walk the long way."""
    return mask is not None or x.numel() <= _SERIAL or not x.is_contiguous()


def _over_rows(values: Tensor) -> Tensor:
    """[..., C] -> [C]."""
    return values.sum(0) if values.dim() == 2 else values.sum(tuple(range(values.dim() - 1)))


def _gate(p: Tensor, alpha: Tensor) -> Tensor:
    """α + (1 − α)·p, in the memory of p, by whatever torch vectorises: a number, or tensors that lie alike."""
    one = ONE[p.dtype]
    if alpha.numel() == 1:
        return p.lerp_(one, alpha.item())
    if not p.is_contiguous():
        return p.mul_(torch.sub(one, alpha)).add_(alpha)
    return p.lerp_(one, alpha) if p.numel() < _FOLDED else torch.addcmul(alpha, p, torch.sub(one, alpha), out=p)


# ---- forward ----------------------------------------------------------------------------------------------------------


class Used(NamedTuple):
    """What normalised: mean and 1/√(var + ε) [C], and how many rows they are of, 0 where running statistics serve."""

    mean: Tensor
    rstd: Tensor
    rows: int


def forward(
    x: Tensor, mask: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None, step: float, eps: float,
) -> tuple[Tensor, Used]:  # fmt: skip
    """Training: y [N, C], and what normalised; running statistics are updated in place, unless fewer than two rows count."""
    counted = x if mask is None else x[mask]
    rows = counted.shape[0]
    if rows < 2:
        mean = counted.new_zeros(x.shape[1]) if running_mean is None else running_mean
        return evaluate(
            x, alpha, weight, bias, mean, torch.ones_like(mean) if running_var is None else running_var, eps
        )
    first = counted[0]
    away = torch.sub(counted, first)
    dtype = x.dtype
    if not _by_hand(x, mask):
        z, mean, rstd = torch.native_batch_norm(away, weight, bias, running_mean, running_var, True, step, eps)
        if running_mean is not None:
            running_mean.add_(first, alpha=step)
        mean.add_(first)
        opened = z.sigmoid_()
    else:
        share = _constant(1 / rows, dtype)
        mean = away.sum(0).mul_(share)
        away.sub_(mean)
        mean.add_(first)
        var = (away.square() if mask is None else away.square_()).sum(0).mul_(share)
        rstd = torch.add(var, _constant(eps, dtype)).rsqrt_()
        opened = _open(away if mask is None else torch.sub(x, mean), rstd, weight, bias)
        if running_mean is not None and running_var is not None:
            weight_of_batch = _constant(step, dtype)
            running_mean.lerp_(mean, weight_of_batch)
            running_var.lerp_(var.mul_(_constant(rows / (rows - 1), dtype)), weight_of_batch)
    if running_mean is not None and tracked is not None:
        tracked.add_(_ONE_MORE)
    return _gate(opened, alpha).mul_(x), Used(mean, rstd, rows)


def _open(centred: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """p = σ(x̂·weight + bias) with x̂ = (x − mean)·rstd, in the memory of x − mean."""
    z = centred.mul_(rstd)
    if weight is not None and bias is not None:
        torch.addcmul(bias, z, weight, out=z)
    return z.sigmoid_()


def _evaluated(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:  # fmt: skip
    """α + (1 − α)·p. As x·rate + level where no mean is more than 16 deviations (their squares are added up, which is one
    call), so that it does not cancel; elsewhere, and where that costs more than the pass it saves, with x − mean."""
    if x.numel() >= _FOLDED and x.is_contiguous() and x.dtype is mean.dtype:
        rate = rstd if weight is None else rstd * weight
        away = torch.mul(mean, rate)
        if torch.dot(away, away).item() < 256.0:
            level = away.neg_() if bias is None else torch.sub(bias, away)
            return _gate(torch.addcmul(level, x, rate).sigmoid_(), alpha)
    return _gate(_open(torch.sub(x, mean), rstd, weight, bias), alpha)


def inference(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *,
    in_place: bool = False,
) -> Tensor:  # fmt: skip
    """y [..., C] in evaluation, in the dtype of statistics; or in the memory of x if ``in_place``."""
    rstd = torch.add(var, _constant(eps, var.dtype)).rsqrt_()
    gate = _evaluated(x, alpha, weight, bias, mean, rstd)
    return x.mul_(gate) if in_place else gate.mul_(x)


def evaluate(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Used]:
    """Evaluation with running statistics ``mean``, ``var`` [C]: y [..., C], and copies of what normalised."""
    rstd = torch.add(var, _constant(eps, var.dtype)).rsqrt_()
    gate = _evaluated(x, alpha, weight, bias, mean, rstd)
    return gate.mul_(x), Used(mean.clone(), rstd, 0)


# ---- backward ---------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, used: Used, alpha: Tensor, weight: Tensor | None, bias: Tensor | None,
    wanted: tuple[bool, ...] = (True, True, True, True),
) -> tuple[Any, ...]:  # fmt: skip
    """(dx as x, dα as α, dweight, dbias [C]); those that are not ``wanted`` may be None, as are those of no weight and bias."""
    mean, rstd, rows = used
    affine = weight is not None and (wanted[2] or wanted[3])
    by_hand = rows > 0 and _by_hand(x, mask)
    normalised = torch.sub(x, mean).mul_(rstd)
    if weight is not None and bias is not None:
        p = torch.addcmul(bias, normalised, weight).sigmoid_()
    else:
        p = normalised.sigmoid() if by_hand else normalised.sigmoid_()
    closed = torch.mul(x, grad)  # laid out as x, whatever the strides of the gradient
    closed.addcmul_(closed, p, value=-1)
    of_alpha = _over_rows(closed) if wanted[1] else None
    if of_alpha is not None and alpha.numel() != of_alpha.numel():
        of_alpha = of_alpha.sum().reshape(alpha.shape)
    if not (wanted[0] or affine):
        return None, of_alpha, None, None
    dx: Any = None
    of_weight: Any = None
    of_bias: Any = None
    rate = rstd if weight is None else rstd * weight
    if by_hand:
        t = closed.mul_(p)
        of_bias, of_weight = t.sum(0), torch.mul(t, normalised).sum(0)
        share = _constant(1 / rows, x.dtype)
        level, slope = of_bias * share, of_weight * share
        if mask is None:
            t.sub_(level).addcmul_(normalised, slope, value=-1)
        else:
            t.sub_(normalised.mul_(slope).add_(level).masked_fill_(mask.logical_not()[:, None], 0.0))
        dx = t.mul_(rate).addcmul_(p, grad)
    elif rows > 0:
        t = closed.mul_(p)
        dx, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            t, x, weight, None, None, mean, rstd, True, 0.0, [True, affine, affine]
        )
        dx.addcmul_(p, grad)
    else:
        if affine:
            t = torch.mul(closed, p)
            of_bias, of_weight = _over_rows(t), _over_rows(t.mul_(normalised))
        dx = torch.addcmul(grad, closed, rate, out=closed).mul_(p)
    if alpha.numel() == 1:
        dx.lerp_(grad, alpha.item())
    elif x.is_contiguous():
        dx.lerp_(grad, alpha)
    else:
        dx.mul_(torch.sub(ONE[x.dtype], alpha)).add_(grad * alpha)
    if not affine:
        return dx, of_alpha, None, None
    slope = torch.sub(ONE[x.dtype], alpha)
    return dx, of_alpha, of_weight.mul_(slope), of_bias.mul_(slope)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, mask, mean, rstd, alpha, weight, bias = ctx.saved_tensors
    used = Used(mean, rstd, ctx.rows)
    if ctx.uniform and grad.dtype is x.dtype:
        found = backward(grad, x, mask, used, alpha, weight, bias, ctx.needs_input_grad)
    else:
        values, grad, *vectors = _widened(wide_dtype(x.dtype), x, grad, alpha, weight, bias)
        results = backward(grad, values, mask, used, vectors[0], vectors[1], vectors[2], ctx.needs_input_grad)
        found = tuple(
            gradient if gradient is None or gradient.dtype is t.dtype else gradient.to(t.dtype)
            for gradient, t in zip(results, (x, alpha, weight, bias), strict=True)
        )
    return *found, None, None, None, None


_gradients_once = once_differentiable(_gradients)


# ---- what calls it ----------------------------------------------------------------------------------------------------


class SmallDiceFunction(torch.autograd.Function):
    """``DiceFunction`` for what ``serves``, without process groups.

    ``apply(x, alpha [C] or of one element, weight, bias [C] or None, mask [N] or None, running, training, uniform)`` returns y
    as x; ``running``: the running statistics and the three arguments after them of ``forward``; ``uniform``: see
    ``is_uniform``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
        running: tuple[Any, ...], training: bool, uniform: bool,
    ) -> Tensor:  # fmt: skip
        y, used = (_forward if training else _evaluate)(x, mask, alpha, weight, bias, running, uniform)
        ctx.rows, ctx.uniform = used.rows, uniform
        ctx.save_for_backward(x, mask, used.mean, used.rstd, alpha, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # What ``once_differentiable`` does takes as long as two small operations, for nothing unless a graph is wanted.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, grad)


def _forward(
    x: Tensor, mask: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Any, ...],
    uniform: bool,
) -> tuple[Tensor, Used]:  # fmt: skip
    """``forward`` of anything."""
    if uniform:
        return forward(x, mask, alpha, weight, bias, *running)
    values, alpha, weight, bias, mean, var = _widened(wide_dtype(x.dtype), x, alpha, weight, bias, *running[:2])
    y, used = forward(values, mask, alpha, weight, bias, mean, var, *running[2:])
    for kept, moved in zip(running, (mean, var), strict=False):
        if moved is not kept and used.rows:
            kept.copy_(moved)
    return y.to(x.dtype), used


def _evaluate(
    x: Tensor, mask: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Any, ...],
    uniform: bool,
) -> tuple[Tensor, Used]:  # fmt: skip
    """``evaluate`` of anything."""
    mean, var, _, _, eps = running
    if uniform:
        return evaluate(x, alpha, weight, bias, mean, var, eps)
    wide = wide_dtype(x.dtype)
    alpha, weight, bias, mean, var = _widened(wide, alpha, weight, bias, mean, var)
    y, used = evaluate(_perhaps_wide(x, wide), alpha, weight, bias, mean, var, eps)
    return y.to(x.dtype), used


def _infer(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    in_place: bool,
) -> Tensor:  # fmt: skip
    """``inference`` of anything."""
    wide = wide_dtype(x.dtype)
    alpha, weight, bias, mean, var = _widened(wide, alpha, weight, bias, mean, var)
    if in_place:
        return inference(x, alpha, weight, bias, mean, var, eps, in_place=True)
    return inference(_perhaps_wide(x, wide), alpha, weight, bias, mean, var, eps).to(x.dtype)


def _perhaps_wide(x: Tensor, wide: torch.dtype) -> Tensor:
    """x for evaluation, whose operations convert it where that is cheaper."""
    return x if x.dtype is wide or x.numel() < _CONVERTED else x.to(wide)


def dice(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, mean: Tensor | None,
    var: Tensor | None, tracked: Tensor | None, momentum: float | None, eps: float, *, training: bool, recorded: bool,
    in_place: bool,
) -> Tensor:  # fmt: skip
    """y of what ``serves``; ``recorded``: for autograd; otherwise in evaluation in the memory of x if ``in_place``."""
    uniform = is_uniform(x, alpha, weight, bias, mean, var)
    if not training and not recorded:
        assert mean is not None
        assert var is not None
        if uniform:
            return inference(x, alpha, weight, bias, mean, var, eps, in_place=in_place)
        return _infer(x, alpha, weight, bias, mean, var, eps, in_place)
    if momentum is None:
        momentum = 0.0 if tracked is None or not training else 1.0 / (tracked.item() + 1)
    running = (mean, var, tracked, momentum, eps)
    if recorded:
        return SmallDiceFunction.apply(x, alpha, weight, bias, mask, running, training, uniform)
    return _forward(x, mask, alpha, weight, bias, running, uniform)[0]
