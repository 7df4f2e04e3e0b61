"""Dice in plain torch for small inputs on a CPU, where calling an operation takes longer than what it does.

The same as ``torch_impl.py`` in as few calls as it takes, without masks and process groups, and with an autograd Function that
packs nothing. Statistics are those of x − x[0], two passes. No row is more than √N deviations from the mean, and then neither
the mean nor what is left of x loses more than rounding; torch's own batch normalisation, which serves where it pays to use all
threads, sums in float32 one row after the other and subtracts means last.

Backward: with t = g·x·p·(1 − p), dx = α·g + (1 − α)·(g·p + N(t)), where N goes through the normalisation, and in training
through its statistics. N is linear in each channel, so that 1 − α comes last: both products and their sum are one ``lerp``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .torch_statistics import ONE, wide_dtype

_MOST_ELEMENTS = 1 << 18
_MOST_ROWS = 1024  # what a sum over them one by one may lose stays within a few units in the last place

# Elements up to which torch's operations run on the calling thread. Its batch normalisation always wakes the others, which may
# take longer than everything else here, and where processors are busy milliseconds.
_SERIAL = 1 << 15

_ONE_MORE = torch.ones((), dtype=torch.int64, device="cpu")


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor that nobody writes to: torch takes longer over a Python number than over an addition."""
    return torch.full((), value, dtype=dtype, device="cpu")


def serves(x: Tensor, training: bool) -> bool:
    """Whether x [N, C] is small, on a CPU, and in training its rows few enough."""
    return x.is_cpu and x.numel() <= _MOST_ELEMENTS and (not training or 2 <= x.shape[0] <= _MOST_ROWS)


