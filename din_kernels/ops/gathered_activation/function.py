"""The operators of the gather-fused unit, and the autograd Function over them.

The unit itself is that of ``ops/local_activation``. Its universal Triton kernels read a behaviour's row from the item and the
category table where they would read it from ``keys``, so keys [N, D] are neither written nor read back, in forward nor in
backward, whose only tensor of that size is its result: one gradient per occurrence of an id. The torch backend gathers first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._library import define, is_eager, run
from ..local_activation import function as unit
from ..local_activation import torch_impl
from ..local_activation.dice_statistics import Moments, Used, used
from ..local_activation.problem import Gathered, UnitOutputs, UnitTensors

_GATHERED = "Tensor item_table, Tensor category_table, Tensor item_ids, Tensor category_ids"
_REST = (
    "Tensor query, Tensor starts, Tensor ends, Tensor[] weights, Tensor?[] biases, Tensor?[] alphas, Tensor[] means, "
    "Tensor[] rstds"
)
_TENSORS = f"{_GATHERED}, {_REST}"
_COUNT = 12  # tensors and lists of them in _TENSORS


def rows_of(item_table: Tensor, category_table: Tensor, item_ids: Tensor, category_ids: Tensor) -> Tensor:
    """[item ; category] [n, D] of ids [n]."""
    return torch.cat([item_table.index_select(0, item_ids), category_table.index_select(0, category_ids)], dim=1)


def _shape_only(gathered: Gathered) -> Tensor:
    """Keys [N, D] of the right dtype and device without memory: one element seen N·D times."""
    table = gathered.item_table
    return table.new_zeros(()).expand(gathered.item_ids.shape[0], table.shape[1] + gathered.category_table.shape[1])


def _tensors(args: Sequence[Any], backend: str) -> UnitTensors:
    gathered = Gathered(*args[:4])
    query, starts, ends, weights, biases, alphas, means, rstds = args[4:_COUNT]
    torch_backend = backend == "torch"
    return UnitTensors(
        query, rows_of(*gathered) if torch_backend else _shape_only(gathered), starts, ends, None,
        weights, biases, alphas, means, rstds, None if torch_backend else gathered,
    )  # fmt: skip


def _statistics(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer, rest = args[_COUNT], args[_COUNT + 1 :]
    tensors = _tensors(args, rest[-1])
    if rest[-1] == "torch":
        return torch_impl.statistics(unit._config(tensors, rest), tensors, layer)
    from ..local_activation import universal

    return universal.statistics(unit._config(tensors, rest), tensors, layer)


def _statistics_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    table, width = args[0], args[7][args[_COUNT]].shape[0]
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    return (
        table.new_empty((), dtype=torch.float64),
        table.new_empty(width, dtype=dtype),
        table.new_empty(width, dtype=dtype),
    )


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return_weights, rest = args[_COUNT], args[_COUNT + 1 :]
    tensors = _tensors(args, rest[-1])
    config = unit._config(tensors, rest)
    if rest[-1] == "torch":
        outputs = torch_impl.forward(config, tensors, return_weights=return_weights)
    else:
        from ..local_activation import universal

        outputs = universal.forward(config, tensors, return_weights=return_weights)
    return unit._present(outputs, tensors.query)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, return_weights, rest = args[4], args[_COUNT], args[_COUNT + 1 :]
    softmax, candidates = rest[2], rest[4]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(query.shape),
        query.new_empty(args[2].shape[0] * candidates if return_weights else 0),
        query.new_empty(query.shape[0], dtype=wide) if softmax else query.new_empty(0),
    )


def _backward(*args: Any) -> list[Tensor]:
    grad_pooled, grad_weights, pooled, weights, log_normaliser, inv_count = args[:6]
    rest = args[6 + _COUNT :]
    tensors = _tensors(args[6:], rest[-1])
    config, saved = unit._config(tensors, rest), UnitOutputs(pooled, weights, log_normaliser)
    if rest[-1] == "torch":
        grads = torch_impl.backward(config, tensors, saved, grad_pooled, grad_weights, inv_count)
    else:
        from ..local_activation import universal_backward

        grads = universal_backward.backward(config, tensors, saved, grad_pooled, grad_weights, inv_count)
    flat = [grads.query, grads.keys, *grads.weights, *grads.biases, *grads.alphas]
    return [g for g in flat if g is not None]


def _backward_fake(*args: Any) -> list[Tensor]:
    item_table, category_table, item_ids, _, query, _, _, weights, biases, alphas = args[6:16]
    keys = query.new_empty(item_ids.shape[0], item_table.shape[1] + category_table.shape[1])
    flat = [query, keys, *weights, *biases, *alphas]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in flat if t is not None]


_EVERYWHERE = "CompositeExplicitAutograd"
statistics_op = define(
    f"gathered_activation_statistics({_TENSORS}, int layer, {unit._CONFIG}) -> (Tensor, Tensor, Tensor)",
    fake=_statistics_fake,
    impls={_EVERYWHERE: unit._exactly(_statistics)},
)
forward_op = define(
    f"gathered_activation_forward({_TENSORS}, bool return_weights, {unit._CONFIG}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    impls={_EVERYWHERE: unit._exactly(_forward)},
)
backward_op = define(
    "gathered_activation_backward(Tensor grad_pooled, Tensor? grad_weights, Tensor pooled, Tensor? attention, "
    f"Tensor? log_normaliser, Tensor? inv_count, {_TENSORS}, {unit._CONFIG}) -> Tensor[]",
    fake=_backward_fake,
    impls={_EVERYWHERE: unit._exactly(_backward)},
)


class Ids(NamedTuple):
    """Behaviours key_item, key_category [N]; candidates query_item, query_category [Q]; all contiguous."""

    key_item: Tensor
    key_category: Tensor
    query_item: Tensor
    query_category: Tensor


class GatheredActivationFunction(torch.autograd.Function):
    """The unit over ids; see ``gathered_activation`` for users.

    ``apply(call, ids, item_table [V, d], category_table [K, d'], starts [S], ends [S], running, *parameters)``, the rest as
    in ``LocalActivationFunction``. Gradients of the tables are sparse and not coalesced: one row for every occurrence, those
    of the behaviours first, then those of the candidates.
    """

    @staticmethod
    def forward(
        ctx: Any, call: unit.Call, ids: Ids, item_table: Tensor, category_table: Tensor, starts: Tensor, ends: Tensor,
        running: tuple[Tensor, ...], *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        depth = len(call.has_bias) - 1
        weights, biases, alphas = _unpack(call, parameters)
        query = rows_of(item_table, category_table, ids.query_item, ids.query_category)
        config = (
            call.interaction, call.activation, call.softmax, call.scale, call.candidates, 0, call.precision, call.backend
        )  # fmt: skip
        means: list[Tensor] = []
        rstds: list[Tensor] = []
        arguments = (
            item_table, category_table, ids.key_item, ids.key_category, query, starts, ends,
            weights, biases, alphas, means, rstds,
        )  # fmt: skip
        eager = is_eager(item_table, category_table, *parameters)
        found: list[Used] = []
        if call.activation == "dice":
            wide = torch.float64 if query.dtype == torch.float64 else torch.float32
            for layer, eps in enumerate(call.eps):
                mean, var = running[2 * layer : 2 * layer + 2]
                if call.training:
                    moments = Moments(*run(statistics_op, eager, *arguments, layer, *config))
                    found.append(used(moments, mean, var, eps))
                    mean, rstd = found[-1].used_mean, found[-1].rstd
                else:
                    mean, rstd = mean.to(wide), torch.rsqrt(var.to(wide) + eps)
                means.append(mean)
                rstds.append(rstd)
        pooled, attention, log_normaliser = run(forward_op, eager, *arguments, call.return_weights, *config)
        inv_count = found[-1].inverse if found else None
        ctx.call, ctx.config, ctx.depth, ctx.num_statistics = call, config, depth, len(means)
        ctx.save_for_backward(
            item_table, category_table, starts, ends, *ids, pooled, attention, log_normaliser, inv_count,
            *means, *rstds, *parameters,
        )  # fmt: skip
        of_layers = [tensor for each in found for tensor in each[:3]]
        ctx.mark_non_differentiable(*of_layers)
        ctx.set_materialize_grads(False)
        return (pooled, attention, *of_layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: Tensor | None, grad_attention: Tensor | None, *_: Any) -> tuple[Any, ...]:
        call, n = ctx.call, ctx.num_statistics
        saved = ctx.saved_tensors
        item_table, category_table, starts, ends = saved[:4]
        ids = Ids(*saved[4:8])
        pooled, attention, log_normaliser, inv_count = saved[8:12]
        means, rstds, parameters = list(saved[12 : 12 + n]), list(saved[12 + n : 12 + 2 * n]), saved[12 + 2 * n :]
        if grad_pooled is None and grad_attention is None:
            return (None,) * (7 + len(parameters))
        weights, biases, alphas = _unpack(call, parameters)
        # Gathered again: Q rows are cheaper to read twice than to hold from forward to backward.
        query = rows_of(item_table, category_table, ids.query_item, ids.query_category)
        if grad_pooled is None:
            grad_pooled = torch.zeros_like(pooled)
        of_query, of_keys, *grads = run(
            backward_op, is_eager(grad_pooled, item_table, category_table, *parameters), grad_pooled,
            grad_attention if call.return_weights else None, pooled, attention if call.return_weights else None,
            log_normaliser if call.softmax else None, inv_count,
            item_table, category_table, ids.key_item, ids.key_category, query, starts, ends,
            weights, biases, alphas, means, rstds, *ctx.config,
        )  # fmt: skip
        width = item_table.shape[1]
        of_tables: list[Tensor | None] = []
        for needed, table, key_ids, query_ids, columns in (
            (ctx.needs_input_grad[2], item_table, ids.key_item, ids.query_item, slice(None, width)),
            (ctx.needs_input_grad[3], category_table, ids.key_category, ids.query_category, slice(width, None)),
        ):
            if not needed:
                of_tables.append(None)
                continue
            index = torch.cat([key_ids, query_ids]).long().unsqueeze(0)
            values = torch.cat([of_keys[:, columns], of_query[:, columns]])
            of_tables.append(torch.sparse_coo_tensor(index, values, table.shape, check_invariants=False))
        return (None, None, *of_tables, None, None, None, *grads)


def _unpack(
    call: unit.Call, parameters: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """(weights, biases, alphas) of the flat ``parameters``."""
    depth, present = len(call.has_bias) - 1, sum(call.has_bias)
    given = iter(parameters[depth + 1 : depth + 1 + present])
    biases = [next(given) if has else None for has in call.has_bias]
    alphas: list[Tensor | None] = list(parameters[depth + 1 + present :]) or [None] * depth
    return list(parameters[: depth + 1]), biases, alphas
