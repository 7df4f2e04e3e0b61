"""The regularizers of the paper's Table 4 as hooks of a training step.

Penalties act on the item and category tables, on the rows present in the batch, each row once (α_mj of eq. 5):
``λ/2 Σ_j α_mj c_j ‖w_j‖²`` with c_j = 1/n_j (MBA, eq. 6-7; n_j: train samples that hold id j), 1 (l2), or the number of
occurrences in the batch (DiFacto). Dropout and filter change ids instead: item id 0 is the shared "unknown" row.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from .data import Batch, ClickData
from .models.common import ItemEmbedding
from .options import Options

_CHUNK = 200_000  # samples whose (sample, id) pairs are counted at a time


class Regularizer:
    """Nothing: the base of the others. ``batch`` sees every batch, ``penalty`` (added to the loss) training ones."""

    def batch(self, batch: Batch, *, training: bool) -> Batch:
        return batch

    def penalty(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return None


class RowPenalty(Regularizer):
    """``λ/2 Σ c_j ‖w_j‖²`` over the rows in the batch.

    coefficients   (item, category) float32 tensors, or None: c_j is the number of occurrences in the batch
    occurrences    (item, category) n_j where the coefficients are 1/n_j: for ``fused_tables``
    in_update      the update of the tables applies the penalty (``fused_tables``), so the loss does without
    """

    def __init__(
        self,
        reg_lambda: float,
        coefficients: tuple[Tensor, Tensor] | None,
        occurrences: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.reg_lambda, self.coefficients, self.occurrences = reg_lambda, coefficients, occurrences
        self.in_update = False

    def penalty(self, model: nn.Module, batch: Batch) -> Tensor | None:
        if self.in_update:
            return None
        items = cast(ItemEmbedding, model.items)
        tables = (
            (items.item, batch.item, batch.history_item),
            (items.category, batch.category, batch.history_category),
        )
        total = torch.zeros((), device=batch.item.device)
        for place, (table, candidate, behaviours) in enumerate(tables):
            rows, counts = torch.unique(torch.cat([candidate, behaviours]), return_counts=True)
            if self.coefficients is None:
                weight = counts.to(table.weight.dtype)
            else:
                weight = self.coefficients[place].to(rows.device)[rows]
            total = total + (weight * table.weight[rows].square().sum(-1)).sum()
        return 0.5 * self.reg_lambda * total


class IdDropout(Regularizer):
    """In training every behaviour loses its item id with probability ``p`` (it keeps its category)."""

    def __init__(self, p: float) -> None:
        self.p = p

    def batch(self, batch: Batch, *, training: bool) -> Batch:
        if not training:
            return batch
        dropped = torch.rand(batch.history_item.shape).to(batch.history_item.device) < self.p
        return dataclasses.replace(batch, history_item=batch.history_item.masked_fill(dropped, 0))


class RareIdFilter(Regularizer):
    """Item ids held by fewer than ``min_count`` train samples share the unknown row, in training and evaluation."""

    def __init__(self, counts: Tensor, min_count: int) -> None:
        self.mapped = torch.where(counts >= min_count, torch.arange(counts.numel()), 0)

    def batch(self, batch: Batch, *, training: bool) -> Batch:
        self.mapped = self.mapped.to(batch.item.device)
        return dataclasses.replace(batch, item=self.mapped[batch.item], history_item=self.mapped[batch.history_item])


def sample_counts(data: ClickData) -> tuple[Tensor, Tensor]:
    """n_j: in how many train samples each item and each category occurs, as candidate or behaviour; int64.

    An id counts once in a sample however often the sample holds it.
    """
    counts = [np.zeros(data.num_items, dtype=np.int64), np.zeros(data.num_categories, dtype=np.int64)]
    for begin in range(0, len(data.train), _CHUNK):
        part = data.train.take(slice(begin, begin + _CHUNK))
        sample, where = part.positions()
        sample = np.concatenate([np.arange(len(part)), sample])
        item = np.concatenate([part.item, data.log_item[where]]).astype(np.int64)
        for ids, table in ((item, counts[0]), (data.item_category[item].astype(np.int64), counts[1])):
            pairs = np.unique(sample * len(table) + ids)
            table += np.bincount(pairs % len(table), minlength=len(table))
    return torch.from_numpy(counts[0]), torch.from_numpy(counts[1])


def make(options: Options, data: ClickData) -> Regularizer:
    """The regularizer of ``options``, with what it needs to know about ``data``."""
    kind = options.regularizer
    if kind == "none":
        return Regularizer()
    if kind == "dropout":
        return IdDropout(options.dropout)
    if kind == "filter":
        return RareIdFilter(sample_counts(data)[0], options.min_count)
    if kind == "difacto":
        return RowPenalty(options.reg_lambda, None)
    if kind == "mba":
        occurrences = sample_counts(data)
        item, category = (1.0 / n.clamp(min=1).float() for n in occurrences)
        return RowPenalty(options.reg_lambda, (item, category), occurrences)
    if kind == "l2":
        return RowPenalty(options.reg_lambda, (torch.ones(data.num_items), torch.ones(data.num_categories)))
    raise ValueError(f"--regularizer must be none, l2, mba, dropout, filter or difacto, got {kind!r}")
