"""The scoring network above its first layer, forward and backward on one chunk of rows, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
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
        self.alphas = [None if a is None else a.to(dtype).reshape(-1) for a in tensors.alphas]
        self.means = [m.to(dtype) for m in tensors.means]
        self.rstds = [r.to(dtype) for r in tensors.rstds]

    def gate(self, layer: int, z: Tensor) -> Tensor:
        """Dice's p."""
        return z.sub(self.means[layer]).mul_(self.rstds[layer]).sigmoid_()

    def slope_(self, layer: int, gate: Tensor) -> Tensor:
        """y/z of Dice, α + (1 − α)·p, in the memory of p."""
        alpha = self.alphas[layer]
        assert alpha is not None
        return gate.mul_(1 - alpha).add_(alpha)

    def activate(self, layer: int, z: Tensor) -> Tensor:
        """φ(z). Sigmoid and ReLU overwrite z: their gradients need φ(z) alone."""
        if self.kind == "sigmoid":
            return z.sigmoid_()
        if self.kind == "relu":
            return z.relu_()
        if self.kind == "dice":
            return self.slope_(layer, self.gate(layer, z)).mul_(z)
        alpha = self.alphas[layer]
        assert alpha is not None
        return torch.prelu(z, alpha)

    def linear(self, index: int, h: Tensor) -> Tensor:
        weight, bias = self.weights[index], self.biases[index]
        return h @ weight.t() if bias is None else torch.addmm(bias, h, weight.t())

    def up_to(self, layer: int, z1: Tensor) -> Tensor:
        """The pre-activation z of hidden layer ``layer`` (0 is the first)."""
        z = z1
        for index in range(layer):
            z = self.linear(index, self.activate(index, z))
        return z

    def beyond(self, layer: int, z: Tensor) -> Tensor:
        """From the pre-activation of hidden layer ``layer`` to the next layer's, or to the scores after the last."""
        h = self.activate(layer, z)
        return self.linear(layer, h) if layer + 1 < self.depth else self.output(h)

    def output(self, h: Tensor) -> Tensor:
        score = torch.mv(h, self.weights[-1][0])
        bias = self.biases[-1]
        return score if bias is None else score.add_(bias)

    def scores(self, z1: Tensor, record: Recorded | None = None) -> Tensor:
        """s [n] from z1 [n, H1]."""
        z = z1
        for layer in range(self.depth):
            if record is None:
                h = self.activate(layer, z)
            else:
                gate = self.gate(layer, z) if self.kind == "dice" else None
                h = self.activate(layer, z) if gate is None else self.slope_(layer, gate.clone()).mul_(z)
                record.inputs.append(z)
                record.outputs.append(h)
                record.gates.append(gate)
            if layer + 1 < self.depth:
                z = self.linear(layer, h)
        return self.output(h)


