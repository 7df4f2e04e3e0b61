"""Wide & Deep (Cheng et al. 2016, arXiv 1606.07792) as the DIN paper uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Batch
from .common import ModelConfig, Schema, sum_pool
from .din import BaseModel

_ODD = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio (Knuth's multiplicative hashing), as a signed int64


def cross_ids(first: Tensor, second: Tensor, size: int, second_size: int, buckets: int) -> Tensor:
    """A row in [0, buckets) for each pair of ids [N]: exact if the size·second_size pairs fit, hashed otherwise.

    Hashing is multiplicative: the top bits of pair·odd mod 2^64, so ``buckets`` must be a power of two.
    """
    pair = first * second_size + second
    if size * second_size <= buckets:
        return pair
    bits = buckets.bit_length() - 1
    return (pair * _ODD >> (64 - bits)) & (buckets - 1)  # >> keeps the sign: mask it away


class WideDeep(BaseModel):
    """BaseModel plus a wide part: one weight for each cross product of a behaviour and the candidate.

    logit = MLP(…) + Σ_j (w_item[behaviour_j × candidate] + w_category[category_j × candidate's category]): it remembers
    which pairs go together, and generalises to no pair it has not seen (paper section 5.2: "we follow the practice to
    take cross-product of user behaviors and candidates as wide inputs"). Weights start at 0; pairs beyond
    ``config.wide_buckets`` share rows by hashing.

    Parameters: BaseModel's, + min(items², buckets) + min(categories², buckets).
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__(schema, config, pooling=config.pooling)
        self.sizes = (schema.num_items, schema.num_categories)
        self.wide = nn.ModuleList([nn.Embedding(min(size * size, config.wide_buckets), 1) for size in self.sizes])
        for table in self.wide.parameters():
            nn.init.zeros_(table)

    def forward(self, batch: Batch) -> Tensor:
        lengths = batch.offsets[1:] - batch.offsets[:-1]
        sample = torch.repeat_interleave(lengths, output_size=batch.history_item.numel())
        pairs = ((batch.history_item, batch.item), (batch.history_category, batch.category))
        wide = torch.zeros((batch.history_item.numel(), 1), device=sample.device)
        for table, size, (behaviour, candidate) in zip(self.wide, self.sizes, pairs, strict=True):
            wide = wide + table(cross_ids(behaviour, candidate[sample], size, size, self.config.wide_buckets))
        return super().forward(batch) + sum_pool(wide, batch.offsets).squeeze(-1)
