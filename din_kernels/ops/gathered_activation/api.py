"""``gathered_activation``: the validated public call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _checks
from ..local_activation.api import _check_parameters, _precision, choose_backend, update_all
from ..local_activation.function import Call, RunningStatistics
from .function import GatheredActivationFunction, Ids


def _check_table_and_ids(name: str, table: Tensor, key_ids: Tensor, query_ids: Tensor, like: Tensor) -> None:
    _checks.check_tensor(f"{name}_table", table, ndim=2, dtypes=(like.dtype,), device=like.device)
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(f"{name}_table must have unit stride along its columns, got strides {table.stride()}")
    for kind, ids in (("key", key_ids), ("query", query_ids)):
        what = f"{kind}_{name}"
        _checks.check_tensor(what, ids, dtypes=_checks.INDEX_DTYPES, device=table.device)
        _checks.check_ids(ids, table.shape[0], name=what)
        if _checks.values_readable(ids) and ids.numel() and int(ids.min()) < 0:
            raise IndexError(f"{what} must not be negative, got {int(ids.min())}: leave unknown behaviours out")


def gathered_activation(
    query_item: Tensor,
    query_category: Tensor,
    key_item: Tensor,
    key_category: Tensor,
    item_table: Tensor,
    category_table: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    offsets: Tensor,
    interaction: str = "outer",
    activation: str = "dice",
    alphas: Sequence[Tensor] | None = None,
    running: Sequence[RunningStatistics] | None = None,
    training: bool = False,
    softmax: bool = False,
    scale: float | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``local_activation`` over ids: query and keys are rows [item ; category] of two tables, D = d + d' wide.

    On the Triton backend the kernels read the rows from the tables; keys [N, D] never exist. The torch backend gathers them.

    Args:
        query_item, query_category: ids of the candidates, [B], or [B, C] for C candidates that share a list.
        key_item, key_category: ids of the behaviours, [N] int32 or int64, list b being offsets[b] : offsets[b + 1].
        item_table, category_table: [V, d] and [K, d'], one dtype, columns contiguous.
        weights … backend: as in ``local_activation``.

    Returns:
        pooled [B, D] ([B, C, D]); with ``return_weights`` also the weights [N] ([N, C]).

    Gradients: those of the tables are sparse COO and not coalesced, a row for every occurrence of an id among behaviours and
    candidates, as ``din_kernels.optim`` takes them; the others are dense. Differentiable once.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong type, shape, dtype or device; offsets or ids out of range
            (values are checked on CPU tensors, and on GPU tensors when ``DIN_KERNELS_DEBUG=1``).
        BackendUnavailable: an explicit backend that cannot serve here.
    """
    _checks.check_tensor("item_table", item_table, ndim=2, dtypes=_checks.FLOAT_DTYPES)
    _check_table_and_ids("item", item_table, key_item, query_item, item_table)
    _check_table_and_ids("category", category_table, key_category, query_category, item_table)
    _checks.check_tensor("key_item", key_item, ndim=1)
    _checks.check_tensor("query_item", query_item, ndim=(1, 2), layout_hint=" ([B] or [B, C])")
    _checks.check_tensor("key_category", key_category, shape=tuple(key_item.shape))
    _checks.check_tensor("query_category", query_category, shape=tuple(query_item.shape))
    batch, many = query_item.shape[0], query_item.dim() == 2
    candidates = query_item.shape[1] if many else 1
    if many and candidates == 0:
        raise ValueError("query_item [B, C] must have at least one candidate, got C = 0")
    _checks.check_tensor("offsets", offsets, shape=(batch + 1,), dtypes=_checks.INDEX_DTYPES, device=item_table.device)
    _checks.check_offsets(offsets, key_item.shape[0])
    offsets = offsets.contiguous()
    dim = item_table.shape[1] + category_table.shape[1]
    like_keys = item_table.new_empty(()).expand(key_item.shape[0], dim)  # shape, dtype and device of what is not made
    _check_parameters(like_keys, weights, biases, alphas, running, interaction, activation)
    call = Call(
        interaction=interaction,
        activation=activation,
        softmax=softmax,
        scale=1.0 if scale is None else float(scale),
        candidates=candidates,
        padded_length=0,
        precision=_precision(like_keys),
        backend=choose_backend(backend, like_keys, [w.shape[0] for w in weights[:-1]]),
        return_weights=return_weights,
        training=training and activation == "dice",
        eps=tuple(state.eps for state in running or ()),
        has_bias=tuple(b is not None for b in biases),
    )
    ids = Ids(
        *(ids.contiguous() for ids in (key_item, key_category)),
        *(ids.reshape(-1) for ids in (query_item, query_category)),
    )
    statistics = tuple(t for state in running or () for t in (state.mean, state.var)) if activation == "dice" else ()
    pooled, attention, *moments = GatheredActivationFunction.apply(
        call, ids, item_table, category_table, offsets[:-1], offsets[1:], statistics,
        *weights, *[b for b in biases if b is not None], *(alphas or ()),
    )  # fmt: skip
    if moments:
        assert running is not None
        update_all(running, moments, call.backend)
    shape = (candidates,) if many else ()
    pooled = pooled.view(batch, *shape, dim)
    return (pooled, attention.view(key_item.shape[0], *shape)) if return_weights else pooled


__all__ = ["gathered_activation"]
