"""One packed layout for behaviour lists of different lengths, and ways into and out of it.

``Jagged(values [N, …], offsets [B + 1])``: list b is ``values[offsets[b] : offsets[b + 1]]``. It is the layout of
``torch.nested`` jagged tensors, of TorchRec's ``JaggedTensor`` and of FBGEMM. Every converter is differentiable with
respect to the values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks


class Jagged(NamedTuple):
    """values [N, …]; offsets [B + 1] int32 or int64, from 0 to N, never decreasing."""

    values: Tensor
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        return offsets_to_lengths(self.offsets)


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """[B] -> [B + 1] in the same dtype."""
    _checks.check_tensor("lengths", lengths, ndim=1, dtypes=_checks.INDEX_DTYPES)
    offsets = torch.zeros(lengths.numel() + 1, dtype=lengths.dtype, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def offsets_to_lengths(offsets: Tensor) -> Tensor:
    """[B + 1] -> [B]."""
    _checks.check_tensor("offsets", offsets, ndim=1, dtypes=_checks.INDEX_DTYPES)
    return offsets[1:] - offsets[:-1]


def from_padded(values: Tensor, lengths: Tensor) -> Jagged:
    """Padded values [B, T, …] with lengths [B] (0 ≤ length ≤ T) -> Jagged. Reads the lengths on the host."""
    _checks.check_tensor("lengths", lengths, shape=(values.shape[0],), dtypes=_checks.INDEX_DTYPES)
    _checks.check_lengths(lengths, values.shape[1])
    mask = torch.arange(values.shape[1], device=values.device) < lengths.unsqueeze(1)
    return Jagged(values[mask], lengths_to_offsets(lengths))


def from_mask(values: Tensor, mask: Tensor) -> Jagged:
    """Padded values [B, T, …] with boolean mask [B, T], any pattern, True = real -> Jagged. Order is kept."""
    _checks.check_tensor("mask", mask, shape=tuple(values.shape[:2]), dtypes=(torch.bool,))
    return Jagged(values[mask], lengths_to_offsets(mask.sum(1)))


def from_nested(nested: Tensor) -> Jagged:
    """A ``torch.nested`` tensor of layout ``torch.jagged`` and shape [B, *, …] -> Jagged, without a copy."""
    if not nested.is_nested or nested.layout != torch.jagged:
        raise TypeError("expected a torch.nested tensor with layout=torch.jagged: torch.nested.as_nested_tensor(lists, "
                        "layout=torch.jagged)")  # fmt: skip
    inside: Any = nested  # the subclass's own methods, which Tensor's stubs do not know
    if getattr(inside, "_ragged_idx", 1) != 1:
        raise ValueError(f"only dimension 1 may be ragged, got ragged dimension {inside._ragged_idx}")
    if inside.lengths() is not None:
        raise ValueError(
            "nested tensors with holes (made by torch.nested.narrow) are not supported: call .contiguous()"
        )
    return Jagged(inside.values(), inside.offsets())


def from_jagged_tensor(jagged: Any) -> Jagged:
    """A TorchRec ``JaggedTensor`` (or one key of a ``KeyedJaggedTensor``) -> Jagged, without importing TorchRec."""
    for name in ("values", "offsets"):
        if not callable(getattr(jagged, name, None)):
            raise TypeError(
                f"expected a TorchRec JaggedTensor with .values() and .offsets(), got {type(jagged).__name__}"
            )
    if callable(getattr(jagged, "keys", None)):
        raise TypeError("a KeyedJaggedTensor holds several lists per sample: pick one, kjt['history']")
    return Jagged(jagged.values(), jagged.offsets())


def to_padded(jagged: Jagged, length: int | None = None, fill: float = 0.0) -> Tensor:
    """Jagged -> [B, T, …] filled up with ``fill``; T is the longest list (read on the host) unless ``length`` is given,
    in which case longer lists raise."""
    lengths = jagged.lengths
    longest = int(lengths.max()) if lengths.numel() else 0
    if length is None:
        length = longest
    elif longest > length:
        raise ValueError(f"length = {length} is shorter than the longest list, {longest}")
    batch = lengths.numel()
    mask = torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)
    padded = jagged.values.new_full((batch, length, *jagged.values.shape[1:]), fill)
    return padded.masked_scatter(mask.view(batch, length, *[1] * (jagged.values.dim() - 1)), jagged.values)


def to_nested(jagged: Jagged) -> Tensor:
    """Jagged -> ``torch.nested`` tensor of layout ``torch.jagged``, without a copy of the values."""
    return torch.nested.nested_tensor_from_jagged(jagged.values, jagged.offsets)
