"""``local_activation``: the validated public call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ... import _backend, _checks
from ..._library import is_eager
from .dice_statistics import Moments, launch_update_running, update_running
from .function import Call, LocalActivationFunction, RunningStatistics, autocast_enabled
from .layout import check_no_nan, to_lists
from .problem import ACTIVATIONS, INTERACTIONS


def first_layer_width(embedding_dim: int, interaction: str) -> int:
    """Input columns of the first linear layer: D·(D + 2) for "outer", 4·D for "product"."""
    return embedding_dim * (embedding_dim + 2) if interaction == "outer" else 4 * embedding_dim


def _check_parameters(
    query: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], alphas: Sequence[Tensor] | None,
    running: Sequence[RunningStatistics] | None, interaction: str, activation: str,
) -> None:  # fmt: skip
    if interaction not in INTERACTIONS:
        raise ValueError(f"interaction must be one of {', '.join(INTERACTIONS)}, got {interaction!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if len(weights) < 2:
        raise ValueError(
            f"weights must hold at least one hidden layer and the output layer, got {len(weights)} tensor(s)"
        )
    if len(biases) != len(weights):
        raise ValueError(f"biases must have one entry (or None) per weight: {len(weights)}, got {len(biases)}")
    columns = first_layer_width(query.shape[-1], interaction)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rows = 1 if i == len(weights) - 1 else None
        _checks.check_tensor(f"weights[{i}]", weight, shape=(rows, columns), dtypes=(query.dtype,), device=query.device)
        columns = weight.shape[0]
        if columns == 0:
            raise ValueError(f"weights[{i}] has no output columns: every hidden layer needs a width of at least 1")
        if bias is not None:
            _checks.check_tensor(f"biases[{i}]", bias, shape=(columns,), dtypes=(query.dtype,), device=query.device)
    widths = [w.shape[0] for w in weights[:-1]]
    wants_alpha = activation in ("dice", "prelu")
    if wants_alpha and (alphas is None or len(alphas) != len(widths)):
        raise ValueError(f"activation {activation!r} needs alphas, one tensor per hidden layer ({len(widths)})")
    for i, (alpha, width) in enumerate(zip(alphas or (), widths, strict=False)):
        _checks.check_tensor(f"alphas[{i}]", alpha, device=query.device, dtypes=_checks.FLOAT_DTYPES)
        if alpha.numel() not in ((width,) if activation == "dice" else (1, width)):
            raise ValueError(f"alphas[{i}] must have {width} elements{'' if activation == 'dice' else ' or one'}, "
                             f"got shape {tuple(alpha.shape)}")  # fmt: skip
    if activation == "dice":
        if running is None or len(running) != len(widths):
            raise ValueError(f"activation 'dice' needs running, one RunningStatistics per hidden layer ({len(widths)})")
        for i, (state, width) in enumerate(zip(running, widths, strict=True)):
            for name, value in (("mean", state.mean), ("var", state.var)):
                _checks.check_tensor(f"running[{i}].{name}", value, shape=(width,), device=query.device)
            if state.momentum is None and state.num_batches_tracked is None:
                raise ValueError(
                    f"running[{i}].momentum is None (average over all batches), so it needs num_batches_tracked"
                )


def update_all(running: Sequence[RunningStatistics], moments: Sequence[Tensor], backend: str) -> None:
    """One update of each layer's running averages in place; ``moments``: (rows, mean, m2) of every layer, flat."""
    for layer, state in enumerate(running):
        found = Moments(*moments[3 * layer : 3 * layer + 3])
        buffers = (state.mean, state.var)
        update = update_running
        if backend == "triton" and is_eager(*buffers) and state.mean.is_contiguous() and state.var.is_contiguous():
            update = launch_update_running
        update(found, *buffers, state.num_batches_tracked, state.momentum)


