"""The Triton backend of the local activation unit; the functions of ``torch_impl.py``, served by kernels."""

from __future__ import annotations

from .universal import forward, statistics
from .universal_backward import backward

__all__ = ["backward", "forward", "statistics"]
