"""How each regularizer of the paper's Table 4 enters a training step. Batches without behaviours are fine."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .data import Batch, ClickData
from .models.common import ItemEmbedding
from .options import Options


class Regularizer:
    """Hooks of a training step: ``batch`` may change the ids (dropout, filter), ``penalty`` adds to the loss."""

    def batch(self, batch: Batch) -> Batch:
        return batch

    def penalty(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return None


class L2(Regularizer):
    """λ/2 · ‖w_j‖² over the rows j of the item and category tables present in the batch, each once."""

    def __init__(self, reg_lambda: float) -> None:
        self.reg_lambda = reg_lambda

    def penalty(self, model: nn.Module, batch: Batch) -> Tensor:
        items = cast(ItemEmbedding, model.items)
        total = torch.zeros((), device=batch.item.device)
        for table, candidate, behaviours in (
            (items.item, batch.item, batch.history_item),
            (items.category, batch.category, batch.history_category),
        ):
            rows = torch.unique(torch.cat([candidate, behaviours]))
            total = total + table.weight[rows].square().sum()
        return 0.5 * self.reg_lambda * total


def make(options: Options, data: ClickData) -> Regularizer:
    if options.regularizer == "none":
        return Regularizer()
    if options.regularizer == "l2":
        return L2(options.reg_lambda)
    raise NotImplementedError(f"--regularizer {options.regularizer} is not wired into the trainer: use none or l2")
