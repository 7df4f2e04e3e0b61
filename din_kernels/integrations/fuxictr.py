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
from .scoring import Network, dice_is_readable, dice_like, is_linear, read_layers, readable, weighted_sum


def network(attention: Any) -> tuple[Network, nn.Module | None]:
    """The scoring network, and the activation of the output if there is one."""
    modules = list(attention.attention_layer.mlp)
    last = max(i for i, module in enumerate(modules) if is_linear(module))
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
        if not readable(self) or _why_not(self) is not None:
            return super().forward(target_item, history_sequence, mask)
        scorer, output_activation = network(self)
        backend = getattr(self, BACKEND, None)
        plain = output_activation is None and not self.use_softmax
        if plain and (mask is None or mask.dtype is torch.bool):
            pooled = scorer.pooled(target_item, history_sequence, mask=mask, backend=backend)
            # The library multiplies by mask.float(), and by the history outside autocast: at least fp32 comes back.
            dtype = history_sequence.dtype
            return pooled.to(dtype if mask is None else torch.promote_types(dtype, torch.float32))
        real = None if mask is None else mask != 0
        scores = scorer.scores(target_item, history_sequence, mask=real, backend=backend)
        if output_activation is not None:
            scores = output_activation(scores.view(-1, 1)).view(scores.shape)
        if mask is not None:
            scores = scores * mask.float()
        if self.use_softmax:
            if mask is not None:
                scores = scores + -1.0e9 * (1 - mask.float())
            scores = scores.softmax(dim=-1)
        return weighted_sum(scores, history_sequence)


class FusedDice(activations.Dice):
    def forward(self, X: Tensor) -> Tensor:
        if X.dim() != 2 or not dice_is_readable(self):
            return super().forward(X)  # with the library's own error for a wrong number of dimensions
        return dice_like(self, X, getattr(self, BACKEND, None))


def _why_not(attention: Any) -> str | None:
    modules = list(attention.attention_layer.mlp)
    if len(modules) < 2 or not is_linear(modules[0]):
        return "its scoring network does not begin with a hidden Linear layer"
    tail = modules[max(i for i, module in enumerate(modules) if is_linear(module)) :]
    if len(tail) > 2 or tail[0].out_features != 1:
        return "its scoring network does not end with a Linear layer to 1 and an activation"
    return None


ADAPTERS: dict[type[nn.Module], Adapter] = {
    target_attention.DIN_Attention: Adapter(FusedDINAttention, lambda module: network(module)[0].describe(), _why_not),
    activations.Dice: Adapter(FusedDice, lambda module: "fused Dice"),
}
