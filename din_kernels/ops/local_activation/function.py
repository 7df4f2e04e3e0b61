"""The operators of the local activation unit, and the autograd Function over them.

Three operators (statistics, forward, backward) are registered with ``torch.library``; each carries the backend as an
argument and hands over to ``torch_impl`` or ``triton_impl``. Only inputs and O(query rows) numbers are saved for the
backward pass, which recomputes the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._library import define, is_eager, run
from . import torch_impl
from .dice_statistics import Used
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors

_TENSORS = (
    "Tensor query, Tensor keys, Tensor starts, Tensor ends, Tensor? row_mask, Tensor[] weights, Tensor?[] biases, "
    "Tensor?[] alphas, Tensor[] means, Tensor[] rstds"
)
_CONFIG = (
    "str interaction, str activation, bool softmax, float scale, int candidates, SymInt padded_length, "
    "str precision, str backend"
)


class RunningStatistics(NamedTuple):
    """Dice's running averages for one hidden layer, updated in place in training as ``nn.BatchNorm1d`` updates its own.

    mean, var            [H]
    num_batches_tracked  [] int64 or None
    momentum             weight of the new batch; None averages over all batches (needs ``num_batches_tracked``)
    eps                  added to the variance
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-8


class Call(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    interaction: str
    activation: str
    softmax: bool
    scale: float
    candidates: int
    padded_length: int
    precision: str
    backend: str
    return_weights: bool
    training: bool  # Dice uses the batch's statistics
    eps: tuple[float, ...]
    has_bias: tuple[bool, ...]


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return torch_impl
    from . import triton_impl  # imported on first use: it needs Triton

    return triton_impl


# One and the same object for equal calls: what is known of a configuration is kept under it, and found fastest by identity.
_one_config = functools.lru_cache(maxsize=256)(UnitConfig)


def _config(tensors: UnitTensors, rest: Sequence[Any]) -> UnitConfig:
    interaction, activation, softmax, scale, candidates, padded_length, precision, _ = rest
    return _one_config(
        interaction, activation, tensors.keys.shape[1], tuple(w.shape[0] for w in tensors.weights[:-1]),
        softmax, scale, candidates, padded_length, precision,
    )  # fmt: skip


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; meta has none, and asking about it raises."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _exactly(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with autocast off: the public call has cast what is to be cast, and sums are fp32 on purpose."""

    @functools.wraps(operator)
    def call(*args: Any) -> Any:
        tensor = args[0]
        if not autocast_enabled(tensor):
            return operator(*args)
        with torch.autocast(tensor.device.type, enabled=False):
            return operator(*args)

    return call


def _dice_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, means, variances, eps, return_weights = UnitTensors(*args[:10]), *args[10:14]
    config = _config(tensors, args[14:])
    tensors = tensors._replace(means=[], rstds=[])
    outputs, found = _implementation(args[-1]).dice_forward(
        config, tensors, list(zip(means, variances, strict=True)), eps, return_weights=return_weights
    )
    return *_present(outputs, tensors.keys), [tensor for used in found for tensor in used]


def _dice_forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    keys, weights = args[1], args[5]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32

    def used(width: int) -> Used:
        mean, m2, used_mean, rstd = (keys.new_empty(width, dtype=dtype) for _ in range(4))
        return Used(keys.new_empty((), dtype=torch.float64), mean, m2, used_mean, rstd, keys.new_empty((), dtype=dtype))

    found = [tensor for weight in weights[:-1] for tensor in used(weight.shape[0])]
    return *_forward_fake(*args[:10], args[13], *args[14:]), found


def _present(outputs: UnitOutputs, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operators return tensors only: an empty one stands for what is absent."""
    return (
        outputs.pooled,
        keys.new_empty(0) if outputs.weights is None else outputs.weights,
        keys.new_empty(0) if outputs.log_normaliser is None else outputs.log_normaliser,
    )


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, return_weights, rest = UnitTensors(*args[:10]), args[10], args[11:]
    if tensors.means is None:  # AOTInductor hands an empty list of tensors over as None
        tensors = tensors._replace(means=[], rstds=[])
    outputs = _implementation(rest[-1]).forward(_config(tensors, rest), tensors, return_weights=return_weights)
    return _present(outputs, tensors.keys)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, return_weights, rest = UnitTensors(*args[:10]), args[10], args[11:]
    softmax, candidates = rest[2], rest[4]
    keys, queries = tensors.keys, tensors.query.shape[0]
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    return (
        keys.new_empty(queries, keys.shape[1]),
        keys.new_empty(keys.shape[0] * candidates if return_weights else 0),
        keys.new_empty(queries, dtype=wide) if softmax else keys.new_empty(0),
    )


def _backward(*args: Any) -> list[Tensor]:
    grad_pooled, grad_weights, pooled, weights, log_normaliser, inv_count = args[:6]
    tensors, rest = UnitTensors(*args[6:16]), args[16:]
    saved = UnitOutputs(pooled, weights, log_normaliser)
    grads: UnitGradients = _implementation(rest[-1]).backward(
        _config(tensors, rest), tensors, saved, grad_pooled, grad_weights, inv_count
    )
    flat = [grads.query, grads.keys, *grads.weights, *grads.biases, *grads.alphas]
    return [g for g in flat if g is not None]


def _backward_fake(*args: Any) -> list[Tensor]:
    tensors = UnitTensors(*args[6:16])
    flat = [tensors.query, tensors.keys, *tensors.weights, *tensors.biases, *tensors.alphas]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in flat if t is not None]


_EVERYWHERE = "CompositeExplicitAutograd"
forward_op = define(
    f"local_activation_forward({_TENSORS}, bool return_weights, {_CONFIG}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    impls={_EVERYWHERE: _exactly(_forward)},
)
# Dice in training: statistics and forward in one, so that what they have in common is prepared, or computed, once.
dice_forward_op = define(
    f"local_activation_dice_forward({_TENSORS}, Tensor[] running_means, Tensor[] running_vars, float[] eps, "
    f"bool return_weights, {_CONFIG}) -> (Tensor, Tensor, Tensor, Tensor[])",
    fake=_dice_forward_fake,
    impls={_EVERYWHERE: _exactly(_dice_forward)},
)
backward_op = define(
    "local_activation_backward(Tensor grad_pooled, Tensor? grad_weights, Tensor pooled, Tensor? attention, "
    f"Tensor? log_normaliser, Tensor? inv_count, {_TENSORS}, {_CONFIG}) -> Tensor[]",
    fake=_backward_fake,
    impls={_EVERYWHERE: _exactly(_backward)},
)


class LocalActivationFunction(torch.autograd.Function):
    """Local activation unit (paper eq. 3) with an explicit backward; see ``functional.local_activation`` for users.

    ``apply(call, query [Q, D], keys [R, D], starts [S], ends [S], row_mask [R] or None, running, *parameters)`` where
    ``running`` is a flat tuple of Dice's (mean, var) per hidden layer and ``parameters`` are the linear weights, then the
    biases that exist, then the activations' alphas.

    Returns (pooled [Q, D], weights [R·C] or an empty tensor, then for Dice in training count, mean_l, m2_l per layer,
    which carry no gradient). Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, query: Tensor, keys: Tensor, starts: Tensor, ends: Tensor, row_mask: Tensor | None,
        running: tuple[Tensor, ...], *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        depth = len(call.has_bias) - 1
        weights = list(parameters[: depth + 1])
        present = iter(parameters[depth + 1 : depth + 1 + sum(call.has_bias)])
        biases = [next(present) if has else None for has in call.has_bias]
        alphas: list[Tensor | None] = list(parameters[depth + 1 + sum(call.has_bias) :]) or [None] * depth
        means: list[Tensor] = []
        rstds: list[Tensor] = []
        config = (
            call.interaction, call.activation, call.softmax, call.scale, call.candidates, call.padded_length,
            call.precision, call.backend,
        )  # fmt: skip
        arguments = (query, keys, starts, ends, row_mask, weights, biases, alphas, means, rstds)
        eager = is_eager(query, keys, *parameters)
        found: list[Used] = []
        if call.activation == "dice" and call.training:
            *outputs, flat = run(
                dice_forward_op, eager, *arguments, list(running[::2]), list(running[1::2]), list(call.eps),
                call.return_weights, *config,
            )  # fmt: skip
            found = [Used(*flat[6 * layer : 6 * layer + 6]) for layer in range(depth)]
            means, rstds = [used.used_mean for used in found], [used.rstd for used in found]
        else:
            wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
            for mean, var, eps in zip(running[::2], running[1::2], call.eps, strict=True):
                means.append(mean.to(wide))
                rstds.append(torch.rsqrt(var.to(wide) + eps))
            outputs = run(forward_op, eager, *arguments, call.return_weights, *config)
        pooled, attention, log_normaliser = outputs
        moments = [tensor for used in found for tensor in used[:3]]
        inv_count = found[-1].inverse if found else None
        ctx.call, ctx.config, ctx.depth = call, config, depth
        ctx.num_statistics = len(means)
        ctx.has_mask, ctx.has_count = row_mask is not None, inv_count is not None
        optional = [t for t in (row_mask, inv_count) if t is not None]
        ctx.save_for_backward(
            query, keys, starts, ends, pooled, attention, log_normaliser, *means, *rstds, *parameters, *optional
        )
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        return (pooled, attention, *moments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: Tensor | None, grad_attention: Tensor | None, *_: Any) -> tuple[Any, ...]:
        call, depth, n = ctx.call, ctx.depth, ctx.num_statistics
        saved = list(ctx.saved_tensors)
        query, keys, starts, ends, pooled, attention, log_normaliser = saved[:7]
        means, rstds, rest = saved[7 : 7 + n], saved[7 + n : 7 + 2 * n], saved[7 + 2 * n :]
        inv_count = rest.pop() if ctx.has_count else None
        row_mask = rest.pop() if ctx.has_mask else None
        parameters = rest
        nones = (None,) * 7
        if grad_pooled is None and grad_attention is None:
            return (*nones, *[None] * len(parameters))
        weights = parameters[: depth + 1]
        present = iter(parameters[depth + 1 : depth + 1 + sum(call.has_bias)])
        biases = [next(present) if has else None for has in call.has_bias]
        alphas: list[Tensor | None] = list(parameters[depth + 1 + sum(call.has_bias) :]) or [None] * depth
        if grad_pooled is None:
            grad_pooled = torch.zeros_like(pooled)
        eager = is_eager(grad_pooled, query, keys, *parameters)
        grads = run(
            backward_op, eager, grad_pooled, grad_attention if call.return_weights else None, pooled,
            attention if call.return_weights else None, log_normaliser if call.softmax else None, inv_count,
            query, keys, starts, ends, row_mask, weights, biases, alphas, means, rstds, *ctx.config,
        )  # fmt: skip
        return (None, grads[0], grads[1], None, None, None, None, *grads[2:])
