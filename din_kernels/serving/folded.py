"""Networks in evaluation, with everything that does not depend on the request computed beforehand.

**Dice.** With running statistics p = σ(x̂) where x̂ = s·z + t (s = weight/√(var + ε), t = bias − s·mean). Scaling the rows
of the layer below by s makes its product give x̂ at once. As z = (x̂ − t)/s, the activation's output

    y = z·(α + (1 − α)·p)

is linear in p, in q = p·x̂ and in x̂, so that the next layer takes p and q (and x̂, where α ≠ 0) with weights of its own::

    W y + b = W diag((1 − α)/s) q  −  W diag((1 − α)·t/s) p  +  W diag(α/s) x̂  +  b − W (α·t/s)

What remains of Dice is one sigmoid and one product per element, both over contiguous memory, and no broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn


def _wide(tensor: Tensor) -> Tensor:
    """A detached copy, so that later training does not reach into it; low precision is widened."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.dtype == torch.float64 else tensor.to(torch.float32, copy=True)


def kind_of(activation: nn.Module) -> str:
    """ "dice", "prelu", "relu" or "sigmoid". Dice is known by its running statistics: two classes of that name exist."""
    if hasattr(activation, "running_mean") and hasattr(activation, "alpha"):
        return "dice"
    for name, kind in (("prelu", nn.PReLU), ("relu", nn.ReLU), ("sigmoid", nn.Sigmoid)):
        if isinstance(activation, kind):
            return name
    raise TypeError(f"cannot serve the activation {type(activation).__name__}: Dice, PReLU, ReLU or Sigmoid")


class _DiceGate(NamedTuple):
    """x̂ = scale·z + shift [H] and the slope alpha [H] of a Dice in evaluation."""

    scale: Tensor
    shift: Tensor
    alpha: Tensor

    @staticmethod
    def of(dice: nn.Module) -> _DiceGate:
        mean, var = (_wide(cast(Tensor, buffer)) for buffer in (dice.running_mean, dice.running_var))
        scale = torch.rsqrt(var + cast(float, dice.eps))
        shift = -mean * scale
        if getattr(dice, "weight", None) is not None:
            weight, bias = _wide(cast(Tensor, dice.weight)), _wide(cast(Tensor, dice.bias))
            if bool((weight == 0).any()):
                raise ValueError("an affine Dice with weight 0 has a constant gate and cannot be folded")
            scale, shift = scale * weight, shift * weight + bias
        alpha = _wide(cast(Tensor, dice.alpha)).reshape(-1).expand_as(mean)
        return _DiceGate(scale, shift, alpha)