def _precision(query: Tensor) -> str:
    if query.dtype != torch.float32 or query.device.type != "cuda":
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@overload
def local_activation(
    query: Tensor, keys: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor: ...
@overload
def local_activation(
    query: Tensor, keys: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *,
    lengths: Tensor | None = ..., offsets: Tensor | None = ..., mask: Tensor | None = ..., interaction: str = ...,
    activation: str = ..., alphas: Sequence[Tensor] | None = ..., running: Sequence[RunningStatistics] | None = ...,
    training: bool = ..., softmax: bool = ..., scale: float | None = ..., return_weights: bool = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def local_activation(
    query: Tensor,
    keys: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
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
    """Pool each user's behaviours with weights from a small network: ``u = Σ_j a(e_j, v) e_j`` (paper eq. 3).

    Args:
        query: candidates v, [B, D]; or [B, C, D] for C candidates that share sample b's behaviours.
        keys: behaviours e. [N, D] with ``offsets``; [B, T, D] with ``lengths``, ``mask`` or neither (all real); or a
            ``torch.nested`` jagged tensor. Same floating dtype as ``query``. Padding may hold anything.
        weights: of the linear layers, [H1, F], …, [1, H_L]; F = D·(D + 2) for "outer" with columns
            [key, vec(key ⊗ query) (key index slow), query], F = 4·D for "product" with columns
            [query, key, query − key, query ∘ key].
        biases: [out] or None per linear layer.
        lengths: [B] int32 or int64, 0 ≤ length ≤ T.
        offsets: [B + 1] int32 or int64, from 0 to N, never decreasing.
        mask: [B, T] bool, any pattern, True = real behaviour.
        interaction: "outer" or "product".
        activation: "dice", "prelu", "sigmoid" or "relu", after every hidden layer.
        alphas: one per hidden layer for "dice" ([H]) and "prelu" ([H] or [1]).
        running: one ``RunningStatistics`` per hidden layer for "dice".
        training: Dice normalises with the statistics of this batch's real behaviours and updates ``running`` in place.
            With fewer than two real behaviours in the batch, ``running`` serves and stays as it is.
        softmax: normalise the scores over each list; ``scale`` multiplies them first (None = 1). Without softmax the
            score itself is the weight and ``scale`` has no effect.
        return_weights: also return the weights a.
        backend: None, "triton" or "torch"; see ``din_kernels._backend``.

    Returns:
        pooled [B, D] ([B, C, D]), 0 for an empty list; with ``return_weights`` also the weights in the layout of the
        keys: [B, T] ([B, C, T]) with 0 at padding, [N] ([N, C]), or nested. Gradients flow through both, to query,
        keys, weights, biases and alphas, once (no double backward).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or offsets and lengths out of range
            (values are checked on CPU tensors, and on GPU tensors when ``DIN_KERNELS_DEBUG=1``).
        BackendUnavailable: an explicit backend that cannot serve here.

    Autocast: query, keys, weights and biases are cast to its dtype, as for ``torch.nn.functional.linear``, and the result
    has that dtype; slopes, statistics and every sum stay fp32, and autocast is off inside. float64 is left alone.
    """
    _checks.check_tensor("query", query, ndim=(2, 3), dtypes=_checks.FLOAT_DTYPES, layout_hint=" ([B, D] or [B, C, D])")
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys must be a torch.Tensor, got {type(keys).__name__}")
    if query.dtype != torch.float64 and autocast_enabled(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, keys = query.to(dtype), keys.to(dtype)
        weights = [w.to(dtype) for w in weights]
        biases = [None if b is None else b.to(dtype) for b in biases]
    _check_parameters(query, weights, biases, alphas, running, interaction, activation)
    lists = to_lists(query, keys, embedding_dim=query.shape[-1], lengths=lengths, offsets=offsets, mask=mask)
    served_by = choose_backend(backend, lists.keys, [w.shape[0] for w in weights[:-1]])
    if _backend.debug_enabled() and _checks.values_readable(query):
        check_no_nan(lists)
    call = Call(
        interaction=interaction,
        activation=activation,
        softmax=softmax,
        scale=1.0 if scale is None else float(scale),
        candidates=lists.candidates,
        padded_length=lists.padded_length,
        precision=_precision(query),
        backend=served_by,
        return_weights=return_weights,
        training=training and activation == "dice",
        eps=tuple(state.eps for state in running or ()),
        has_bias=tuple(b is not None for b in biases),
    )
    statistics = tuple(t for state in running or () for t in (state.mean, state.var)) if activation == "dice" else ()
    pooled, attention, *moments = LocalActivationFunction.apply(
        call, lists.query, lists.keys, lists.starts, lists.ends, lists.row_mask, statistics,
        *weights, *[b for b in biases if b is not None], *(alphas or ()),
    )  # fmt: skip
    if moments:
        assert running is not None
        update_all(running, moments, served_by)
    pooled = lists.shape_pooled(pooled)
    return (pooled, lists.shape_weights(attention)) if return_weights else pooled


def choose_backend(backend: str | None, keys: Tensor, hidden_units: Sequence[int]) -> str:
    """The backend for this call: an explicit "triton" that cannot serve raises, an automatic one falls back, logged once."""
    served_by = _backend.resolve(backend, keys.device)
    if served_by == "torch":
        return served_by
    from .limits import why_unsupported

    reason = why_unsupported(keys.dtype, keys.shape[1], hidden_units)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise _backend.BackendUnavailable(f"backend='triton' cannot serve this call: {reason}; use backend='torch'")
    _backend.log_once(f"local_activation: {reason}; the unfused torch backend serves it")
    return "torch"
