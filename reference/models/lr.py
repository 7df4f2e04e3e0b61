"""Logistic regression, and its linear terms for models that have a wide or first-order part."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data import Batch
from .common import ClickModel, ItemEmbedding, ModelConfig, ProfileEmbedding, Schema, sum_pool


class LinearTerms(nn.Module):
    """One weight per feature, summed: Σ_f w_f[profile_f] + w[candidate] + Σ_j w'[behaviour j] -> [B].

    The features are the one-hot and multi-hot ids of every other model: item and category of the candidate, item and
    category of every behaviour, profile fields. The layout is theirs too, as tables of width 2: column 0 holds an id's
    weight as candidate, column 1 its weight as behaviour. All weights start at 0: the terms alone are convex.

    Parameters: 2·(items + categories) + Σ_f profile_f.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.items = ItemEmbedding(schema, replace(config, field_dim=2))
        self.profile = ProfileEmbedding(schema, replace(config, field_dim=1))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, batch: Batch) -> Tensor:
        # [item as candidate, item as behaviour, category as candidate, category as behaviour]
        candidate = self.items(batch.item, batch.category)[:, [0, 2]].sum(-1)
        behaviours = self.items(batch.history_item, batch.history_category)[:, [1, 3]].sum(-1, keepdim=True)
        profile = self.profile(batch.profile).sum(-1)
        return profile + candidate + sum_pool(behaviours, batch.offsets).squeeze(-1)


class LR(ClickModel):
    """Logistic regression on the ids, without crosses: what the candidate and the user are worth on their own.

    Two candidates met with the same history differ by their own weights alone, so its GAUC is that of learnt popularity.
    Parameters: those of ``LinearTerms`` and the bias.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.linear = LinearTerms(schema, config)
        self.bias = nn.Parameter(torch.zeros(()))

    @property
    def items(self) -> ItemEmbedding:
        """The tables that regularizers act on."""
        return self.linear.items

    def forward(self, batch: Batch) -> Tensor:
        return self.linear(batch) + self.bias
