"""TorchEasyRec (tzrec) 1.3 and 0.9: ``DINEncoder``, ``Dice``.

Semantics from its modules/sequence.py, modules/mlp.py and modules/activation.py: a dict with ``{input}.query`` [B, Dq],
``{input}.sequence`` [B, T, D], ``{input}.sequence_length`` [B]; a narrower query is padded with zeros; always a softmax, over
scores filled with −2³¹ + 1, so an empty history pools to the mean of its padding. Dice has eps 1e-5 and counts padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tzrec.modules import activation, sequence

from .adapter import BACKEND, Adapter
from .scoring import Network, dice_is_readable, dice_like, fill_padding, is_linear, read_layers, readable


def network(encoder: Any) -> Network:
    perceptrons = [list(each.perceptron) for each in encoder.mlp.mlp]
    flat = [module for modules in perceptrons for module in modules]
    hidden, odd = read_layers(flat, activation.Dice)
    odd += [] if is_linear(encoder.linear) else [type(encoder.linear).__name__]

    def after_first(z: Tensor) -> Tensor:
        for module in flat[1:]:
            z = module(z)
        return encoder.linear(z).squeeze(-1)

    return Network(hidden, encoder.linear, after_first, activation.Dice, odd)


class FusedDINEncoder(sequence.DINEncoder):
    """Pooled [B, D]."""

    def forward(self, sequence_embedded: dict[str, Tensor]) -> Tensor:
        if not readable(self) or _why_not(self) is not None:
            return super().forward(sequence_embedded)
        query = sequence_embedded[self._query_name]
        keys = sequence_embedded[self._sequence_name]
        lengths = sequence_embedded[self._sequence_length_name]
        if self._max_seq_length > 0:
            lengths = torch.clamp_max(lengths, self._max_seq_length)
            keys = keys[:, : self._max_seq_length, :]
        if self._query_dim < self._sequence_dim:
            query = F.pad(query, (0, self._sequence_dim - self._query_dim))
        real = torch.arange(keys.shape[1], device=lengths.device) < lengths.unsqueeze(1)
        scores = network(self).scores(query, keys, backend=getattr(self, BACKEND, None), mask=real)
        scores = fill_padding(scores, real, -(2**31) + 1).softmax(dim=-1)
        return torch.matmul(scores.unsqueeze(1), keys).squeeze(1)


class FusedDice(activation.Dice):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.dim or not dice_is_readable(self):
            return super().forward(x)
        return dice_like(self, x, getattr(self, BACKEND, None))


def _why_not(encoder: Any) -> str | None:
    if encoder.mlp.return_hidden_layer_feature:
        return "return_hidden_layer_feature"
    first = encoder.mlp.mlp[0].perceptron[0]
    return None if is_linear(first) else f"its first layer is a {type(first).__name__}"


ADAPTERS: dict[type[nn.Module], Adapter] = {
    sequence.DINEncoder: Adapter(FusedDINEncoder, lambda module: network(module).describe(), _why_not),
    activation.Dice: Adapter(FusedDice, lambda module: "fused Dice"),
}
