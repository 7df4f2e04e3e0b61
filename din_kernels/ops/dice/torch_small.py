"""Dice in plain torch for small inputs on a CPU, where calling an operation takes longer than what it does.

The same as ``torch_impl.py`` in as few calls as it takes, without masks, process groups and mixed dtypes. torch's own batch
normalisation has the statistics in one call, but sums in float32 one row after the other and subtracts means last, so it is
handed x − x[0]: no row is more than √N deviations from the mean, and then neither loses more than rounding.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .torch_statistics import ONE

_MOST_ELEMENTS = 1 << 18
_MOST_ROWS = 1024  # what a sum over them one by one may lose stays within a few units in the last place

_ONE_MORE = torch.ones((), dtype=torch.int64, device="cpu")


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
    """A number as a tensor that nobody writes to: torch takes longer over a Python number than over an addition."""
    return torch.full(shape, value, dtype=dtype, device="cpu")


def serves(x: Tensor, alpha: Tensor, weight: Tensor | None = None, running_mean: Tensor | None = None) -> bool:
    """Whether x [N, C] is small and contiguous, and everything is of its dtype."""
    dtype = x.dtype
    return (
        x.is_cpu and dtype in ONE and alpha.dtype is dtype and x.numel() <= _MOST_ELEMENTS and x.is_contiguous()
        and (weight is None or weight.dtype is dtype) and (running_mean is None or running_mean.dtype is dtype)
    )  # fmt: skip


def serves_statistics(x: Tensor) -> bool:
    """Whether statistics over the rows of x may be summed here."""
    return 2 <= x.shape[0] <= _MOST_ROWS


def _normaliser(mean: Tensor, rstd: Tensor, inverse: float) -> Tensor:
    return torch.stack((mean, rstd, _constant(inverse, mean.dtype, mean.shape[0])))


def _opened(z: Tensor, x: Tensor, alpha: Tensor, *, in_place: bool = False) -> Tensor:
    """y = x·(α + (1 − α)·σ(z)), in the memory of z, or of x."""
    gate = torch.lerp(alpha, ONE[x.dtype], z.sigmoid_(), out=z)
    return torch.mul(x, gate, out=x) if in_place else gate.mul_(x)


def forward(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, tracked: Tensor | None, step: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Training: (y [N, C], normaliser [3, C]); running statistics are updated in place."""
    first = x[0]
    z, mean, rstd = torch.native_batch_norm(x - first, weight, bias, running_mean, running_var, True, step, eps)
    if running_mean is not None:
        running_mean.add_(first, alpha=step)
        if tracked is not None:
            tracked.add_(_ONE_MORE)
    return _opened(z, x, alpha), _normaliser(mean.add_(first), rstd, 1 / x.shape[0])


def _of_running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(argument of the sigmoid [N, C], 1/√(var + ε) [C])."""
    rstd = torch.add(var, _constant(eps, var.dtype)).rsqrt_()
    return _argument(x, mean, rstd, weight, bias), rstd


def _argument(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = torch.sub(x, mean).mul_(rstd)
    return z if weight is None or bias is None else torch.addcmul(bias, z, weight, out=z)


def inference(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *,
    in_place: bool,
) -> Tensor:  # fmt: skip
    """y [N, C] of ``evaluate`` alone; in the memory of x if ``in_place``."""
    return _opened(_of_running(x, weight, bias, mean, var, eps)[0], x, alpha, in_place=in_place)


def evaluate(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Evaluation with running statistics ``mean``, ``var`` [C]: (y [N, C], normaliser [3, C])."""
    z, rstd = _of_running(x, weight, bias, mean, var, eps)
    return _opened(z, x, alpha), _normaliser(mean, rstd, 0.0)


def backward(
    grad: Tensor,
    x: Tensor,
    normaliser: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """(dx [N, C], sums [3, C]) as ``torch_impl.backward``; the first two sums are 0 where there is no weight."""
    mean, rstd, _ = normaliser.unbind(0)
    p = _argument(x, mean, rstd, weight, bias).sigmoid_()
    closed = torch.mul(x, grad)  # laid out as x, whatever the strides of the gradient
    closed.addcmul_(closed, p, value=-1)
    of_alpha = closed.sum(0)
    slope = torch.sub(ONE[x.dtype], alpha)
    if training:
        affine = weight is not None
        dz = closed.mul_(p).mul_(slope)
        dx, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            dz, x, weight, None, None, mean, rstd, True, 0.0, [True, affine, affine]
        )  # through the statistics too
    elif weight is None:
        dx = closed.mul_(p).mul_(slope.mul_(rstd))
    else:
        dz = closed.mul_(p).mul_(slope)
        of_bias, of_weight = dz.sum(0), torch.sub(x, mean).mul_(rstd).mul_(dz).sum(0)
        dx = dz.mul_(rstd * weight)
    dx.addcmul_(torch.lerp(alpha, ONE[x.dtype], p, out=p), grad)
    if weight is None:
        of_bias = of_weight = _constant(0.0, x.dtype, x.shape[1])
    return dx, torch.stack((of_bias, of_weight, of_alpha))