def is_uniform(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None = None,
    var: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether all is of one dtype, that of statistics, and lies as ``forward``, ``evaluate`` and ``backward`` take it."""
    dtype = x.dtype
    return (
        dtype in ONE and x.is_contiguous() and alpha.dtype is dtype and alpha.is_contiguous()
        and (mean is None or mean.dtype is dtype) and (var is None or var.dtype is dtype)
        and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype)
    )  # fmt: skip


def _uniform(x: Tensor, *vectors: Tensor | None) -> list[Any]:
    """Of one dtype, that of statistics, and contiguous; copied where it takes one."""
    wide = wide_dtype(x.dtype)
    return [
        t if t is None or (t.dtype is wide and t.is_contiguous()) else t.to(wide).contiguous() for t in (x, *vectors)
    ]


def _opened(p: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """y = x·(p + α·(1 − p)), in the memory of p."""
    return p.lerp_(ONE[x.dtype], alpha).mul_(x)


def forward(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, tracked: Tensor | None, step: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Training: (y [N, C], mean [C], 1/√(var + ε) [C]); running statistics are updated in place."""
    rows, first = x.shape[0], x[0]
    away = torch.sub(x, first)
    if x.numel() > _SERIAL:
        z, mean, rstd = torch.native_batch_norm(away, weight, bias, running_mean, running_var, True, step, eps)
        if running_mean is not None:
            running_mean.add_(first, alpha=step)
        mean.add_(first)
    else:
        dtype = x.dtype
        share = _constant(1 / rows, dtype)
        mean = away.sum(0).mul_(share)
        z = away.sub_(mean)
        mean.add_(first)
        var = z.square().sum(0).mul_(share)
        rstd = torch.add(var, _constant(eps, dtype)).rsqrt_()
        z.mul_(rstd)
        if weight is not None and bias is not None:
            torch.addcmul(bias, z, weight, out=z)
        if running_mean is not None and running_var is not None:
            weight_of_batch = _constant(step, dtype)
            running_mean.lerp_(mean, weight_of_batch)
            running_var.lerp_(var.mul_(_constant(rows / (rows - 1), dtype)), weight_of_batch)
    if running_mean is not None and tracked is not None:
        tracked.add_(_ONE_MORE)
    return _opened(z.sigmoid_(), x, alpha), mean, rstd


def _p(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """σ(x̂·weight + bias), x̂ = (x − mean)·rstd; x·rstd − mean·rstd would cancel, and to find out whether it does costs as much
    as the pass that it saves."""
    z = torch.sub(x, mean).mul_(rstd)
    if weight is not None and bias is not None:
        torch.addcmul(bias, z, weight, out=z)
    return z.sigmoid_()


def inference(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *,
    in_place: bool = False,
) -> Tensor:  # fmt: skip
    """y [N, C] in evaluation; in the memory of x if ``in_place``."""
    dtype = x.dtype
    p = _p(x, mean, torch.add(var, _constant(eps, dtype)).rsqrt_(), weight, bias)
    gate = p.lerp_(ONE[dtype], alpha)
    return x.mul_(gate) if in_place else gate.mul_(x)


def evaluate(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluation with running statistics ``mean``, ``var`` [C]: (y [N, C], a copy of the mean, 1/√(var + ε) [C])."""
    rstd = torch.add(var, _constant(eps, x.dtype)).rsqrt_()
    return _opened(_p(x, mean, rstd, weight, bias), x, alpha), mean.clone(), rstd


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None,
    training: bool, wanted: tuple[bool, ...] = (True, True, True, True),
) -> tuple[Any, ...]:  # fmt: skip
    """(dx [N, C], dα, dweight, dbias [C]); those that are not ``wanted`` may be None, as are those of no weight and bias."""
    affine = weight is not None and (wanted[2] or wanted[3])
    serial = training and x.numel() <= _SERIAL
    normalised = torch.sub(x, mean).mul_(rstd)
    if weight is not None and bias is not None:
        p = torch.addcmul(bias, normalised, weight).sigmoid_()
    else:
        p = normalised.sigmoid() if serial else normalised.sigmoid_()
    closed = torch.mul(x, grad)  # laid out as x, whatever the strides of the gradient
    closed.addcmul_(closed, p, value=-1)
    of_alpha = closed.sum(0) if wanted[1] else None
    if not (wanted[0] or affine):
        return None, of_alpha, None, None
    dx: Any = None
    of_weight: Any = None
    of_bias: Any = None
    rate = rstd if weight is None else rstd * weight
    if training:
        t = closed.mul_(p)
        if serial:
            of_bias, of_weight = t.sum(0), torch.mul(t, normalised).sum(0)
            share = _constant(1 / x.shape[0], x.dtype)
            dx = t.sub_(of_bias * share).addcmul_(normalised, of_weight * share, value=-1).mul_(rate)
        else:
            dx, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                t, x, weight, None, None, mean, rstd, True, 0.0, [True, affine, affine]
            )
        dx.addcmul_(p, grad)
    else:
        if affine:
            t = torch.mul(closed, p)
            of_bias, of_weight = t.sum(0), t.mul_(normalised).sum(0)
        dx = torch.addcmul(grad, closed, rate, out=closed).mul_(p)
    dx.lerp_(grad, alpha)
    if not affine:
        return dx, of_alpha, None, None
    slope = torch.sub(ONE[x.dtype], alpha)
    return dx, of_alpha, of_weight.mul_(slope), of_bias.mul_(slope)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, mean, rstd, alpha, weight, bias = ctx.saved_tensors
    if ctx.uniform:
        found = backward(grad, x, mean, rstd, alpha, weight, bias, ctx.training, ctx.needs_input_grad)
    else:
        grad, values, *vectors = _uniform(grad, x, alpha, weight, bias)
        results = backward(
            grad, values, mean, rstd, vectors[0], vectors[1], vectors[2], ctx.training, ctx.needs_input_grad
        )
        found = tuple(
            gradient if gradient is None or gradient.dtype is t.dtype else gradient.to(t.dtype)
            for gradient, t in zip(results, (x, alpha, weight, bias), strict=True)
        )
    return *found, None, None, None


_gradients_once = once_differentiable(_gradients)


class SmallDiceFunction(torch.autograd.Function):
    """``DiceFunction`` for what ``serves``, without masks and process groups.

    ``apply(x [N, C], alpha [C], weight, bias [C] or None, running, training, uniform)`` returns y [N, C]; ``running``: the
    running statistics and the three arguments after them of ``forward``; ``uniform``: see ``is_uniform``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Any, ...],
        training: bool, uniform: bool,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = (_forward if training else _evaluate)(x, alpha, weight, bias, running, uniform)
        ctx.training, ctx.uniform = training, uniform
        ctx.save_for_backward(x, mean, rstd, alpha, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # What ``once_differentiable`` does takes as long as two small operations, for nothing unless a graph is wanted.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, grad)


def _forward(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Any, ...], uniform: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``forward`` of anything."""
    if uniform:
        return forward(x, alpha, weight, bias, *running)
    values, alpha, weight, bias, mean, var = _uniform(x, alpha, weight, bias, *running[:2])
    y, used, rstd = forward(values, alpha, weight, bias, mean, var, *running[2:])
    for kept, moved in zip(running, (mean, var), strict=False):
        if moved is not kept:
            kept.copy_(moved)
    return y.to(x.dtype), used, rstd


def _evaluate(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Any, ...], uniform: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``evaluate`` of anything."""
    mean, var, _, _, eps = running
    if uniform:
        return evaluate(x, alpha, weight, bias, mean, var, eps)
    values, alpha, weight, bias, mean, var = _uniform(x, alpha, weight, bias, mean, var)
    y, used, rstd = evaluate(values, alpha, weight, bias, mean, var, eps)
    return y.to(x.dtype), used, rstd


def dice(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    tracked: Tensor | None, momentum: float | None, eps: float, *, training: bool, recorded: bool, in_place: bool,
) -> Tensor:  # fmt: skip
    """y [N, C] of what ``serves``; ``recorded``: for autograd; otherwise in evaluation in the memory of x if ``in_place``."""
    uniform = is_uniform(x, alpha, weight, bias, mean, var)
    if uniform and not training and not recorded:
        assert mean is not None
        assert var is not None
        return inference(x, alpha, weight, bias, mean, var, eps, in_place=in_place)
    if momentum is None:
        momentum = 0.0 if tracked is None or not training else 1.0 / (tracked.item() + 1)
    running = (mean, var, tracked, momentum, eps)
    if recorded:
        return SmallDiceFunction.apply(x, alpha, weight, bias, running, training, uniform)
    y = (_forward if training else _evaluate)(x, alpha, weight, bias, running, uniform)[0]
    return x.copy_(y) if in_place and not training else y
