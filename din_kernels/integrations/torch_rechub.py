"""torch-rechub 0.9: ``ActivationUnit``; its ``Dice`` normalises each row over its channels and is left alone.

Semantics from its models/ranking/din.py: history [B, T, D] comes first, target [B, D] second; there is no mask, so every row
of the history counts; BatchNorm always stands between Linear and activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_rechub.basic import activation
from torch_rechub.models.ranking import din

from .adapter import BACKEND, Adapter
from .scoring import Network, read_layers


def network(unit: Any) -> Network:
    modules = list(unit.attention.mlp)
    hidden, odd = read_layers(modules[:-1], None)

    def after_first(z: Tensor) -> Tensor:
        batch, length, width = z.shape
        z = z.view(-1, width)
        for module in modules[1:]:
            z = module(z)
        return z.view(batch, length)

    return Network(hidden, modules[-1], after_first, None, odd)


class FusedActivationUnit(din.ActivationUnit):
    """Pooled [B, D]."""

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        arguments = {"training": self.attention.training, "backend": getattr(self, BACKEND, None)}
        scorer = network(self)
        if not self.use_softmax:
            return scorer.pooled(target, history, **arguments)
        scores = scorer.scores(target, history, **arguments).softmax(dim=-1)
        return torch.matmul(scores.unsqueeze(1), history).squeeze(1)


ADAPTERS: dict[type[nn.Module], Adapter] = {
    din.ActivationUnit: Adapter(
        FusedActivationUnit,
        lambda module: network(module).describe(),
        lambda module: None if len(module.attention.mlp) > 1 else "it has no hidden layer",
    ),
    activation.Dice: Adapter(
        None, why_not=lambda module: "it normalises each row over its channels, which is not the paper's Dice"
    ),
}
