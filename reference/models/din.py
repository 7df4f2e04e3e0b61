"""DIN and the paper's BaseModel."""

from __future__ import annotations

from torch import Tensor

from ..data import Batch
from .common import (
    MLP,
    ClickModel,
    ItemEmbedding,
    ModelConfig,
    ProfileEmbedding,
    Schema,
    join,
    make_unit,
    pool,
)


class BaseModel(ClickModel):
    """Embedding & MLP (paper section 4.2): the behaviours are summed (or averaged), whatever the candidate is.

    Parameters: tables field_dim·(items + categories + Σ profile fields), MLP of input width field_dim·(profile fields + 4).
    """

    def __init__(self, schema: Schema, config: ModelConfig, pooling: str = "sum") -> None:
        super().__init__()
        self.config, self.pooling = config, pooling
        self.items = ItemEmbedding(schema, config)
        self.profile = ProfileEmbedding(schema, config)
        self.mlp = MLP(self.profile.width + (3 if config.cross else 2) * self.items.width, config)

    def forward(self, batch: Batch) -> Tensor:
        candidate = self.items(batch.item, batch.category)
        behaviours = self.items(batch.history_item, batch.history_category)
        pooled = pool(behaviours, batch.offsets, self.pooling)
        return self.mlp(join(self.profile(batch.profile), candidate, pooled, self.config.cross))


class DIN(ClickModel):
    """Deep Interest Network (paper section 4.3): pooled = Σ_j a(e_j, v) e_j with the local activation unit a.

    Without softmax the intensity of the interests is kept: weights need not sum to 1.

    Parameters: BaseModel's, + the unit's: with D = 2·field_dim and one hidden layer of H, D(D + 2)·H ("outer") or 4D·H
    ("product") weights, H + 1 biases, H output weights, H for Dice's α (1 for PReLU).
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.items = ItemEmbedding(schema, config)
        self.profile = ProfileEmbedding(schema, config)
        self.unit = make_unit(self.items.width, config)
        self.mlp = MLP(self.profile.width + (3 if config.cross else 2) * self.items.width, config)

    def forward(self, batch: Batch) -> Tensor:
        candidate = self.items(batch.item, batch.category)
        behaviours = self.items(batch.history_item, batch.history_category)
        pooled = self.unit(candidate, behaviours, offsets=batch.offsets)
        return self.mlp(join(self.profile(batch.profile), candidate, pooled, self.config.cross))

    def activation_weights(self, batch: Batch) -> Tensor:
        """The weight of every behaviour for its sample's candidate, [N]."""
        candidate = self.items(batch.item, batch.category)
        behaviours = self.items(batch.history_item, batch.history_category)
        return self.unit(candidate, behaviours, offsets=batch.offsets, return_weights=True)[1]
