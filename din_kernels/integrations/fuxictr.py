"""FuxiCTR 2.3: ``DIN_Attention``, ``Dice``.

Semantics from its layers/attentions/target_attention.py: target [B, D], history [B, T, D], any mask [B, T]; scores are
multiplied by the mask, and −1e9·(1 − mask) is added before a softmax; Dice and BatchNorm see [B·T, H], padding included.
"""

from __future__ import annotations

from typing import Any

import torch
from fuxictr.pytorch.layers import activations
from fuxictr.pytorch.layers.attentions import target_attention
from torch import Tensor, nn

from .adapter import BACKEND, Adapter
from .scoring import Network, dice_like, read_layers


def network(attention: Any) -> tuple[Network, nn.Module | None]:
    """The scoring network, and the activation of the output if there is one."""
    modules = list(attention.attention_layer.mlp)
    last = max(i for i, module in enumerate(modules) if type(module) is nn.Linear)
    tail = modules[last + 1 :]
    hidden, odd = read_layers(modules[:last], activations.Dice)

    def after_first(z: Tensor) -> Tensor:
        batch, length, width = z.shape
        z = z.view(-1, width)
        for module in modules[1 : last + 1]:
            z = module(z)
        return z.view(batch, length)

    return Network(hidden, modules[last], after_first, activations.Dice, odd), tail[0] if tail else None


class FusedDINAttention(target_attention.DIN_Attention):
    """Pooled [B, D]."""

    def forward(self, target_item: Tensor, history_sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        scorer, output_activation = network(self)
        arguments = {"training": self.attention_layer.training, "backend": getattr(self, BACKEND, None)}
        plain = output_activation is None and not self.use_softmax
        if plain and (mask is None or mask.dtype is torch.bool):
            return scorer.pooled(target_item, history_sequence, mask=mask, **arguments)
        real = None if mask is None else mask != 0
        scores = scorer.scores(target_item, history_sequence, mask=real, **arguments)
        if output_activation is not None:
            scores = output_activation(scores.view(-1, 1)).view(scores.shape)
        if mask is not None:
            scores = scores * mask.float()
        if self.use_softmax:
            if mask is not None:
                scores = scores + -1.0e9 * (1 - mask.float())
            scores = scores.softmax(dim=-1)
        return torch.matmul(scores.to(history_sequence.dtype).unsqueeze(1), history_sequence).squeeze(1)


class FusedDice(activations.Dice):
    def forward(self, X: Tensor) -> Tensor:
        if X.dim() != 2:
            return super().forward(X)  # the library's own error
        return dice_like(self, X, getattr(self, BACKEND, None))


def _why_not(attention: Any) -> str | None:
    modules = list(attention.attention_layer.mlp)
    if not modules or type(modules[0]) is not nn.Linear:
        return "its scoring network does not begin with a Linear layer"
    return None


ADAPTERS: dict[type[nn.Module], Adapter] = {
    target_attention.DIN_Attention: Adapter(FusedDINAttention, lambda module: network(module)[0].describe(), _why_not),
    activations.Dice: Adapter(FusedDice, lambda module: "fused Dice"),
}