class HiddenGradients:
    """Accumulates the gradients of everything above the first layer over the chunks.

    ``sums[l]`` holds Dice's two sums (Σ dx̂, Σ dx̂·x̂) of layer l once the pass for it has run.
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
            self.output_layer(record.outputs[-1], grad_scores)
        for layer in reversed(range(stop, layers.depth)):
            last = layer == stop
            grad_z = self._activation(layer, record, grad_hidden, gather_sums=last and not collect, collect=collect)
            if keep is not None and self.inv_count is not None:
                # A padding row's dh is 0, but its share of the batch means is not.
                grad_z.masked_fill_(~keep.unsqueeze(1), 0)
            if last:
                return grad_z
            if collect:
                self.linear_below(layer, record.outputs[layer - 1], grad_z)
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
        gate = record.gates[layer]
        assert gate is not None
        if self.inv_count is None:
            grad_normalised = self.dice_normalised(layer, z, gate, dh, collect=collect)
            return self.dice_direct(layer, gate.clone(), dh, grad_normalised)
        if gather_sums:
            self.gather(layer, z, self.dice_normalised(layer, z, gate, dh, collect=collect))
            return dh
        grad_normalised = self.dice_normalised(layer, z, gate, dh, collect=collect)
        return self.through_statistics(layer, self.dice_direct(layer, gate.clone(), dh, grad_normalised), z.clone())

    # -- Dice: y = z·(α + (1 − α)·p), p = σ(x̂), x̂ = (z − mean)·rstd, and mean and rstd may be those of the batch ----------

    def dice_normalised(self, layer: int, z: Tensor, gate: Tensor, dh: Tensor, *, collect: bool = True) -> Tensor:
        """dx̂ = dy·z·(1 − α)·p·(1 − p); adds to dα = Σ dy·z·(1 − p) on the way."""
        alpha, grad_alpha = self.layers.alphas[layer], self.alphas[layer]
        assert alpha is not None
        assert grad_alpha is not None
        closed = (1 - gate).mul_(z).mul_(dh)
        if collect:
            grad_alpha += closed.sum(0)
        return closed.mul_(gate).mul_(1 - alpha)

    def dice_direct(self, layer: int, gate: Tensor, dh: Tensor, grad_normalised: Tensor) -> Tensor:
        """What reaches z when the statistics stand still: dy·(α + (1 − α)·p) + dx̂·rstd. Uses up ``gate``."""
        return self.layers.slope_(layer, gate).mul_(dh).addcmul_(grad_normalised, self.layers.rstds[layer])

    def gather(self, layer: int, z: Tensor, grad_normalised: Tensor) -> None:
        """Add a chunk's Σ dx̂ and Σ dx̂·x̂. Uses up ``grad_normalised``."""
        first = grad_normalised.sum(0)
        second = grad_normalised.mul_(z - self.layers.means[layer]).sum(0) * self.layers.rstds[layer]
        before = self.sums[layer]
        self.sums[layer] = (first, second) if before is None else (before[0] + first, before[1] + second)

    def through_statistics(self, layer: int, direct: Tensor, z: Tensor) -> Tensor:
        """dz = direct − rstd/count·(Σ dx̂ + x̂·Σ dx̂·x̂), in the memory of ``direct``. Uses up z."""
        sums, rstd = self.sums[layer], self.layers.rstds[layer]
        assert sums is not None
        assert self.inv_count is not None
        share = rstd * self.inv_count.to(z.dtype)
        normalised = z.sub_(self.layers.means[layer]).mul_(rstd)
        return direct.sub_(share * sums[0]).addcmul_(normalised, share * sums[1], value=-1)

    # -- parameters of linear layers ---------------------------------------------------------------------------------------

    def output_layer(self, h: Tensor, grad_scores: Tensor) -> None:
        self.weights[-1].addmm_(grad_scores.unsqueeze(0), h)
        if self.biases[-1] is not None:
            self.biases[-1] += grad_scores.sum()

    def linear_below(self, layer: int, h: Tensor, grad_z: Tensor) -> None:
        self.weights[layer - 1].addmm_(grad_z.t(), h)
        bias = self.biases[layer - 1]
        if bias is not None:
            bias += grad_z.sum(0)


class DiceDescent:
    """Backward through Dice's batch statistics for all chunks side by side, so that nothing but gates is computed twice.

    A layer's sums must cover all chunks before any chunk goes below it: ``enter`` takes each chunk up to the scores and back
    to the last hidden layer, ``down`` takes all of them from layer to layer. Meanwhile a chunk holds its pre-activations and
    one gradient.
    """

    def __init__(self, hidden: HiddenGradients) -> None:
        self.hidden, self.layers = hidden, hidden.layers
        self.inputs: list[list[Tensor]] = []
        self.direct: list[Tensor] = []
        self.keeps: list[Tensor | None] = []

    def enter(
        self, z1: Tensor, keep: Tensor | None, score_gradients: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Add a chunk; returns its weights a. ``score_gradients`` maps scores to (a, ds)."""
        layers, top = self.layers, self.layers.depth - 1
        inputs = [z1]
        for layer in range(top):
            inputs.append(layers.linear(layer, layers.activate(layer, inputs[layer])))
        gate = layers.gate(top, inputs[top])
        h = layers.slope_(top, gate.clone()).mul_(inputs[top])
        a, ds = score_gradients(layers.output(h))
        self.hidden.output_layer(h, ds)
        self.inputs.append(inputs)
        self.keeps.append(keep)
        self.direct.append(self._part(top, inputs[top], gate, ds.unsqueeze(1) * layers.weights[-1]))
        return a

    def _part(self, layer: int, z: Tensor, gate: Tensor, dh: Tensor) -> Tensor:
        grad_normalised = self.hidden.dice_normalised(layer, z, gate, dh)
        direct = self.hidden.dice_direct(layer, gate, dh, grad_normalised)
        self.hidden.gather(layer, z, grad_normalised)
        return direct

    def down(self) -> list[Tensor]:
        """dz of the first layer, of every chunk."""
        layers, hidden = self.layers, self.hidden
        for layer in reversed(range(layers.depth)):
            for chunk, (inputs, keep) in enumerate(zip(self.inputs, self.keeps, strict=True)):
                dz = hidden.through_statistics(layer, self.direct[chunk], inputs.pop())
                if keep is not None:
                    # A padding row's dh is 0, but its share of the batch means is not.
                    dz.masked_fill_(~keep.unsqueeze(1), 0)
                if layer == 0:
                    continue
                below = inputs[layer - 1]
                gate = layers.gate(layer - 1, below)
                hidden.linear_below(layer, layers.slope_(layer - 1, gate.clone()).mul_(below), dz)
                self.direct[chunk] = self._part(layer - 1, below, gate, dz @ layers.weights[layer - 1])
        return self.direct
