"""From the caller's layouts to lists of rows, with every argument checked before anything runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _checks
from ...jagged import from_nested

_KEYS_HINT = " ([N, D] with offsets, or [B, T, D] with lengths or mask)"


class Lists(NamedTuple):
    """query [Q, D]; keys [R, D]; starts, ends [S]; row_mask [R] or None; and how to shape the results back."""

    query: Tensor
    keys: Tensor
    starts: Tensor
    ends: Tensor
    row_mask: Tensor | None
    candidates: int
    padded_length: int
    pooled_shape: tuple[int, ...]
    weights_shape: tuple[int, ...]
    nested_offsets: Tensor | None

    def shape_pooled(self, pooled: Tensor) -> Tensor:
        """[B, D], or [B, C, D]."""
        # Returned as it is where it has the shape: FSDP warns of modules that return views.
        return pooled if pooled.shape == self.pooled_shape else pooled.view(self.pooled_shape)

    def shape_weights(self, weights: Tensor) -> Tensor:
        """[B, T] ([B, C, T]) for padded keys, [N] ([N, C]) for jagged ones, a nested tensor for nested ones."""
        weights = weights.view(self.weights_shape)
        if self.nested_offsets is not None:
            return torch.nested.nested_tensor_from_jagged(weights, self.nested_offsets)
        return weights


def _rows(keys: Tensor) -> Tensor:
    """Keys as rows [R, D] with unit stride along D, without a copy wherever the memory allows it."""
    if keys.stride(-1) != 1 and keys.shape[-1] > 1:
        keys = keys.contiguous()
    return keys.reshape(-1, keys.shape[-1]) if keys.dim() == 3 else keys


def check_no_nan(lists: Lists) -> None:
    """Debug mode: no NaN where it counts. Padding may hold anything, so only rows inside a list are looked at."""
    if bool(torch.isnan(lists.query).any()):
        raise ValueError("query holds NaN")
    border = torch.zeros(lists.keys.shape[0] + 1, dtype=torch.int64, device=lists.keys.device)
    border.index_add_(0, lists.starts.long(), torch.ones_like(border[: lists.starts.numel()]))
    border.index_add_(0, lists.ends.long(), -torch.ones_like(border[: lists.ends.numel()]))
    real = border.cumsum(0)[:-1] > 0
    if lists.row_mask is not None:
        real &= lists.row_mask
    bad = torch.isnan(lists.keys).any(1) & real
    if bool(bad.any()):
        raise ValueError(f"keys hold NaN in a real behaviour, row {int(bad.nonzero()[0, 0])} of keys.view(-1, D)")


def to_lists(
    query: Tensor,
    keys: Tensor,
    *,
    embedding_dim: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor | None,
) -> Lists:
    given = [name for name, value in (("lengths", lengths), ("offsets", offsets), ("mask", mask)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of lengths, offsets and mask, got {' and '.join(given)}")
    nested_offsets = None
    if isinstance(keys, Tensor) and keys.is_nested:
        if given:
            raise ValueError(f"a nested tensor carries its own lengths: leave out {given[0]}")
        keys, offsets = from_nested(keys)
        nested_offsets = offsets
    _checks.check_tensor("query", query, ndim=(2, 3), dtypes=_checks.FLOAT_DTYPES, layout_hint=" ([B, D] or [B, C, D])")
    _checks.check_tensor("keys", keys, ndim=2 if offsets is not None else 3, layout_hint=_KEYS_HINT)
    if query.shape[-1] != embedding_dim:
        raise ValueError(f"query must have embedding_dim = {embedding_dim} columns, got shape {tuple(query.shape)}")
    if keys.shape[-1] != embedding_dim:
        raise ValueError(f"keys must have embedding_dim = {embedding_dim} columns, got shape {tuple(keys.shape)}")
    _checks.check_tensor("keys", keys, dtypes=(query.dtype,), device=query.device)
    batch, many = query.shape[0], query.dim() == 3
    candidates = query.shape[1] if many else 1
    if many and candidates == 0:
        raise ValueError("query [B, C, D] must have at least one candidate, got C = 0")

    row_mask, padded_length = None, 0
    of_candidates = (candidates,) if many else ()
    if offsets is not None:
        _checks.check_tensor("offsets", offsets, shape=(batch + 1,), dtypes=_checks.INDEX_DTYPES, device=keys.device,
                             layout_hint=" (B + 1, with B the rows of query)")  # fmt: skip
        _checks.check_offsets(offsets, keys.shape[0])
        offsets = offsets.contiguous()  # kernels count in elements; a column of a table would be read as its rows
        starts, ends = offsets[:-1], offsets[1:]
        weights_shape: tuple[int, ...] = (keys.shape[0], *of_candidates)
    else:
        if keys.shape[0] != batch:
            raise ValueError(f"keys [B, T, D] must have the batch of query, {batch}, got shape {tuple(keys.shape)}")
        padded_length = keys.shape[1]
        weights_shape = (batch, *of_candidates, padded_length)
        starts = torch.arange(batch, device=keys.device) * padded_length
        ends = starts + padded_length
        if lengths is not None:
            if isinstance(lengths, Tensor) and lengths.shape[1:] == (1,):
                lengths = lengths.squeeze(1)  # several libraries keep a column
            _checks.check_tensor("lengths", lengths, shape=(batch,), dtypes=_checks.INDEX_DTYPES, device=keys.device)
            _checks.check_lengths(lengths, padded_length)
            ends = starts + lengths
        elif mask is not None:
            _checks.check_tensor("mask", mask, shape=(batch, padded_length), dtypes=(torch.bool,), device=keys.device,
                                 layout_hint=" (True = real behaviour; a float mask: mask != 0)")  # fmt: skip
            row_mask = mask.reshape(-1)
    return Lists(
        query.reshape(-1, embedding_dim) if many else query, _rows(keys), starts, ends, row_mask, candidates, padded_length,
        (batch, *of_candidates, embedding_dim), weights_shape, nested_offsets,
    )  # fmt: skip
