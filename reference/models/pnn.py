"""Product-based neural network (Qu et al. 2016, arXiv 1611.00144), with inner products (IPNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import Batch
from .common import MLP, ClickModel, ItemEmbedding, ModelConfig, ProfileEmbedding, Schema, fields_of, pool


class PNN(ClickModel):
    """BaseModel with a product layer: the MLP reads the F fields' embeddings and their F(F − 1)/2 inner products.

    Fields, each ``field_dim`` wide: the profile's, the candidate's item and category, the pooled behaviours' item and
    category; F = profile fields + 4. With pooled behaviours Σ_j e_j the product with the candidate is Σ_j ⟨e_j, v⟩: the
    candidate does meet the behaviours, but each with a weight that is fixed by the embeddings.

    Parameters: BaseModel's, + F(F − 1)/2 · (width of the first hidden layer).
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.items = ItemEmbedding(schema, config)
        self.profile = ProfileEmbedding(schema, config)
        fields = len(self.profile.tables) + 4
        self.mlp = MLP(fields * config.field_dim + fields * (fields - 1) // 2, config)

    def forward(self, batch: Batch) -> Tensor:
        candidate = self.items(batch.item, batch.category)
        behaviours = self.items(batch.history_item, batch.history_category)
        pooled = pool(behaviours, batch.offsets, self.config.pooling)
        fields = fields_of(self.profile(batch.profile), candidate, pooled, self.config.field_dim)  # [B, F, d]
        first, second = torch.triu_indices(fields.shape[1], fields.shape[1], offset=1, device=fields.device)
        products = torch.bmm(fields, fields.transpose(1, 2))[:, first, second]  # [B, F(F − 1)/2]
        return self.mlp(torch.cat([fields.flatten(1), products], dim=-1))
