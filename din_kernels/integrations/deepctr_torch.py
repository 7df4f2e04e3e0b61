"""DeepCTR-Torch 0.3 (and 0.2.9): ``AttentionSequencePoolingLayer``, ``LocalActivationUnit``, ``Dice``.

Semantics from its layers/core.py, layers/sequence.py and layers/activation.py: query [B, 1, D], keys [B, T, D], keys_length
[B, 1]; fill 0, or −2³² + 1 before a softmax; the Dice of the attention is affine and its statistics include padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepctr_torch.layers import activation, core, sequence
from torch import Tensor, nn

from .adapter import BACKEND, Adapter
from .scoring import (
    Hidden,
    Network,
    clamp_lengths,
    dice_is_readable,
    dice_like,
    fill_padding,
    is_linear,
    readable,
)


def network(unit: Any) -> Network:
    dnn = unit.dnn
    odd = [type(m).__name__ for m in (*dnn.linears[1:], unit.dense) if not is_linear(m)]
    if dnn.use_bn:  # the library applies it to [B, T, C], over the wrong dimension: keep what it does
        odd.append("use_bn")
    if dnn.dropout.p > 0 and type(dnn.dropout) is not nn.Dropout:
        odd.append(type(dnn.dropout).__name__)
    hidden = [
        Hidden(linear, None, layer, [dnn.dropout])
        for linear, layer in zip(dnn.linears, dnn.activation_layers, strict=True)
    ]

    def after_first(z: Tensor) -> Tensor:
        for i, layer in enumerate(dnn.activation_layers):
            if i:
                z = dnn.linears[i](z)
            if dnn.use_bn:
                z = dnn.bn[i](z)
            z = dnn.dropout(layer(z))
        return unit.dense(z).squeeze(-1)

    return Network(hidden, unit.dense, after_first, activation.Dice, odd)


def _readable(unit: Any) -> bool:
    return readable(unit) and is_linear(unit.dnn.linears[0])


class FusedLocalActivationUnit(core.LocalActivationUnit):
    """Scores [B, T, 1]."""

    def forward(self, query: Tensor, user_behavior: Tensor) -> Tensor:
        if query.shape[1] != 1 or not _readable(self):
            return super().forward(query, user_behavior)
        scores = network(self).scores(query.squeeze(1), user_behavior, backend=getattr(self, BACKEND, None))
        return scores.unsqueeze(-1)


class FusedAttentionSequencePoolingLayer(sequence.AttentionSequencePoolingLayer):
    """Pooled [B, 1, D], or scores [B, 1, T] with ``return_score``."""

    def forward(self, query: Tensor, keys: Tensor, keys_length: Tensor, mask: Tensor | None = None) -> Tensor:
        if query.shape[1] != 1 or not (readable(self) and _readable(self.local_att)):
            return super().forward(query, keys, keys_length, mask)
        if self.supports_masking:
            if mask is None:
                raise ValueError("When supports_masking=True,input must support masking")
            real = mask
        else:
            real = clamp_lengths(keys_length, keys.shape[1])
        scorer, query, backend = network(self.local_att), query.squeeze(1), getattr(self, BACKEND, None)
        if not self.weight_normalization and not self.return_score:
            return scorer.pooled(query, keys, backend=backend, mask=real).unsqueeze(1)
        scores = scorer.scores(query, keys, backend=backend, mask=real)
        scores = fill_padding(scores, real, -(2**32) + 1 if self.weight_normalization else 0).unsqueeze(1)
        if self.weight_normalization:
            scores = F.softmax(scores, dim=-1)
        return scores if self.return_score else torch.matmul(scores, keys)


class FusedDice(activation.Dice):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.dim or not dice_is_readable(self):
            return super().forward(x)  # with the library's own error for a wrong number of dimensions
        return dice_like(self, x, getattr(self, BACKEND, None))


def _why_not(unit: Any) -> str | None:
    first = unit.dnn.linears[0]
    return None if is_linear(first) else f"its first layer is a {type(first).__name__}"


ADAPTERS: dict[type[nn.Module], Adapter] = {
    sequence.AttentionSequencePoolingLayer: Adapter(
        FusedAttentionSequencePoolingLayer,
        lambda module: network(module.local_att).describe(),
        lambda module: _why_not(module.local_att),
    ),
    core.LocalActivationUnit: Adapter(FusedLocalActivationUnit, lambda module: network(module).describe(), _why_not),
    activation.Dice: Adapter(FusedDice, lambda module: "fused Dice"),
}
