"""Models of the paper, all with one embedding layout and one head; each runs unfused or with the fused modules."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..data import ClickData
from .common import ModelConfig, Schema
from .din import DIN, BaseModel

MODELS = {
    "base": "BaseModel: embeddings, sum pooling of the behaviours, MLP",
    "base-mean": "BaseModel with mean pooling",
    "din": "Deep Interest Network: the local activation unit weighs the behaviours for each candidate",
}


def schema_of(data: ClickData) -> Schema:
    return Schema(data.num_items, data.num_categories, data.profile_sizes)


def build(name: str, schema: Schema, config: ModelConfig) -> nn.Module:
    """A freshly initialised model; ``torch.manual_seed`` before it makes fused and unfused start equal."""
    if name == "base":
        return BaseModel(schema, config, pooling="sum")
    if name == "base-mean":
        return BaseModel(schema, config, pooling="mean")
    if name == "din":
        return DIN(schema, config)
    raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")


def build_twin(name: str, schema: Schema, config: ModelConfig, source: nn.Module, *, fused: bool) -> nn.Module:
    """The same model, fused or not, with the weights of ``source`` (strictly the same state_dict keys)."""
    model = build(name, schema, replace(config, fused=fused))
    model.load_state_dict(source.state_dict(), strict=True)
    return model


__all__ = ["DIN", "MODELS", "BaseModel", "ModelConfig", "Schema", "build", "build_twin", "schema_of"]
