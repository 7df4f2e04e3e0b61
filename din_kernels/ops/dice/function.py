"""The operators of Dice, and the autograd Function over them.

Rows x [N, C] throughout. One operator serves the forward pass (two kernels in training, one in evaluation) and one the
backward pass. Two more, ``moments`` and ``sums``, are their first halves alone: with a process group, what every process
found is exchanged between the halves.

Saved for backward: x and ``normaliser`` [3, C], the vectors (mean, 1/√(var + ε), 1/count), where 1/count is 0 when running
statistics normalised, which no gradient goes through.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._library import define
from . import torch_impl
from .torch_impl import wide_dtype


class Running(NamedTuple):
    """The running statistics of a call, as ``nn.BatchNorm1d`` keeps them.

    mean, var    [C] or None
    tracked      [] int64 number of updates, or None
    momentum     weight of the new batch; None: average over all batches, which needs ``tracked``
    eps          added to the variance
    """

    mean: Tensor | None
    var: Tensor | None
    tracked: Tensor | None
    momentum: float | None
    eps: float


def _moments(x: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    return torch_impl.moments(x, mask)


def _moments_fake(x: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((3, x.shape[1]), dtype=wide_dtype(x.dtype))


def _forward(
    x: Tensor, mask: Tensor | None, gathered: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None, step: Tensor | None,
    momentum: float, eps: float, training: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = None
    if training:
        batch = torch_impl.moments(x, mask) if gathered is None else torch_impl.merge(gathered)
    normaliser = torch_impl.statistics(
        batch, running_mean, running_var, tracked, momentum if step is None else step, eps, wide_dtype(x.dtype)
    )
    return torch_impl.apply(x, normaliser, alpha, weight, bias), normaliser


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((3, x.shape[1]), dtype=wide_dtype(x.dtype))


def _sums(
    grad: Tensor, x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str
) -> Tensor:
    return torch_impl.backward_sums(grad, x, normaliser, alpha, weight, bias)


def _sums_fake(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((3, x.shape[1]), dtype=wide_dtype(x.dtype))


def _backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, normaliser: Tensor, reduced: Tensor | None, alpha: Tensor,
    weight: Tensor | None, bias: Tensor | None, training: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if reduced is not None:
        return torch_impl.backward_apply(grad, x, mask, normaliser, reduced, alpha, weight, bias), reduced.clone()
    sums = torch_impl.backward_sums(grad, x, normaliser, alpha, weight, bias)
    return torch_impl.backward_apply(grad, x, mask, normaliser, sums, alpha, weight, bias), sums


def _backward_fake(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((3, x.shape[1]), dtype=wide_dtype(x.dtype))


_EVERYWHERE = "CompositeExplicitAutograd"
moments_op = define(
    "dice_moments(Tensor x, Tensor? mask, str backend) -> Tensor", fake=_moments_fake, impls={_EVERYWHERE: _moments}
)
forward_op = define(
    "dice_forward(Tensor x, Tensor? mask, Tensor? gathered, Tensor alpha, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? tracked, Tensor? step, float momentum, float eps, "
    "bool training, str backend) -> (Tensor, Tensor)",
    fake=_forward_fake,
    impls={_EVERYWHERE: _forward},
)
sums_op = define(
    "dice_sums(Tensor grad, Tensor x, Tensor normaliser, Tensor alpha, Tensor? weight, Tensor? bias, str backend) -> Tensor",
    fake=_sums_fake,
    impls={_EVERYWHERE: _sums},
)
backward_op = define(
    "dice_backward(Tensor grad, Tensor x, Tensor? mask, Tensor normaliser, Tensor? reduced, Tensor alpha, Tensor? weight, "
    "Tensor? bias, bool training, str backend) -> (Tensor, Tensor)",
    fake=_backward_fake,
    impls={_EVERYWHERE: _backward},
)


class DiceFunction(torch.autograd.Function):
    """Dice (paper eq. 8-9) with an explicit backward through the batch's statistics; users call ``functional.dice``.

    ``apply(x [N, C], alpha [C], weight [C] or None, bias [C] or None, mask [N] or None, running, training, group, backend)``
    returns y [N, C] in the dtype of x. Differentiable once, with respect to x, alpha, weight and bias. In training
    ``running`` is updated in place once, unless fewer than two rows count. ``group``: a process group over which
    statistics are taken, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
        running: Running, training: bool, group: Any, backend: str,
    ) -> Tensor:  # fmt: skip
        gathered = None
        if training and group is not None:
            from .distributed import gather_moments

            gathered = gather_moments(moments_op(x, mask, backend), group)
        step = None
        if training and running.momentum is None:
            assert running.tracked is not None
            step = 1.0 / (running.tracked + 1).to(wide_dtype(x.dtype))
        y, normaliser = forward_op(
            x, mask, gathered, alpha, weight, bias, running.mean, running.var, running.tracked, step,
            0.0 if running.momentum is None else running.momentum, running.eps, training, backend,
        )  # fmt: skip
        ctx.training, ctx.group, ctx.backend = training, group, backend
        ctx.save_for_backward(x, normaliser, alpha, weight, bias, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, normaliser, alpha, weight, bias, mask = ctx.saved_tensors
        local = reduced = None
        if ctx.training and ctx.group is not None:
            from .distributed import reduce_sums

            local = sums_op(grad, x, normaliser, alpha, weight, bias, ctx.backend)
            reduced = reduce_sums(local, ctx.group)
        dx, sums = backward_op(grad, x, mask, normaliser, reduced, alpha, weight, bias, ctx.training, ctx.backend)
        # Parameters get the gradient of this process's rows; averaging them over processes is the trainer's business.
        d_bias, d_weight, d_alpha = (sums if local is None else local).unbind(0)
        return (
            dx, d_alpha.to(alpha.dtype), None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype), None, None, None, None, None,
        )  # fmt: skip
