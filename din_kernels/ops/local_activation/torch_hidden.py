"""The scoring network above its first layer, forward and backward on one chunk of rows, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import UnitConfig, UnitTensors


@dataclass
class Recorded:
    """What one chunk's forward keeps for its backward: inputs z_l and outputs h_l of every activation, Dice's p_l."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    gates: list[Tensor | None]


class DiceParts(NamedTuple):
    """[n, H] each: dy·(α + (1 − α)·p), dx̂, and x̂ where it is the batch's (None with running statistics)."""

    direct: Tensor
    grad_normalised: Tensor
    normalised: Tensor | None


class HiddenLayers:
    """φ_1, W_2, φ_2, …, w for one call; parameters widened to the compute dtype once."""

    def __init__(self, config: UnitConfig, tensors: UnitTensors, dtype: torch.dtype) -> None:
        self.kind = config.activation
        self.depth = len(config.hidden_units)
        self.weights = [w.to(dtype) for w in tensors.weights[1:]]
        self.biases = [None if b is None else b.to(dtype) for b in tensors.biases[1:]]
        self.alphas = [None if a is None else a.to(dtype).reshape(-1) for a in tensors.alphas]
        self.means = [m.to(dtype) for m in tensors.means]
        self.rstds = [r.to(dtype) for r in tensors.rstds]

    def activate(self, layer: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """φ(z), and Dice's p. Sigmoid and ReLU overwrite z: their gradients need φ(z) alone."""
        if self.kind == "sigmoid":
            return z.sigmoid_(), None
        if self.kind == "relu":
            return z.relu_(), None
        alpha = self.alphas[layer]
        assert alpha is not None
        if self.kind == "prelu":
            return torch.prelu(z, alpha), None
        gate = z.sub(self.means[layer]).mul_(self.rstds[layer]).sigmoid_()
        # y = z·(α + (1 − α)·p)
        return torch.addcmul(alpha, gate, 1 - alpha).mul_(z), gate

    def linear(self, index: int, h: Tensor) -> Tensor:
        weight, bias = self.weights[index], self.biases[index]
        return h @ weight.t() if bias is None else torch.addmm(bias, h, weight.t())

    def up_to(self, layer: int, z1: Tensor) -> Tensor:
        """The pre-activation z of hidden layer ``layer`` (0 is the first)."""
        z = z1
        for index in range(layer):
            z = self.linear(index, self.activate(index, z)[0])
        return z

    def beyond(self, layer: int, z: Tensor) -> Tensor:
        """From the pre-activation of hidden layer ``layer`` to the next layer's, or to the scores after the last."""
        h = self.activate(layer, z)[0]
        return self.linear(layer, h) if layer + 1 < self.depth else self.output(h)

    def output(self, h: Tensor) -> Tensor:
        score = torch.mv(h, self.weights[-1][0])
        bias = self.biases[-1]
        return score if bias is None else score.add_(bias)

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
        return self.output(h)


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
            self._output_layer(record, grad_scores)
        for layer in reversed(range(stop, layers.depth)):
            last = layer == stop
            grad_z = self._activation(layer, record, grad_hidden, gather_sums=last and not collect, collect=collect)
            if keep is not None and self.inv_count is not None:
                # A padding row's dh is 0, but its share of the batch means is not.
                grad_z.masked_fill_(~keep.unsqueeze(1), 0)
            if last:
                return grad_z
            if collect:
                self._linear_below(layer, record, grad_z)
            grad_hidden = grad_z @ layers.weights[layer - 1]
        return grad_hidden

    def _activation(self, layer: int, record: Recorded, dh: Tensor, *, gather_sums: bool, collect: bool) -> Tensor:
        layers = self.layers
        if layers.kind == "sigmoid":
            return torch.ops.aten.sigmoid_backward(dh, record.outputs[layer])
        if layers.kind == "relu":
            return torch.ops.aten.threshold_backward(dh, record.outputs[layer], 0)
        z, alpha, grad_alpha = record.inputs[layer], layers.alphas[layer], self.alphas[layer]
        assert alpha is not None
        assert grad_alpha is not None
        if layers.kind == "prelu":
            negative = z <= 0
            if collect:
                grad_alpha += (dh * z).masked_fill_(~negative, 0).sum(0)
            return torch.where(negative, dh * alpha, dh)
        parts = self.dice_parts(layer, record, dh, collect=collect)
        if gather_sums:
            self.gather(layer, parts)
            return parts.grad_normalised
        return self.through_statistics(layer, parts)

    def dice_parts(self, layer: int, record: Recorded, dh: Tensor, *, collect: bool) -> DiceParts:
        """dy taken apart: what reaches z directly, and what reaches it through x̂ (dα is added on the way)."""
        layers, z, gate = self.layers, record.inputs[layer], record.gates[layer]
        alpha, grad_alpha = layers.alphas[layer], self.alphas[layer]
        assert gate is not None
        assert alpha is not None
        assert grad_alpha is not None
        through = dh * z
        through.mul_(1 - gate)  # dy·z·(1 − p)
        if collect:
            grad_alpha += through.sum(0)
        grad_normalised = through.mul_(gate).mul_(1 - alpha)
        direct = torch.addcmul(alpha, gate, 1 - alpha).mul_(dh)
        if self.inv_count is None:
            return DiceParts(direct, grad_normalised, None)
        return DiceParts(direct, grad_normalised, z.sub(layers.means[layer]).mul_(layers.rstds[layer]))

    def gather(self, layer: int, parts: DiceParts) -> None:
        """Add a chunk's Σ dx̂ and Σ dx̂·x̂."""
        grad_normalised, normalised = parts.grad_normalised, parts.normalised
        assert normalised is not None
        sums = (grad_normalised.sum(0), (grad_normalised * normalised).sum(0))
        before = self.sums[layer]
        self.sums[layer] = sums if before is None else (before[0] + sums[0], before[1] + sums[1])

    def through_statistics(self, layer: int, parts: DiceParts) -> Tensor:
        """dz from the parts, in their memory."""
        grad_normalised, normalised = parts.grad_normalised, parts.normalised
        if normalised is not None:
            sums = self.sums[layer]
            assert sums is not None
            assert self.inv_count is not None
            inv_count = self.inv_count.to(grad_normalised.dtype)
            grad_normalised.sub_(sums[0] * inv_count).addcmul_(normalised, sums[1] * inv_count, value=-1)
        return parts.direct.addcmul_(grad_normalised, self.layers.rstds[layer])

    def layer_by_layer(
        self, records: list[Recorded], grad_scores: list[Tensor], keeps: list[Tensor | None]
    ) -> list[Tensor]:
        """All chunks from ds to dz of the first layer at once, for Dice in training: a layer's sums over all chunks are
        known before any chunk goes below it, so nothing is computed twice. ``records`` are used up."""
        layers = self.layers
        for record, ds in zip(records, grad_scores, strict=True):
            self._output_layer(record, ds)
        grad_hidden = [ds.unsqueeze(1) * layers.weights[-1] for ds in grad_scores]
        for layer in reversed(range(layers.depth)):
            parts = []
            for record, dh in zip(records, grad_hidden, strict=True):
                part = self.dice_parts(layer, record, dh, collect=True)
                self.gather(layer, part)
                parts.append(part)
                record.inputs.pop(), record.gates.pop()  # of this layer, no longer needed: let the memory go
            grad_z = []
            for part, keep in zip(parts, keeps, strict=True):
                dz = self.through_statistics(layer, part)
                # A padding row's dh is 0, but its share of the batch means is not.
                grad_z.append(dz if keep is None else dz.masked_fill_(~keep.unsqueeze(1), 0))
            if layer == 0:
                return grad_z
            for record, dz in zip(records, grad_z, strict=True):
                self._linear_below(layer, record, dz)
            grad_hidden = [dz @ layers.weights[layer - 1] for dz in grad_z]
        return grad_hidden

    def _output_layer(self, record: Recorded, grad_scores: Tensor) -> None:
        self.weights[-1].addmm_(grad_scores.unsqueeze(0), record.outputs[-1])
        if self.biases[-1] is not None:
            self.biases[-1] += grad_scores.sum()

    def _linear_below(self, layer: int, record: Recorded, grad_z: Tensor) -> None:
        self.weights[layer - 1].addmm_(grad_z.t(), record.outputs[layer - 1])
        bias = self.biases[layer - 1]
        if bias is not None:
            bias += grad_z.sum(0)
