"""The scoring network above its first layer, forward and backward on one chunk of rows, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import UnitConfig, UnitTensors


@dataclass
class Recorded:
    """What one chunk's forward keeps for its backward: inputs z_l and outputs h_l of every activation, Dice's p_l."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    gates: list[Tensor | None]


class HiddenLayers:
    """φ_1, W_2, φ_2, …, w for one call; parameters widened to the compute dtype once."""

    def __init__(self, config: UnitConfig, tensors: UnitTensors, dtype: torch.dtype) -> None:
        self.kind = config.activation
        self.depth = len(config.hidden_units)
        self.weights = [w.to(dtype) for w in tensors.weights[1:]]
        self.biases = [None if b is None else b.to(dtype) for b in tensors.biases[1:]]
        self.alphas = [None if a is None else a.to(dtype) for a in tensors.alphas]
        self.means = [m.to(dtype) for m in tensors.means]
        self.rstds = [r.to(dtype) for r in tensors.rstds]

    def activate(self, layer: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """φ(z), and Dice's p."""
        if self.kind == "sigmoid":
            return torch.sigmoid(z), None
        if self.kind == "relu":
            return torch.relu(z), None
        alpha = self.alphas[layer]
        assert alpha is not None
        if self.kind == "prelu":
            return torch.where(z > 0, z, z * alpha), None
        gate = z.sub(self.means[layer]).mul_(self.rstds[layer]).sigmoid_()
        # y = z·(α + (1 − α)·p)
        return torch.addcmul(alpha.expand_as(z), gate, 1 - alpha).mul_(z), gate

    def linear(self, index: int, h: Tensor) -> Tensor:
        weight, bias = self.weights[index], self.biases[index]
        return h @ weight.t() if bias is None else torch.addmm(bias, h, weight.t())

    def up_to(self, layer: int, z1: Tensor) -> Tensor:
        """The pre-activation z of hidden layer ``layer`` (0 is the first)."""
        z = z1
        for index in range(layer):
            z = self.linear(index, self.activate(index, z)[0])
        return z

    def scores(self, z1: Tensor, record: Recorded | None = None) -> Tensor:
        """s [n] from z1 [n, H1]."""
        z = z1
        for layer in range(self.depth):
            h, gate = self.activate(layer, z)
            if record is not None:
                record.inputs.append(z)
                record.outputs.append(h)
                record.gates.append(gate)
            if layer + 1 < self.depth:
                z = self.linear(layer, h)
        score = torch.mv(h, self.weights[-1][0])
        bias = self.biases[-1]
        return score if bias is None else score.add_(bias)


class HiddenGradients:
    """Accumulates the gradients of everything above the first layer over the chunks.

    ``sums[l]`` holds Dice's two sums (Σ dx̂, Σ dx̂·x̂) of layer l times 1/count, once the pass for it has run.
    """

    def __init__(self, layers: HiddenLayers, config: UnitConfig, inv_count: Tensor | None) -> None:
        like = layers.weights[0]
        self.layers, self.inv_count = layers, inv_count
        self.weights = [torch.zeros_like(w) for w in layers.weights]
        self.biases = [None if b is None else torch.zeros_like(b) for b in layers.biases]
        self.alphas = [None if a is None else torch.zeros(h, dtype=like.dtype, device=like.device)
                       for a, h in zip(layers.alphas, config.hidden_units, strict=True)]  # fmt: skip
        self.sums: list[tuple[Tensor, Tensor] | None] = [None] * layers.depth

    def chunk(
        self, record: Recorded, grad_scores: Tensor, keep: Tensor | None, *, stop: int = 0, collect: bool = True
    ) -> Tensor:
        """From ds [n] to dz of layer ``stop`` [n, H]; ``keep`` [n] is False at padding rows (whose ds is 0).

        ``collect=False``: the pass that gathers Dice's sums of layer ``stop``; returns nothing of use and adds no
        parameter gradient.
        """
        layers = self.layers
        grad_hidden = grad_scores.unsqueeze(1) * layers.weights[-1]
        if collect:
            self.weights[-1].addmm_(grad_scores.unsqueeze(0), record.outputs[-1])
            if self.biases[-1] is not None:
                self.biases[-1] += grad_scores.sum()
        for layer in reversed(range(stop, layers.depth)):
            last = layer == stop
            grad_z = self._activation(layer, record, grad_hidden, gather_sums=last and not collect, collect=collect)
            if keep is not None and self.inv_count is not None:
                # A padding row's dh is 0, but its share of the batch means is not.
                grad_z = grad_z.masked_fill(~keep.unsqueeze(1), 0)
            if last:
                return grad_z
            weight = layers.weights[layer - 1]
            if collect:
                self.weights[layer - 1].addmm_(grad_z.t(), record.outputs[layer - 1])
                bias = self.biases[layer - 1]
                if bias is not None:
                    bias += grad_z.sum(0)
            grad_hidden = grad_z @ weight
        return grad_hidden

    def _activation(self, layer: int, record: Recorded, dh: Tensor, *, gather_sums: bool, collect: bool) -> Tensor:
        layers, z = self.layers, record.inputs[layer]
        if layers.kind == "sigmoid":
            h = record.outputs[layer]
            return torch.ops.aten.sigmoid_backward(dh, h)
        if layers.kind == "relu":
            return torch.ops.aten.threshold_backward(dh, record.outputs[layer], 0)
        alpha, grad_alpha = layers.alphas[layer], self.alphas[layer]
        assert alpha is not None
        assert grad_alpha is not None
        if layers.kind == "prelu":
            negative = z <= 0
            if collect:
                grad_alpha += (dh * z).masked_fill_(~negative, 0).sum(0)
            return torch.where(negative, dh * alpha, dh)
        gate = record.gates[layer]
        assert gate is not None
        dh_z = dh * z
        if collect:
            grad_alpha += dh_z.sum(0).sub_((dh_z * gate).sum(0))
        direct = torch.addcmul(alpha.expand_as(gate), gate, 1 - alpha).mul_(dh)
        grad_normalised = dh_z.mul_(1 - alpha).mul_(gate).mul_(1 - gate)
        if self.inv_count is None:
            return grad_normalised.mul_(layers.rstds[layer]).add_(direct)
        normalised = z.sub(layers.means[layer]).mul_(layers.rstds[layer])
        if gather_sums:
            first, second = self.sums[layer] or (torch.zeros_like(alpha), torch.zeros_like(alpha))
            self.sums[layer] = (first + grad_normalised.sum(0), second + (grad_normalised * normalised).sum(0))
            return grad_normalised
        sums = self.sums[layer]
        assert sums is not None
        inv_count = self.inv_count.to(z.dtype)
        grad_normalised.sub_(sums[0] * inv_count).sub_(normalised.mul_(sums[1] * inv_count))
        return grad_normalised.mul_(layers.rstds[layer]).add_(direct)
