"""Models that look trained (statistics, slopes and biases are not those of the start) and requests for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from din_kernels.serving import Candidates, Visitor
from reference.data.batches import Batch
from reference.models import ModelConfig, Schema, build, build_twin

SCHEMA = Schema(num_items=97, num_categories=11, profile_sizes=(3, 5))


def make_model(*, fused: bool = False, schema: Schema = SCHEMA, seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    options = {"field_dim": 6, "unit_hidden": (12,), "mlp_hidden": (20, 10), "init_std": 0.5, **config}
    model = build("din", schema, ModelConfig(**options))  # type: ignore[arg-type]
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean"):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.1, 1.5)
                module.alpha.normal_(std=0.3)
            elif isinstance(module, nn.PReLU):
                module.weight.uniform_(-0.2, 0.4)
    if fused:
        model = build_twin("din", schema, ModelConfig(**options), model, fused=True)  # type: ignore[arg-type]
    return model.eval()


def make_request(
    behaviours: int, candidates: int, *, schema: Schema = SCHEMA, seed: int = 0
) -> tuple[Visitor, Candidates]:
    draw = torch.Generator().manual_seed(seed)

    def ids(size: int, count: int) -> list[int]:
        return torch.randint(size, (count,), generator=draw).tolist()

    items, categories = schema.num_items, schema.num_categories
    profile = [ids(size, 1)[0] for size in schema.profile_sizes]
    return (
        Visitor(ids(items, behaviours), ids(categories, behaviours), profile),
        Candidates(ids(items, candidates), ids(categories, candidates)),
    )


def as_batch(visitor: Visitor, candidates: Candidates) -> Batch:
    """What the model needs to score the same: every candidate a sample with its own copy of the behaviours."""
    count, length = len(candidates.item), len(visitor.history_item)
    repeat = torch.as_tensor
    return Batch(
        user=torch.zeros(count, dtype=torch.int64),
        item=repeat(candidates.item),
        category=repeat(candidates.category),
        profile=torch.tensor(visitor.profile, dtype=torch.int64).expand(count, -1),
        label=torch.zeros(count),
        history_item=torch.tensor(visitor.history_item, dtype=torch.int64).repeat(count),
        history_category=torch.tensor(visitor.history_category, dtype=torch.int64).repeat(count),
        offsets=torch.arange(count + 1) * length,
    )


class Expected(NamedTuple):
    """scores  [C] float64, the model's own logits
    size    largest Σ|weight·input| + |bias| of the last layer: what a logit is the (perhaps much smaller) sum of, and so
            what its rounding errors are a fraction of
    """

    scores: Tensor
    size: float


def expect(model: nn.Module, pair: tuple[Visitor, Candidates]) -> Expected:
    exact = copy.deepcopy(model).double().eval()
    last, sizes = exact.mlp.linears[-1], []

    def terms(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        sizes.append(float((inputs[0].abs() @ module.weight.abs().T + module.bias.abs()).max()))

    last.register_forward_hook(terms)
    with torch.no_grad():
        return Expected(exact(as_batch(*pair)), sizes[0])


def expected_scores(model: nn.Module, pairs: Sequence[tuple[Visitor, Candidates]]) -> list[Tensor]:
    """The model's own logits in float64."""
    return [expect(model, pair).scores for pair in pairs]