class FoldedLayers(nn.Module):
    """A fully connected network to one number, from the (scaled) pre-activation of its first hidden layer upwards.

    The first layer is left to the caller, who knows better ways to compute it: ``first_weight`` [H1, F] and ``first_bias``
    [H1] are what it must multiply with, Dice's scale and shift included.

    linears      hidden layers, then the output layer to 1
    activations  one per hidden layer
    """

    def __init__(self, linears: Sequence[nn.Linear], activations: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(linears) != len(activations) + 1 or not activations:
            raise ValueError(
                f"{len(linears)} linear layers need {len(linears) - 1} (at least one) activations, got {len(activations)}"
            )
        self.kinds = [kind_of(activation) for activation in activations]
        self.depth = len(activations)
        weights = [_wide(linear.weight) for linear in linears]
        biases = [
            torch.zeros_like(w[:, 0]) if linear.bias is None else _wide(linear.bias)
            for w, linear in zip(weights, linears, strict=True)
        ]
        gates = [
            _DiceGate.of(activation) if kind == "dice" else None
            for kind, activation in zip(self.kinds, activations, strict=True)
        ]
        for layer, gate in enumerate(gates):
            if gate is not None:
                weights[layer] = weights[layer] * gate.scale.unsqueeze(1)
                biases[layer] = biases[layer] * gate.scale + gate.shift
        for layer, activation in enumerate(activations):
            self._fold_upwards(layer, gates[layer], activation, weights, biases)
        self._keep("first_weight", weights[0])
        self._keep("first_bias", biases[0])
        for layer in range(self.depth):
            self._keep(f"weight{layer}", weights[layer + 1].t().contiguous())
            self._keep(f"bias{layer}", biases[layer + 1])

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _fold_upwards(
        self, layer: int, dice: _DiceGate | None, activation: nn.Module, weights: list[Tensor], biases: list[Tensor]
    ) -> None:
        """The weights of p, q and x̂ in the layer above ``activation``; ``weights`` and ``biases`` of that layer change."""
        above = weights[layer + 1]
        gate = direct = slope = None
        if dice is not None:
            through = (1 - dice.alpha) / dice.scale
            weights[layer + 1] = above * through
            gate = (above * (-through * dice.shift)).t().contiguous()
            if bool((dice.alpha != 0).any()):
                direct = (above * (dice.alpha / dice.scale)).t().contiguous()
                biases[layer + 1] = biases[layer + 1] - above @ (dice.alpha * dice.shift / dice.scale)
        elif self.kinds[layer] == "prelu":
            slope = _wide(cast(Tensor, activation.weight))
        self._keep(f"gate{layer}", gate)
        self._keep(f"direct{layer}", direct)
        self._keep(f"slope{layer}", slope)

    def _linear(self, layer: int, x: Tensor) -> Tensor:
        weight, bias = getattr(self, f"weight{layer}"), getattr(self, f"bias{layer}")
        return torch.addmm(bias, x, weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, H1] -> [n]; ``x`` is overwritten where gradients are off."""
        for layer, kind in enumerate(self.kinds):
            if kind == "dice":
                p = torch.sigmoid(x)
                direct = getattr(self, f"direct{layer}")
                through = None if direct is None else x @ direct
                x = self._linear(layer, x.mul_(p)).addmm_(p, getattr(self, f"gate{layer}"))
                if through is not None:
                    x = x.add_(through)
            elif kind == "prelu":
                x = self._linear(layer, torch.prelu(x, getattr(self, f"slope{layer}")))
            else:
                x = self._linear(layer, x.relu_() if kind == "relu" else x.sigmoid_())
        return x.squeeze(1)


class BilinearFirstLayer(nn.Module):
    """The unit's first layer as what it is, a bilinear form in candidate v and behaviour e.

    With v' = [v ; 1] and e' = [e ; 1], z_h = v'ᵀ W_h e' for both interactions, W_h diagonal in its upper left part for
    "product". Contracting the form with one side leaves a matrix M and an offset o per row of that side, z = M y + o for
    every row y of the other: the heavy work is then one matrix product over all pairs. Either side will do; the one with
    fewer rows costs less to contract (outer: rows·H·D², product: rows·H·D), and behaviours can be contracted before any
    candidate is known.

    weight [H, F], bias [H]: of the first linear layer, columns as ``functional.local_activation`` has them; dim: D
    """

    def __init__(self, weight: Tensor, bias: Tensor, dim: int, interaction: str) -> None:
        super().__init__()
        self.interaction, self.dim, self.width = interaction, dim, weight.shape[0]
        if interaction == "product":
            query, key, difference, product = weight.split(dim, dim=1)
            query, key = query + difference, key - difference
        else:
            key, product, query = weight.split([dim, dim * dim, dim], dim=1)
            product = product.view(-1, dim, dim)  # [H, key index, query index]
        self.register_buffer("query", query.contiguous(), persistent=False)
        self.register_buffer("key", key.contiguous(), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        if interaction == "product":
            self.register_buffer("cross_key", product.contiguous(), persistent=False)
            self.register_buffer("cross_query", None, persistent=False)
        else:
            # [D, H·D]: rows contracted with, then (hidden unit, remaining index).
            self.register_buffer("cross_key", product.permute(1, 0, 2).reshape(dim, -1).contiguous(), persistent=False)
            self.register_buffer(
                "cross_query", product.permute(2, 0, 1).reshape(dim, -1).contiguous(), persistent=False
            )
        self.query: Tensor
        self.key: Tensor
        self.bias: Tensor
        self.cross_key: Tensor
        self.cross_query: Tensor | None

    def contract(self, rows: Tensor, *, behaviours: bool) -> tuple[Tensor, Tensor]:
        """rows [n, D], behaviours or candidates -> (M [n·H, D], o [n·H])."""
        own, other = (self.key, self.query) if behaviours else (self.query, self.key)
        offset = torch.addmm(self.bias, rows, own.t()).view(-1)
        if self.interaction == "product":
            matrix = torch.addcmul(other, rows.unsqueeze(1), self.cross_key)  # [n, H, D]
        else:
            cross = self.cross_key if behaviours else self.cross_query
            assert cross is not None
            matrix = torch.addmm(other.reshape(-1), rows, cross)
        return matrix.reshape(-1, self.dim), offset
