"""torch-rechub 0.9: ``ActivationUnit``; its ``Dice`` normalises each row over its channels and is left alone.

Semantics from its models/ranking/din.py: history [B, T, D] comes first, target [B, D] second; there is no mask, so every row
of the history counts; BatchNorm always stands between Linear and activation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch_rechub.basic import activation
from torch_rechub.models.ranking import din

from .adapter import BACKEND, Adapter
from .scoring import Network, is_linear, read_layers, readable, weighted_sum


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
        if not readable(self) or _why_not(self) is not None:
            return super().forward(history, target)
        scorer, backend = network(self), getattr(self, BACKEND, None)
        if not self.use_softmax:
            return scorer.pooled(target, history, backend=backend).to(history.dtype)
        return weighted_sum(scorer.scores(target, history, backend=backend).softmax(dim=-1), history)


def _why_not(unit: Any) -> str | None:
    modules = list(unit.attention.mlp)
    if len(modules) < 2 or not (is_linear(modules[0]) and is_linear(modules[-1])):
        return "its scoring network does not begin and end with Linear layers"
    return None


ADAPTERS: dict[type[nn.Module], Adapter] = {
    din.ActivationUnit: Adapter(
        FusedActivationUnit,
        lambda module: network(module).describe(),
        _why_not,
    ),
    activation.Dice: Adapter(
        None, why_not=lambda module: "it normalises each row over its channels, which is not the paper's Dice"
    ),
}
