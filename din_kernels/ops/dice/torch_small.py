"""Dice in plain torch for small inputs on a CPU, where calling an operation takes longer than what it does.

The same as ``torch_impl.py`` in as few calls as it takes, without masks, process groups and mixed dtypes, and with an autograd
Function that packs nothing. torch's own batch normalisation has the statistics in one call, but sums in float32 one row after
the other and subtracts means last, so it is handed x − x[0]: no row is more than √N deviations from the mean, and then neither
loses more than rounding.

Backward: with t = g·x·p·(1 − p), dx = α·g + (1 − α)·(g·p + N(t)), where N goes through the normalisation, and in training
through its statistics. N is linear in each channel, so that 1 − α comes last: both products and their sum are one ``lerp``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .torch_statistics import ONE

if TYPE_CHECKING:
    pass  # which imports this module

_MOST_ELEMENTS = 1 << 18
_MOST_ROWS = 1024  # what a sum over them one by one may lose stays within a few units in the last place

_ONE_MORE = torch.ones((), dtype=torch.int64, device="cpu")


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
    """A number as a tensor that nobody writes to: torch takes longer over a Python number than over an addition."""
    return torch.full(shape, value, dtype=dtype, device="cpu")


def serves(
    x: Tensor, training: bool, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None = None,
    var: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether x [N, C] is small and contiguous on a CPU, everything of its dtype, and in training its rows few enough."""
    dtype = x.dtype
    return (
        x.is_cpu and x.numel() <= _MOST_ELEMENTS and dtype in ONE and x.is_contiguous()
        and (not training or 2 <= x.shape[0] <= _MOST_ROWS)
        and alpha.dtype is dtype and (mean is None or mean.dtype is dtype) and (var is None or var.dtype is dtype)
        and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype)
    )  # fmt: skip


def _opened(p: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """y = x·(p + α·(1 − p)), in the memory of p."""
    return p.lerp_(ONE[x.dtype], alpha).mul_(x)


def forward(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, tracked: Tensor | None, step: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Training: (y [N, C], mean [C], 1/√(var + ε) [C]); running statistics are updated in place."""
    first = x[0]
    z, mean, rstd = torch.native_batch_norm(x - first, weight, bias, running_mean, running_var, True, step, eps)
    if running_mean is not None:
        running_mean.add_(first, alpha=step)
        if tracked is not None:
            tracked.add_(_ONE_MORE)
    return _opened(z.sigmoid_(), x, alpha), mean.add_(first), rstd


def _p(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
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
    """(dx [N, C], dα, dweight, dbias [C]), None where there is nothing or it is not ``wanted``."""
    affine = weight is not None and (wanted[2] or wanted[3])
    dx: Any = None
    of_weight: Any = None
    of_bias: Any = None
    p = _p(x, mean, rstd, weight, bias)
    closed = torch.mul(x, grad)  # laid out as x, whatever the strides of the gradient
    closed.addcmul_(closed, p, value=-1)
    of_alpha = closed.sum(0) if wanted[1] else None
    if training:
        if wanted[0] or affine:
            dx, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                closed.mul_(p), x, weight, None, None, mean, rstd, True, 0.0, [wanted[0], affine, affine]
            )  # through the statistics too
            if wanted[0]:
                dx.addcmul_(p, grad)
    else:
        if affine:
            t = torch.mul(closed, p)
            of_bias, of_weight = t.sum(0), t.mul_(torch.sub(x, mean)).sum(0).mul_(rstd)
        if wanted[0]:
            dx = torch.addcmul(grad, closed, rstd if weight is None else rstd * weight, out=closed).mul_(p)
    if affine:
        slope = torch.sub(ONE[x.dtype], alpha)
        of_weight.mul_(slope)
        of_bias.mul_(slope)
    if wanted[0]:
        dx.lerp_(grad, alpha)
    return dx, of_alpha, of_weight, of_bias


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, alpha, weight, bias = ctx.saved_tensors
    found = backward(grad, x, mean, rstd, alpha, weight, bias, ctx.training, ctx.needs_input_grad)
    return *found, None, None


_gradients_once = once_differentiable(_gradients)


class SmallDiceFunction(torch.autograd.Function):
    """``DiceFunction`` for what ``serves``: ``apply(x [N, C], alpha [C], weight, bias [C] or None, training, running)``, where
    ``running`` are the other arguments of ``forward`` in one tuple."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool,
        running: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        if training:
            y, mean, rstd = forward(x, alpha, weight, bias, *running)
        else:
            mean, var, _, _, eps = running
            y, mean, rstd = evaluate(x, alpha, weight, bias, mean, var, eps)
        ctx.training = training
        ctx.save_for_backward(x, mean, rstd, alpha, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # What ``once_differentiable`` does takes as long as two small operations, for nothing unless a graph is wanted.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, grad)


def dice(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    tracked: Tensor | None, step: float, eps: float, *, training: bool, recorded: bool, in_place: bool,
) -> Tensor:  # fmt: skip
    """y [N, C] of what ``serves``; ``recorded``: for autograd; otherwise in evaluation in the memory of x if ``in_place``."""
    if recorded:
        return SmallDiceFunction.apply(x, alpha, weight, bias, training, (mean, var, tracked, step, eps))
    if training:
        return forward(x, alpha, weight, bias, mean, var, tracked, step, eps)[0]
    assert mean is not None
    assert var is not None
    return inference(x, alpha, weight, bias, mean, var, eps, in_place=in_place)
