"""The Triton backend of the local activation unit; the functions of ``torch_impl.py``, served by kernels.

The packed kernels take short lists of the product interaction, the tiled ones long lists, masks and the outer interaction
(backward: the outer interaction with one narrow layer), the universal ones what neither can.
"""

from __future__ import annotations

from torch import Tensor

from . import packed, packed_backward, tiled, tiled_backward, universal, universal_backward
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors


def statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    path = tiled if tiled.serves_statistics(config, tensors, layer) else universal
    return path.statistics(config, tensors, layer)


def forward(config: UnitConfig, tensors: UnitTensors, *, return_weights: bool) -> UnitOutputs:
    by_packed = packed.serves(config, tensors)
    by_tiled = tiled.serves(config, tensors, attention=return_weights)
    if by_tiled and (not by_packed or tiled.prefers(config, tensors)):
        return tiled.forward(config, tensors, return_weights=return_weights)
    path = packed if by_packed else universal
    return path.forward(config, tensors, return_weights=return_weights)


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    arguments = (config, tensors, saved, grad_pooled, grad_weights, inv_count)
    if packed_backward.serves_backward(config, tensors, grad_weights):
        return packed_backward.backward(*arguments)
    if tiled_backward.serves_backward(config, tensors, grad_weights):
        return tiled_backward.backward(*arguments)
    return universal_backward.backward(*arguments)
