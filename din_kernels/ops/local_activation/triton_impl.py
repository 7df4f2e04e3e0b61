"""The Triton backend of the local activation unit; the functions of ``torch_impl.py``, served by kernels.

The packed kernels take the common shapes, the universal ones all others.
"""

from __future__ import annotations

from torch import Tensor

from . import packed, packed_backward, universal, universal_backward
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .universal import statistics

__all__ = ["backward", "forward", "statistics"]


def forward(config: UnitConfig, tensors: UnitTensors, *, return_weights: bool) -> UnitOutputs:
    path = packed if packed.serves(config, tensors) else universal
    return path.forward(config, tensors, return_weights=return_weights)


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    served = packed_backward.serves_backward(config, tensors, grad_weights)
    path = packed_backward if served else universal_backward
    return path.backward(config, tensors, saved, grad_pooled, grad_weights, inv_count)
