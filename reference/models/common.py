"""What all models share: sizes, embedding layout, pooling, the MLP on top, and the switch between fused and unfused."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .. import units
from ..data import Batch

POOLINGS = ("sum", "mean")


@dataclass(frozen=True)
class Schema:
    """Sizes of the id spaces a model is built for; row 0 of each is "unknown"."""

    num_items: int
    num_categories: int
    profile_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model.

    field_dim       width of each field's embedding; an item is [item ; category], so units see D = 2·field_dim
    unit_hidden     hidden layers of the local activation unit
    mlp_hidden      hidden layers of the MLP on top (the paper's 200-80)
    activation      of both: "dice", "prelu", "sigmoid" or "relu"
    cross           also feed candidate ∘ pooled to the MLP (BaseModel and DIN)
    pooling         how models without attention pool the behaviours: "sum" (the paper's) or "mean"
    wide_buckets    most rows of each cross-product table of Wide & Deep, a power of two
    use_profile     feed the user's fixed features, where the data set has them
    init_std        standard deviation of the embedding tables at the start
    fused           build with the fused modules of ``din_kernels``
    """

    field_dim: int = 8
    unit_hidden: tuple[int, ...] = (36,)
    mlp_hidden: tuple[int, ...] = (200, 80)
    activation: str = "dice"
    interaction: str = "outer"
    softmax: bool = False
    cross: bool = False
    use_profile: bool = True
    init_std: float = 0.1
    pooling: str = "sum"
    wide_buckets: int = 2**18
    fused: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.wide_buckets < 2 or self.wide_buckets & (self.wide_buckets - 1):
            raise ValueError(f"wide_buckets must be a power of two, got {self.wide_buckets}")


def make_activation(kind: str, width: int, fused: bool) -> nn.Module:
    if kind == "dice" and fused:
        import din_kernels

        return din_kernels.Dice(width)
    return units.make_activation(kind, width)


def make_unit(embedding_dim: int, config: ModelConfig) -> nn.Module:
    """The local activation unit: the reference's, or the fused one with the same constructor and state_dict."""
    if config.fused:
        import din_kernels

        return din_kernels.LocalActivationUnit(
            embedding_dim, config.unit_hidden, config.activation, config.interaction, config.softmax
        )
    return units.LocalActivationUnit(
        embedding_dim, config.unit_hidden, config.activation, config.interaction, config.softmax
    )


class MLP(nn.Module):
    """Fully connected layers to one logit: ``linears`` (hidden, then output to 1) and ``activations``.

    x [B, F] -> [B]. Fused, a hidden layer and its Dice run as one, but stay apart as modules: the ``state_dict`` is the same.
    """

    def __init__(self, in_features: int, config: ModelConfig) -> None:
        super().__init__()
        self.fused = config.fused
        widths = [in_features, *config.mlp_hidden]
        self.linears = nn.ModuleList([nn.Linear(i, o) for i, o in pairwise(widths)] + [nn.Linear(widths[-1], 1)])
        self.activations = nn.ModuleList(
            [make_activation(config.activation, width, config.fused) for width in config.mlp_hidden]
        )

    def forward(self, x: Tensor) -> Tensor:
        for linear, activation in zip(self.linears, self.activations, strict=False):
            x = self._hidden(x, linear, activation)
        return self.linears[-1](x).squeeze(-1)

    def _hidden(self, x: Tensor, linear: nn.Module, activation: nn.Module) -> Tensor:
        if self.fused:
            import din_kernels

            if isinstance(linear, nn.Linear) and isinstance(activation, din_kernels.Dice):
                return din_kernels.modules.linear_dice(x, linear, activation)
        return activation(linear(x))


class ItemEmbedding(nn.Module):
    """Item and category tables, shared by candidate and behaviours: ids [...] -> [item ; category] [..., 2·d]."""

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.item = nn.Embedding(schema.num_items, config.field_dim)
        self.category = nn.Embedding(schema.num_categories, config.field_dim)
        nn.init.normal_(self.item.weight, std=config.init_std)
        nn.init.normal_(self.category.weight, std=config.init_std)
        self.width = 2 * config.field_dim

    def forward(self, item: Tensor, category: Tensor) -> Tensor:
        check_ids("item", item, self.item.num_embeddings)
        check_ids("category", category, self.category.num_embeddings)
        return torch.cat([self.item(item), self.category(category)], dim=-1)


class ProfileEmbedding(nn.Module):
    """The user's fixed features, one table a field: ids [B, F] -> [B, F·field_dim] (width 0 without fields)."""

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        sizes = schema.profile_sizes if config.use_profile else ()
        self.tables = nn.ModuleList([nn.Embedding(size, config.field_dim) for size in sizes])
        for table in self.tables:
            nn.init.normal_(table.weight, std=config.init_std)  # type: ignore[arg-type]
        self.width = len(sizes) * config.field_dim

    def forward(self, profile: Tensor) -> Tensor:
        parts = [table(profile[:, field]) for field, table in enumerate(self.tables)]
        return torch.cat(parts, dim=-1) if parts else profile.new_zeros((profile.shape[0], 0), dtype=torch.float32)


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """A readable error for ids outside the table. CPU only: reading ids back from a GPU would stop the stream."""
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise IndexError(f"{name} ids must lie in [0, {size}), got {low} .. {high}: was the model built for this data?")


def sum_pool(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each sample's rows: values [N, D], offsets [B + 1] -> [B, D]; an empty history gives 0."""
    lengths = offsets[1:] - offsets[:-1]
    sample = torch.repeat_interleave(lengths, output_size=values.shape[0])
    return values.new_zeros(lengths.numel(), values.shape[1]).index_add(0, sample, values)


def mean_pool(values: Tensor, offsets: Tensor) -> Tensor:
    """Mean of each sample's rows; an empty history gives 0."""
    lengths = (offsets[1:] - offsets[:-1]).clamp(min=1).to(values.dtype)
    return sum_pool(values, offsets) / lengths.unsqueeze(-1)


def pool(values: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    return sum_pool(values, offsets) if pooling == "sum" else mean_pool(values, offsets)


def fields_of(profile: Tensor, candidate: Tensor, pooled: Tensor, field_dim: int) -> Tensor:
    """The same input as fields of equal width: [B, F, field_dim], profile fields first, then item and category of each."""
    return torch.cat([profile, candidate, pooled], dim=-1).unflatten(-1, (-1, field_dim))


def join(profile: Tensor, candidate: Tensor, pooled: Tensor, cross: bool) -> Tensor:
    """The MLP's input: [profile, candidate, pooled] and, with ``cross``, candidate ∘ pooled."""
    parts = [profile, candidate, pooled, *([candidate * pooled] if cross else [])]
    return torch.cat(parts, dim=-1)


class ClickModel(nn.Module):
    """A model that turns a ``Batch`` into logits [B]; the loss is the negative log-likelihood of ``batch.label``."""

    def forward(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch).float(), batch.label)
