"""RecBole 1.2: ``SequenceAttLayer``, ``Dice``.

Semantics from its model/layers.py: queries [B, D], keys [B, T, D] with T fixed by ``mask_mat``, keys_length [B]; fill 0, or −∞
before a softmax (an empty history is then NaN); scores are divided by √D after the fill, softmax or not. Its ``Dice`` neither
normalises nor learns: with alpha fixed at 0 it is SiLU.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from recbole.model import layers
from torch import Tensor, nn

from .adapter import BACKEND, EMPTY_AS_ZERO, Adapter
from .scoring import Network, is_linear, read_layers, readable


def network(attention: Any) -> Network:
    modules = list(attention.att_mlp_layers.mlp_layers)
    first = next(i for i, module in enumerate(modules) if is_linear(module))
    hidden, odd = read_layers(modules, None)
    odd += [] if is_linear(attention.dense) else [type(attention.dense).__name__]

    def after_first(z: Tensor) -> Tensor:
        for module in modules[first + 1 :]:
            z = module(z)
        return attention.dense(z).squeeze(-1)

    return Network(hidden, attention.dense, after_first, None, odd)


class FusedSequenceAttLayer(layers.SequenceAttLayer):
    """Pooled [B, 1, D], or weights [B, 1, T] with ``return_seq_weight``."""

    def forward(self, queries: Tensor, keys: Tensor, keys_length: Tensor) -> Tensor:
        if not readable(self) or _why_not(self) is not None:
            return super().forward(queries, keys, keys_length)
        dim, backend = queries.shape[-1], getattr(self, BACKEND, None)
        padding = self.mask_mat >= keys_length.unsqueeze(1)
        scorer = network(self)
        if not self.softmax_stag and not self.return_seq_weight:
            return (scorer.pooled(queries, keys, mask=~padding, backend=backend) / dim**0.5).unsqueeze(1)
        scores = scorer.scores(queries, keys, mask=~padding, backend=backend)
        if not self.softmax_stag:
            scores = scores.masked_fill(padding, 0.0).unsqueeze(1) / dim**0.5
        elif getattr(self, EMPTY_AS_ZERO, False):
            empty = padding.all(dim=1, keepdim=True)  # a softmax over nothing but −∞ is NaN, and so are its gradients
            scores = scores.masked_fill(padding & ~empty, float("-inf")).unsqueeze(1) / dim**0.5
            scores = F.softmax(scores, dim=2).masked_fill(empty.unsqueeze(1), 0.0)
        else:
            scores = F.softmax(scores.masked_fill(padding, float("-inf")).unsqueeze(1) / dim**0.5, dim=2)
        return scores if self.return_seq_weight else torch.matmul(scores, keys)


class FusedDice(layers.Dice):
    def forward(self, score: Tensor) -> Tensor:
        return F.silu(score)


def _alpha_is_not_zero(module: Any) -> str | None:
    return "its alpha was set by hand" if bool((module.alpha != 0).any()) else None


def _why_not(attention: Any) -> str | None:
    modules = list(attention.att_mlp_layers.mlp_layers)
    before = list(itertools.takewhile(lambda module: not is_linear(module), modules))
    if len(before) == len(modules):
        return "its scoring network has no hidden Linear layer"
    if any(type(module) is not nn.Dropout or module.p > 0 for module in before):
        return f"{type(before[0]).__name__} on the concatenated features"
    return None


ADAPTERS: dict[type[nn.Module], Adapter] = {
    layers.SequenceAttLayer: Adapter(FusedSequenceAttLayer, lambda module: network(module).describe(), _why_not),
    layers.Dice: Adapter(FusedDice, lambda module: "SiLU, which it equals", _alpha_is_not_zero),
}
