"""The penalty of the embedding tables inside their update: ``MBAEmbedding`` and ``SparseSGD`` in place of autograd.

``reference.regularizers.RowPenalty`` defines the numbers: a term of the loss whose gradient, like the loss', is as large as
the table. The sparse update steps the same way from the list of ids and their gradients, so it touches the rows of the
batch alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .models.common import ItemEmbedding
from .options import Options
from .regularizers import RowPenalty


def obstacle(options: Options) -> str | None:
    """Why the tables of a fused model cannot be updated this way with the same numbers; ``None`` if they can."""
    if options.regularizer == "difacto":
        # It does so once a sum of sparse gradients has more entries than the table has elements.
        return "DiFacto counts occurrences, which autograd merges when candidates and behaviours share a small table"
    if options.optimizer != "sgd":
        return "Adam moves rows that the batch does not hold too; the sparse update leaves them alone"
    if options.clip_norm:
        return "clipping needs the norm of the summed gradient"
    if options.compile:
        return "compiled models keep the tables they were compiled with"
    return None


class FusedTables:
    """While entered, the item and category tables of ``model`` are ``MBAEmbedding`` s on the same parameters.

    ``parameters``: the two tables, for an optimizer of ``din_kernels.optim``. Left, the model is as it was, its ``state_dict``
    keys included.
    """

    def __init__(self, model: nn.Module, penalty: RowPenalty) -> None:
        self.items = cast(ItemEmbedding, model.items)
        self.penalty = penalty

    def __enter__(self) -> FusedTables:
        from din_kernels import MBAEmbedding

        self.plain = (self.items.item, self.items.category)
        counts = self.penalty.occurrences or (None, None)
        fused = [MBAEmbedding.from_embedding(table, n) for table, n in zip(self.plain, counts, strict=True)]
        for table in fused:
            table.counting = False  # n_j is that of the train part, or not needed
            n = table.occurrences
            del table.occurrences
            table.register_buffer("occurrences", n, persistent=False)  # checkpoints are those of an unfused model
        self.items.item, self.items.category = fused
        self.penalty.in_update = True
        return self

    def __exit__(self, *_: object) -> None:
        self.items.item, self.items.category = self.plain
        self.penalty.in_update = False

    @property
    def parameters(self) -> list[Tensor]:
        return [table.weight for table in self.plain]


class Optimizers:
    """Two optimizers of one model as one: what the training loop and its checkpoints use of an optimizer."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])


def optimizers(model: nn.Module, tables: FusedTables, options: Options) -> Optimizers:
    """SGD for everything but the two tables, the sparse update with the penalty of ``options`` for those."""
    from din_kernels.optim import SparseSGD

    own = {id(parameter) for parameter in tables.parameters}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    sparse = SparseSGD(tables.parameters, lr=options.lr, regularizer=options.regularizer, reg_lambda=options.reg_lambda)
    return Optimizers(*([torch.optim.SGD(rest, lr=options.lr)] if rest else []), sparse)
