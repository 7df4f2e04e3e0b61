"""The operators of Dice, and the autograd Function over them.

Rows x [N, C] throughout. Operators ``forward`` (training) and ``evaluate``, and ``backward`` for both, hand over to
``torch_impl`` or ``triton_impl``. Two more, ``moments`` and ``sums``, are the first halves of ``forward`` and ``backward``:
with a process group, what every process found is exchanged between the halves.

Saved for backward: x and ``normaliser`` [3, C], the vectors (mean of x without its shift, 1/√(var + ε), 1/count), where 1/count
is 0 when running statistics normalised, which no gradient goes through.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._library import define, is_eager, run
from . import torch_impl
from .torch_statistics import wide_dtype


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


@functools.cache
def implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return torch_impl
    from . import triton_impl  # imported on first use: it needs Triton

    return triton_impl


def _three(x: Tensor, shift: Tensor | None = None) -> Tensor:
    return x.new_empty((3 if shift is None else 4, x.shape[1]), dtype=wide_dtype(x.dtype))


def _moments(x: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    return implementation(backend).moments(x, mask)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, step_tensor, step, eps, backend = args
    return implementation(backend).forward(*tensors, step if step_tensor is None else step_tensor, eps)


def _evaluate(*args: Any) -> tuple[Tensor, Tensor]:
    return implementation(args[-1]).evaluate(*args[:-1])


def _sums(*args: Any) -> Tensor:
    return implementation(args[-1]).sums(*args[:-1])


def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    return implementation(args[-1]).backward(*args[:-1])


_EVERYWHERE = "CompositeExplicitAutograd"
_PARAMETERS = "Tensor alpha, Tensor? weight, Tensor? bias"
moments_op = define(
    "dice_moments(Tensor x, Tensor? mask, str backend) -> Tensor",
    fake=lambda x, *_: _three(x),
    impls={_EVERYWHERE: torch.no_grad()(_moments)},
    direct=_moments,
)
forward_op = define(
    f"dice_forward(Tensor x, Tensor? shift, Tensor? mask, Tensor? gathered, {_PARAMETERS}, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? tracked, Tensor? step_tensor, float step, float eps, str backend) "
    "-> (Tensor, Tensor)",
    fake=lambda x, *_: (x.new_empty(x.shape), _three(x)),
    impls={_EVERYWHERE: torch.no_grad()(_forward)},
)
evaluate_op = define(
    f"dice_evaluate(Tensor x, Tensor? shift, {_PARAMETERS}, Tensor mean, Tensor var, float eps, str backend) "
    "-> (Tensor, Tensor)",
    fake=lambda x, *_: (x.new_empty(x.shape), _three(x)),
    impls={_EVERYWHERE: torch.no_grad()(_evaluate)},
    direct=_evaluate,
)
sums_op = define(
    f"dice_sums(Tensor grad, Tensor x, Tensor normaliser, {_PARAMETERS}, str backend) -> Tensor",
    fake=lambda grad, x, *_: _three(x),
    impls={_EVERYWHERE: torch.no_grad()(_sums)},
    direct=_sums,
)
backward_op = define(
    f"dice_backward(Tensor grad, Tensor x, Tensor? shift, Tensor? mask, Tensor normaliser, Tensor? gathered, {_PARAMETERS}, "
    "bool training, str backend) -> (Tensor, Tensor)",
    fake=lambda grad, x, shift, *_: (x.new_empty(x.shape), _three(x, shift)),
    impls={_EVERYWHERE: torch.no_grad()(_backward)},
)


def _call(op: Any, x: Tensor, *rest: Any) -> Any:
    return run(op, is_eager(x), x, *rest)


def compute(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    running: Running, training: bool, group: Any, backend: str, shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [N, C], normaliser [3, C]) without a gradient; arguments of ``DiceFunction``."""
    if not training:
        return _call(evaluate_op, x, shift, alpha, weight, bias, running.mean, running.var, running.eps, backend)
    gathered = None if group is None else gather(_call(moments_op, x, mask, backend), group)
    step_tensor = None
    if running.momentum is None and running.tracked is not None:
        step_tensor = 1.0 / (running.tracked + 1).to(wide_dtype(x.dtype))
    mean, var, tracked, momentum, eps = running
    step, tensors = momentum or 0.0, (x, shift, mask, gathered, alpha, weight, bias, mean, var, tracked)
    if is_eager(x):
        return implementation(backend).forward(*tensors, step if step_tensor is None else step_tensor, eps)
    return forward_op(*tensors, step_tensor, step, eps, backend)


def gather(three: Tensor, group: Any) -> Tensor:
    """[3, C] of every process of ``group`` -> [W, 3, C] by rank: the same bits everywhere, so the same results."""
    import torch.distributed as dist

    gathered = three.new_empty((dist.get_world_size(group), *three.shape))
    dist.all_gather(list(gathered.unbind(0)), three, group=group)
    return gathered


class DiceFunction(torch.autograd.Function):
    """Dice (paper eq. 8-9) with an explicit backward through the batch's statistics; users call ``functional.dice``.

    ``apply(x [N, C], alpha [C], weight [C] or None, bias [C] or None, mask [N] or None, running, training, group, backend,
    shift [C] or None)`` returns y [N, C] in the dtype of x. Differentiable once, with respect to x, alpha, weight, bias and
    shift. In training ``running`` is updated in place once, unless fewer than two rows count. ``group``: a process group over
    which statistics are taken, or None. ``shift`` is added to x, the bias that a GEMM left out; not with a group, whose
    moments and sums would have to know it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
        running: Running, training: bool, group: Any, backend: str, shift: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if shift is not None and group is not None:
            raise ValueError("a shift cannot be combined with a process group: add it to x")
        y, normaliser = compute(x, alpha, weight, bias, mask, running, training, group, backend, shift)
        ctx.training, ctx.group, ctx.backend = training, group, backend
        ctx.save_for_backward(x, normaliser, alpha, weight, bias, mask, shift)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # What ``once_differentiable`` does takes as long as two small operations, for nothing unless a graph is wanted.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, normaliser, alpha, weight, bias, mask, shift = ctx.saved_tensors
    local = gathered = None
    if ctx.training and ctx.group is not None:
        local = _call(sums_op, grad, x, normaliser, alpha, weight, bias, ctx.backend)
        gathered = gather(local, ctx.group)
    arguments = (grad, x, shift, mask, normaliser, gathered, alpha, weight, bias, ctx.training)
    if is_eager(grad):
        dx, sums = implementation(ctx.backend).backward(*arguments)
    else:
        dx, sums = backward_op(*arguments, ctx.backend)
    # Parameters get the gradient of this process's rows; averaging them over processes is the trainer's business.
    own = sums if local is None else local

    def gradient(row: int, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        found = own[row]
        return found if found.dtype == parameter.dtype else found.to(parameter.dtype)

    return (
        dx, gradient(2, alpha), gradient(1, weight), gradient(0, bias), None, None, None, None, None, gradient(3, shift)
    )  # fmt: skip


_gradients_once = once_differentiable(_gradients)
