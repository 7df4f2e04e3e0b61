"""Models of the paper, all with one embedding layout and one head; each runs unfused or with the fused modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from ..data import ClickData
from .common import ClickModel, ModelConfig, Schema
from .deepfm import DeepFM
from .din import DIN, BaseModel
from .lr import LR
from .pnn import PNN
from .wide_deep import WideDeep


@dataclass(frozen=True)
class Entry:
    """A model by name: how it is built, and what it is in a line."""

    make: Callable[[Schema, ModelConfig], ClickModel]
    what: str

    def __str__(self) -> str:
        return self.what


MODELS = {
    "lr": Entry(LR, "logistic regression on the ids"),
    "base": Entry(
        lambda schema, config: BaseModel(schema, config, config.pooling),
        "BaseModel: embeddings, pooling of the behaviours (sum, or as --pooling says), MLP",
    ),
    "base-mean": Entry(
        lambda schema, config: BaseModel(schema, config, "mean"),
        "BaseModel with mean pooling",
    ),
    "wide-deep": Entry(WideDeep, "Wide & Deep: BaseModel, and a weight for each pair of behaviour and candidate"),
    "pnn": Entry(PNN, "PNN: BaseModel with inner products of all pairs of fields"),
    "deepfm": Entry(DeepFM, "DeepFM: linear terms, factorisation machine and MLP on the same embeddings"),
    "din": Entry(DIN, "Deep Interest Network: the local activation unit weighs the behaviours for each candidate"),
}


def schema_of(data: ClickData) -> Schema:
    return Schema(data.num_items, data.num_categories, data.profile_sizes)


def build(name: str, schema: Schema, config: ModelConfig) -> nn.Module:
    """A freshly initialised model; ``torch.manual_seed`` before it makes fused and unfused start equal."""
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name].make(schema, config)


def build_twin(name: str, schema: Schema, config: ModelConfig, source: nn.Module, *, fused: bool) -> nn.Module:
    """The same model, fused or not, with the weights of ``source`` (strictly the same state_dict keys)."""
    model = build(name, schema, replace(config, fused=fused))
    model.load_state_dict(source.state_dict(), strict=True)
    return model


__all__ = [
    "DIN",
    "LR",
    "MODELS",
    "PNN",
    "BaseModel",
    "DeepFM",
    "ModelConfig",
    "Schema",
    "WideDeep",
    "build",
    "build_twin",
    "schema_of",
]
