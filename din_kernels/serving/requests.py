"""What is scored: a visitor with behaviours, and candidates for them; many of both in one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Ids: TypeAlias = "Sequence[int] | Tensor"


class Visitor(NamedTuple):
    """history_item, history_category [T]: ids of the behaviours, T may be 0; profile [F]: ids of the fixed features."""

    history_item: Ids
    history_category: Ids
    profile: Ids = ()


class Candidates(NamedTuple):
    """item, category [C]: ids of what is to be scored, at least one."""

    item: Ids
    category: Ids


class Request(NamedTuple):
    """A checked request; int64 tensors on the CPU: history_item, history_category [T], profile [F], item, category [C]."""

    history_item: Tensor
    history_category: Tensor
    profile: Tensor
    item: Tensor
    category: Tensor


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes of the id spaces and of a request."""

    items: int
    categories: int
    profile: tuple[int, ...]
    max_behaviours: int
    max_candidates: int

    def check(self, visitor: Visitor, candidates: Candidates) -> Request:
        """The request as tensors. Raises ``TypeError`` (not integers), ``ValueError`` (lengths) or ``IndexError`` (an id that
        the model does not have); the message names the field."""
        history_item = _ids("history_item", visitor.history_item, self.items)
        history_category = _ids("history_category", visitor.history_category, self.categories)
        item = _ids("item", candidates.item, self.items)
        category = _ids("category", candidates.category, self.categories)
        for name, ids, other, other_ids in (
            ("history_category", history_category, "history_item", history_item),
            ("category", category, "item", item),
        ):
            if ids.shape != other_ids.shape:
                raise ValueError(f"{name} must be as long as {other}, {other_ids.numel()}, got {ids.numel()}")
        if history_item.numel() > self.max_behaviours:
            raise ValueError(
                f"at most max_behaviours = {self.max_behaviours} behaviours, got {history_item.numel()}: send the latest"
            )
        if not 1 <= item.numel() <= self.max_candidates:
            raise ValueError(f"between 1 and max_candidates = {self.max_candidates} candidates, got {item.numel()}")
        profile = _ids("profile", visitor.profile, None)
        if profile.numel() != len(self.profile):
            raise ValueError(f"profile must hold {len(self.profile)} ids, one a field, got {profile.numel()}")
        for field, (value, size) in enumerate(zip(profile.tolist(), self.profile, strict=True)):
            if not 0 <= value < size:
                raise IndexError(f"profile[{field}] must lie in [0, {size}), got {value}")
        return Request(history_item, history_category, profile, item, category)


def _ids(name: str, values: Ids, size: int | None) -> Tensor:
    """[n] int64 on the CPU, each in [0, size)."""
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {values.dtype}")
        ids = values.detach().to("cpu", torch.int64)
    else:
        array = np.asarray(values)
        if array.size == 0:
            array = array.astype(np.int64)  # an empty list has no type of its own
        if array.dtype.kind == "O":
            raise IndexError(f"{name} holds something that is no id, or numbers beyond 64 bits")
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integers, got {array.dtype}")
        ids = torch.from_numpy(array.astype(np.int64))
    if ids.dim() != 1:
        raise ValueError(f"{name} must be a flat list, got shape {tuple(ids.shape)}")
    if size is not None and ids.numel():
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= size:
            raise IndexError(f"{name} ids must lie in [0, {size}), got {low} .. {high}")
    return ids
