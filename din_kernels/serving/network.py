"""One visitor's candidates scored on the host: the visitor's behaviours are read, and worked on, once."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .folded import BilinearFirstLayer, FoldedLayers
from .parts import DinParts

# Pairs (candidate, behaviour) taken at once: a handful of [pairs, H1] arrays should stay in a core's cache.
CHUNK_PAIRS = 4096


def side_contracted(candidates: int, behaviours: int) -> bool:
    """Whether to contract the first layer with the behaviours rather than with the candidates: the fewer rows."""
    return behaviours <= candidates


class VisitorNetwork(nn.Module):
    """A DIN in evaluation for one visitor and C candidates; plain torch, immutable, safe to share between threads.

    forward(history_item [T], history_category [T], profile [F], item [C], category [C]) -> logits [C]

    T may be 0. ``chunked=False`` computes all pairs in one go: that is the form to export, as its graph does not depend on
    how many chunks there are.
    """

    def __init__(self, parts: DinParts, *, chunked: bool = True) -> None:
        super().__init__()
        unit = parts.unit
        self.chunked, self.cross = chunked, parts.cross
        self.softmax = bool(unit.softmax)
        self.scale = 1.0 if unit.scale is None else float(cast(float, unit.scale))
        self.fields = len(parts.profile)
        # The tables stay the model's own memory: they may be most of the machine.
        for name, table in (("item_table", parts.item), ("category_table", parts.category)):
            self.register_buffer(name, table, persistent=False)
        for field, table in enumerate(parts.profile):
            self.register_buffer(f"profile_table{field}", table, persistent=False)
        self.item_table: Tensor
        self.category_table: Tensor
        self.unit = FoldedLayers(list(cast(nn.ModuleList, unit.linears)), list(cast(nn.ModuleList, unit.activations)))  # type: ignore[arg-type]
        self.first = BilinearFirstLayer(
            cast(Tensor, self.unit.first_weight),
            cast(Tensor, self.unit.first_bias),
            parts.dim,
            cast(str, unit.interaction),
        )
        self.mlp = FoldedLayers(parts.linears, parts.activations)
        self.register_buffer("mlp_weight", cast(Tensor, self.mlp.first_weight).t().contiguous(), persistent=False)
        self.mlp_weight: Tensor
        self.dtype = self.mlp_weight.dtype

    def embed(self, item: Tensor, category: Tensor) -> Tensor:
        """ids [n] -> [item ; category] [n, D] in the compute dtype."""
        rows = (self.item_table.index_select(0, item), self.category_table.index_select(0, category))
        return torch.cat(rows, dim=1).to(self.dtype)

    def scores(self, candidates: Tensor, behaviours: Tensor) -> Tensor:
        """The unit's scores of all pairs [C, T] from v [C, D] and e [T, D]."""
        count, length = candidates.shape[0], behaviours.shape[0]
        if not self.chunked:
            matrix, offset = self.first.contract(behaviours, behaviours=True)
            return self.unit(torch.addmm(offset, candidates, matrix.t()).view(-1, self.first.width)).view(-1, length)
        contracted = side_contracted(count, length)
        held, moving = (behaviours, candidates) if contracted else (candidates, behaviours)
        matrix, offset = self.first.contract(held, behaviours=contracted)
        step = max(1, CHUNK_PAIRS // held.shape[0])
        # z1 of a chunk [rows, held, H1]: one product, whose columns are (row held, hidden unit).
        parts = [
            self.unit(torch.addmm(offset, rows, matrix.t()).view(-1, self.first.width)) for rows in moving.split(step)
        ]
        scores = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(moving.shape[0], held.shape[0])
        return scores if contracted else scores.t()

    def pool(self, candidates: Tensor, behaviours: Tensor) -> Tensor:
        """u [C, D] = Σ_j a(e_j, v) e_j."""
        weights = self.scores(candidates, behaviours)
        if self.softmax:
            weights = torch.softmax(weights * self.scale, dim=1)
        return weights @ behaviours

    def features(
        self, history_item: Tensor, history_category: Tensor, profile: Tensor, item: Tensor, category: Tensor
    ) -> Tensor:
        """The MLP's input [C, F]."""
        candidates = self.embed(item, category)
        if self.chunked and history_item.shape[0] == 0:
            pooled = torch.zeros_like(candidates)
        else:
            pooled = self.pool(candidates, self.embed(history_item, history_category))
        of_visitor = [
            getattr(self, f"profile_table{field}")
            .index_select(0, profile[field : field + 1])
            .to(self.dtype)
            .expand(item.shape[0], -1)
            for field in range(self.fields)
        ]
        return torch.cat([*of_visitor, candidates, pooled, *([candidates * pooled] if self.cross else [])], dim=1)

    def head(self, features: Tensor) -> Tensor:
        """[n, F] -> logits [n]."""
        return self.mlp(torch.addmm(cast(Tensor, self.mlp.first_bias), features, self.mlp_weight))

    def forward(
        self, history_item: Tensor, history_category: Tensor, profile: Tensor, item: Tensor, category: Tensor
    ) -> Tensor:
        return self.head(self.features(history_item, history_category, profile, item, category))
