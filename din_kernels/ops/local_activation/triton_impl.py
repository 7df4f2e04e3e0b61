"""The Triton backend of the local activation unit; the functions of ``torch_impl.py``, served by kernels.

The packed kernels take short lists of the product interaction, the tiled ones long lists, masks and the outer interaction
(backward: the outer interaction with one narrow layer), the universal ones what neither can. Dice's statistics are taken
on the path that the forward will take, where it has the registers.
"""

from __future__ import annotations

from torch import Tensor

from . import (
    dice_statistics,
    packed,
    packed_backward,
    packed_fp32_backward,
    packed_sums,
    tiled,
    tiled_backward,
    universal,
    universal_backward,
)
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors


class Calls:
    """What passes over the same tensors prepare once: slots or work items, the first layer's matrices."""

    def __init__(self, config: UnitConfig, tensors: UnitTensors) -> None:
        self.config, self.tensors = config, tensors
        self.packed: packed.Packed | None = None
        self.tiled: tiled.Tiled | None = None
        self.universal: universal.Prepared | None = None

    def moments_of_programs(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        config, tensors = self.config, self.tensors
        if tensors.starts.numel() == 0:
            return universal.no_moments(config, tensors, layer)
        by_tiled = tiled.serves_statistics(config, tensors, layer)
        if packed_sums.serves_statistics(config, tensors, layer) and not (by_tiled and tiled.prefers(config, tensors)):
            self.packed = self.packed or packed.Packed(config, tensors)
            return packed_sums.moments_of_programs(self.packed, layer)
        if by_tiled:
            self.tiled = self.tiled or tiled.Tiled(config, tensors, layers=layer)
            self.tiled.know(layer)
            return tiled.moments_of_programs(self.tiled, layer)
        self.universal = self.universal or universal.Prepared(config, tensors, layers=layer)
        self.universal.know(layer)
        return universal.moments_of_programs(self.universal, layer)

    def forward(self, *, return_weights: bool) -> UnitOutputs:
        config, tensors = self.config, self.tensors
        by_packed = packed.serves(config, tensors)
        rather_tiled = not by_packed or tiled.prefers(config, tensors)
        if rather_tiled and tiled.serves(config, tensors, attention=return_weights):
            return tiled.forward(config, tensors, return_weights=return_weights, call=self.tiled)
        if by_packed:
            return packed.forward(config, tensors, return_weights=return_weights, call=self.packed)
        return universal.forward(config, tensors, return_weights=return_weights, call=self.universal)


def dice_forward(
    config: UnitConfig, tensors: UnitTensors, running: list[tuple[Tensor, Tensor]], eps: list[float], *,
    return_weights: bool,
) -> tuple[UnitOutputs, list[dice_statistics.Used]]:  # fmt: skip
    """Forward in training with Dice; ``tensors.means`` and ``tensors.rstds`` are filled on the way."""
    calls = Calls(config, tensors)
    found: list[dice_statistics.Used] = []
    for layer, (mean, var) in enumerate(running):
        found.append(dice_statistics.finish(*calls.moments_of_programs(layer), mean, var, eps[layer]))
        tensors.means.append(found[-1].used_mean)
        tensors.rstds.append(found[-1].rstd)
    return calls.forward(return_weights=return_weights), found


def forward(config: UnitConfig, tensors: UnitTensors, *, return_weights: bool) -> UnitOutputs:
    return Calls(config, tensors).forward(return_weights=return_weights)


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    arguments = (config, tensors, saved, grad_pooled, grad_weights, inv_count)
    if packed_backward.serves_backward(config, tensors):
        return packed_backward.backward(*arguments)
    if packed_fp32_backward.serves_backward(config, tensors):
        return packed_fp32_backward.backward(*arguments)
    if tiled_backward.serves_backward(config, tensors, grad_weights):
        return tiled_backward.backward(*arguments)
    return universal_backward.backward(*arguments)
