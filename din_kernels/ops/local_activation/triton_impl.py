"""The Triton backend of the local activation unit; the functions of ``torch_impl.py``, served by kernels.

The packed kernels take the common shapes, the universal ones all others.
"""

from __future__ import annotations

from . import packed, universal
from .problem import UnitConfig, UnitOutputs, UnitTensors
from .universal import statistics
from .universal_backward import backward

__all__ = ["backward", "forward", "statistics"]


def forward(config: UnitConfig, tensors: UnitTensors, *, return_weights: bool) -> UnitOutputs:
    path = packed if packed.serves(config, tensors) else universal
    return path.forward(config, tensors, return_weights=return_weights)
