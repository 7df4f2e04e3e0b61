"""Many visitors scored with the fused unit, in padded static shapes: what a CUDA graph can hold."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..functional import RunningStatistics, local_activation
from .buckets import Inputs
from .folded import FoldedLayers, kind_of
from .parts import DinParts


class PaddedNetwork(nn.Module):
    """A DIN in evaluation for B visitors with up to T behaviours and C candidates each: ``Inputs`` -> logits [B, C].

    The unit is the package's own operator (C candidates share a list), in the dtype of the tables unless ``dtype`` is given;
    the MLP is folded and runs in float32.
    """

    def __init__(self, parts: DinParts, *, backend: str | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.parts, self.backend = parts, backend
        self.dtype = parts.item.dtype if dtype is None else dtype
        unit = parts.unit
        linears = [cast(nn.Linear, linear) for linear in cast(nn.ModuleList, unit.linears)]
        activations = list(cast(nn.ModuleList, unit.activations))
        self.activation = kind_of(activations[0])
        if any(kind_of(activation) != self.activation for activation in activations):
            raise ValueError("all hidden layers of the unit must have one kind of activation")
        self.weights = [linear.weight.detach().to(self.dtype, copy=True) for linear in linears]
        self.biases = [
            None if linear.bias is None else linear.bias.detach().to(self.dtype, copy=True) for linear in linears
        ]
        self.alphas: list[Tensor] | None = None
        self.running: list[RunningStatistics] | None = None
        if self.activation == "dice":
            if any(getattr(a, "weight", None) is not None for a in activations):
                raise ValueError("Dice inside the unit must be built with affine=False")
            self.alphas = [cast(Tensor, a.alpha).detach().clone() for a in activations]
            self.running = [
                RunningStatistics(
                    cast(Tensor, a.running_mean).clone(), cast(Tensor, a.running_var).clone(), eps=cast(float, a.eps)
                )
                for a in activations
            ]
        elif self.activation == "prelu":
            self.alphas = [cast(Tensor, a.weight).detach().clone() for a in activations]
        self.mlp = FoldedLayers(parts.linears, parts.activations)
        self.register_buffer("mlp_weight", cast(Tensor, self.mlp.first_weight).t().contiguous(), persistent=False)
        self.mlp_weight: Tensor

    def embed(self, ids: Tensor) -> Tensor:
        """[2, …] (items, categories) -> [item ; category] […, D]."""
        rows = (nn.functional.embedding(ids[0], self.parts.item), nn.functional.embedding(ids[1], self.parts.category))
        return torch.cat(rows, dim=-1).to(self.dtype)

    def forward(self, inputs: Inputs) -> Tensor:
        candidates = self.embed(inputs.candidates)
        unit = self.parts.unit
        pooled = local_activation(
            candidates, self.embed(inputs.history), self.weights, self.biases, lengths=inputs.lengths,
            interaction=cast(str, unit.interaction), activation=self.activation, alphas=self.alphas, running=self.running,
            softmax=bool(unit.softmax), scale=cast("float | None", unit.scale), backend=self.backend,
        )  # fmt: skip
        assert isinstance(pooled, Tensor)
        batch, count = candidates.shape[:2]
        of_visitor = [
            nn.functional.embedding(inputs.profile[:, field], table).unsqueeze(1).expand(batch, count, -1)
            for field, table in enumerate(self.parts.profile)
        ]
        parts = [*of_visitor, candidates, pooled, *([candidates * pooled] if self.parts.cross else [])]
        features = torch.cat([part.to(self.mlp_weight.dtype) for part in parts], dim=-1).view(batch * count, -1)
        x = torch.addmm(cast(Tensor, self.mlp.first_bias), features, self.mlp_weight)
        return self.mlp(x).view(batch, count)
