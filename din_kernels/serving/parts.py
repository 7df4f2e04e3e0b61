"""What a scorer needs of a trained Deep Interest Network, whoever wrote the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class DinParts:
    """The pieces of ``logit = MLP([profile, v, u, v ∘ u?])`` with ``u = unit(v, behaviours)`` and v = [item ; category].

    item, category  tables [V, d] and [K, d']; an item's row is the concatenation of both, D = d + d' wide
    profile         tables of the visitor's fixed features, one a field; may be empty
    unit            a local activation unit (``reference.LocalActivationUnit``, ``din_kernels.LocalActivationUnit``):
                    ``.linears``, ``.activations``, ``.interaction``, ``.softmax``, ``.scale``
    linears, activations  the MLP on top: hidden layers, then the output layer to 1
    cross           whether the MLP is also fed v ∘ u
    """

    item: Tensor
    category: Tensor
    profile: tuple[Tensor, ...]
    unit: nn.Module
    linears: Sequence[nn.Linear]
    activations: Sequence[nn.Module]
    cross: bool = False

    def __post_init__(self) -> None:
        dim = self.item.shape[1] + self.category.shape[1]
        if getattr(self.unit, "embedding_dim", dim) != dim:
            raise ValueError(
                f"the unit takes embeddings of {self.unit.embedding_dim}, item and category rows have {dim} together"
            )
        columns = sum(table.shape[1] for table in self.profile) + (3 if self.cross else 2) * dim
        if self.linears[0].in_features != columns:
            raise ValueError(
                f"the MLP takes {self.linears[0].in_features} inputs, but profile, candidate and pooled behaviours "
                f"{'and their product ' if self.cross else ''}have {columns}"
            )

    @staticmethod
    def of(model: Any) -> DinParts:
        """The parts of a ``reference.models.DIN``, fused or not, or of any model with the same attribute names."""
        if isinstance(model, DinParts):
            return model
        try:
            return DinParts(
                item=model.items.item.weight.detach(),
                category=model.items.category.weight.detach(),
                profile=tuple(table.weight.detach() for table in model.profile.tables),
                unit=model.unit,
                linears=list(model.mlp.linears),
                activations=list(model.mlp.activations),
                cross=bool(model.config.cross),
            )
        except AttributeError as error:
            raise TypeError(
                f"{type(model).__name__} is not built like reference.models.DIN ({error}): "
                "say what its parts are with din_kernels.serving.DinParts(...)"
            ) from error

    @property
    def dim(self) -> int:
        return self.item.shape[1] + self.category.shape[1]
