"""The unfused definitions: what every kernel of this project must equal.

Plain PyTorch, written to be read next to the paper (Zhou et al., "Deep Interest Network for Click-Through Rate
Prediction", KDD 2018, arXiv 1706.06978). Everything is materialised: the concatenation, the outer product, every hidden
layer of every behaviour. Constructors and ``state_dict`` keys are those of the fused modules in ``din_kernels``, so
``load_state_dict(strict=True)`` works in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS = ("dice", "prelu", "sigmoid", "relu")
INTERACTIONS = ("outer", "product")


class Dice(nn.Module):
    """Data-adaptive activation (paper eq. 8-9): ``y = p·s + (1 − p)·α·s`` with ``p = σ((s − E[s]) / √(Var[s] + ε))``.

    In training E and Var are those of the batch, over all rows that count (all, or those selected by ``mask``); the
    running averages are kept as ``nn.BatchNorm1d`` keeps them and are used in evaluation. When a mask leaves fewer than
    two rows the running averages are used in training too, and are not updated.

    x      [..., C], channel last
    mask   [...] bool, True where a row counts in the statistics; rows outside are computed all the same
    """

    def __init__(
        self, num_features: int, eps: float = 1e-8, momentum: float | None = 0.1, affine: bool = False
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.alpha = nn.Parameter(torch.zeros(num_features))
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features))
            self.bias = nn.Parameter(torch.zeros(num_features))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            rows = x.reshape(-1, self.num_features) if mask is None else x[mask]
            if mask is None and rows.shape[0] == 1:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
                )
            if rows.shape[0] > 1:
                mean = rows.mean(0)
                var = rows.var(0, unbiased=False)
                self._update_running(mean.detach(), rows.detach().var(0, unbiased=True))
        normalised = (x - mean) / torch.sqrt(var + self.eps)
        if self.weight is not None:
            normalised = normalised * self.weight + self.bias
        p = torch.sigmoid(normalised)
        return p * x + (1 - p) * self.alpha * x

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"


def make_activation(kind: str, width: int) -> nn.Module:
    if kind == "dice":
        return Dice(width)
    if kind == "prelu":
        return nn.PReLU()
    if kind == "sigmoid":
        return nn.Sigmoid()
    if kind == "relu":
        return nn.ReLU()
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")


def interaction_features(query: Tensor, keys: Tensor, interaction: str) -> Tensor:
    """The first layer's input, materialised, for broadcastable ``query`` and ``keys`` [..., D].

    ``"outer"``:   [key, vec(key ⊗ query), query]; in the vec the key's index is the slow one. Width D + D² + D.
    ``"product"``: [query, key, query − key, query ∘ key], the order of the authors' public code. Width 4·D.
    """
    query, keys = torch.broadcast_tensors(query, keys)
    if interaction == "outer":
        outer = (keys.unsqueeze(-1) * query.unsqueeze(-2)).flatten(-2)
        return torch.cat([keys, outer, query], dim=-1)
    return torch.cat([query, keys, query - keys, query * keys], dim=-1)


class LocalActivationUnit(nn.Module):
    """Local activation unit and weighted sum pooling (paper eq. 3): ``u = Σ_j a(e_j, v) e_j``.

    query    [B, D], or [B, C, D] for C candidates that share sample b's behaviours
    keys     [N, D] with ``offsets`` [B + 1]; or [B, T, D] with ``lengths`` [B] or boolean ``mask`` [B, T] (True = real)
    returns  pooled [B, D] ([B, C, D]); with ``return_weights`` also the weights: [B, T] ([B, C, T]) for padded keys with
             0 at padding, [N] ([N, C]) for jagged keys
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_units: Sequence[int] = (36,),
        activation: str = "dice",
        interaction: str = "outer",
        softmax: bool = False,
        scale: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if interaction not in INTERACTIONS:
            raise ValueError(f"interaction must be one of {', '.join(INTERACTIONS)}, got {interaction!r}")
        self.embedding_dim, self.hidden_units = embedding_dim, tuple(hidden_units)
        self.activation, self.interaction, self.softmax, self.scale = activation, interaction, softmax, scale
        first = embedding_dim * (embedding_dim + 2) if interaction == "outer" else 4 * embedding_dim
        widths = [first, *self.hidden_units]
        self.linears = nn.ModuleList(
            [nn.Linear(i, o, bias=bias) for i, o in pairwise(widths)] + [nn.Linear(widths[-1], 1, bias=bias)]
        )
        self.activations = nn.ModuleList([make_activation(activation, width) for width in self.hidden_units])

    def scores(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """The scoring network on ``features`` [..., F] -> [...]; ``mask`` [...] selects the rows Dice's statistics see."""
        hidden = features
        for linear, activation in zip(self.linears, self.activations, strict=False):
            hidden = linear(hidden)
            hidden = activation(hidden, mask) if isinstance(activation, Dice) else activation(hidden)
        return self.linears[-1](hidden).squeeze(-1)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if offsets is not None:
            pooled, weights = self._jagged(query, keys, offsets)
        else:
            if lengths is not None:
                mask = torch.arange(keys.shape[1], device=keys.device) < lengths.reshape(-1, 1)
            elif mask is None:
                mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
            pooled, weights = self._padded(query, keys, mask)
        return (pooled, weights) if return_weights else pooled

    def _padded(self, query: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        many = query.dim() == 3
        candidates = query if many else query.unsqueeze(1)  # [B, C, D]
        features = interaction_features(candidates.unsqueeze(2), keys.unsqueeze(1), self.interaction)  # [B, C, T, F]
        valid = mask.unsqueeze(1).expand(features.shape[:-1])  # [B, C, T]
        scores = self.scores(features, valid)
        if self.softmax:
            scores = scores * (1.0 if self.scale is None else self.scale)
            scores = scores.masked_fill(~valid, float("-inf"))
            weights = torch.softmax(scores, dim=-1).masked_fill(~valid, 0.0)  # an empty list is all NaN: becomes 0
        else:
            weights = scores.masked_fill(~valid, 0.0)
        # Padding may hold anything, NaN included, and 0 · NaN is NaN: take it out of the sum.
        pooled = weights @ keys.masked_fill(~mask.unsqueeze(-1), 0.0)
        return (pooled, weights) if many else (pooled.squeeze(1), weights.squeeze(1))

    def _jagged(self, query: Tensor, keys: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        many = query.dim() == 3
        candidates = query if many else query.unsqueeze(1)  # [B, C, D]
        lengths = offsets[1:] - offsets[:-1]
        num_samples = lengths.numel()
        sample = torch.repeat_interleave(torch.arange(num_samples, device=keys.device), lengths)
        features = interaction_features(candidates[sample], keys.unsqueeze(1), self.interaction)  # [N, C, F]
        weights = self.scores(features, torch.ones(features.shape[:-1], dtype=torch.bool, device=keys.device))
        if self.softmax:
            scores = weights * (1.0 if self.scale is None else self.scale)
            index = sample.unsqueeze(1).expand_as(scores)
            shape = (num_samples, scores.shape[1])
            top = scores.new_full(shape, float("-inf")).scatter_reduce(0, index, scores.detach(), "amax")
            exponentials = torch.exp(scores - top[sample])
            weights = exponentials / scores.new_zeros(shape).index_add(0, sample, exponentials)[sample]
        pooled = keys.new_zeros(num_samples, candidates.shape[1], keys.shape[1])
        pooled = pooled.index_add(0, sample, weights.unsqueeze(-1) * keys.unsqueeze(1))
        return (pooled, weights) if many else (pooled.squeeze(1), weights.squeeze(1))
