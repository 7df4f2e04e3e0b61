"""DeepFM (Guo et al. 2017, arXiv 1703.04247)."""

from __future__ import annotations

from torch import Tensor

from ..data import Batch
from .common import MLP, ClickModel, ItemEmbedding, ModelConfig, ProfileEmbedding, Schema, fields_of, pool
from .lr import LinearTerms


def pairwise_products(fields: Tensor) -> Tensor:
    """Σ_{f<g} ⟨x_f, x_g⟩ of fields [B, F, d] -> [B], as ½(‖Σ_f x_f‖² − Σ_f ‖x_f‖²): F·d products instead of F²·d."""
    return 0.5 * (fields.sum(1).square().sum(-1) - fields.square().sum((1, 2)))


class DeepFM(ClickModel):
    """A factorisation machine and an MLP on the same embeddings: logit = linear terms + FM + MLP.

    Fields are PNN's; the second order acts on fields, so behaviours meet the candidate after pooling. Unlike PNN every
    pair of fields counts the same, and goes to the logit past the MLP.

    Parameters: BaseModel's, + those of ``LinearTerms``.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.items = ItemEmbedding(schema, config)
        self.profile = ProfileEmbedding(schema, config)
        self.linear = LinearTerms(schema, config)
        self.mlp = MLP(self.profile.width + 2 * self.items.width, config)

    def forward(self, batch: Batch) -> Tensor:
        candidate = self.items(batch.item, batch.category)
        behaviours = self.items(batch.history_item, batch.history_category)
        pooled = pool(behaviours, batch.offsets, self.config.pooling)
        fields = fields_of(self.profile(batch.profile), candidate, pooled, self.config.field_dim)
        return self.linear(batch) + pairwise_products(fields) + self.mlp(fields.flatten(1))
