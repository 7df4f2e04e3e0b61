"""Fused kernels for Deep Interest Networks: local activation unit, Dice, sparse embedding update with MBA regularization.

Importing this package touches neither CUDA nor the Triton driver, and works without Triton (torch backend).
"""

from ._backend import BackendUnavailable
from ._version import __version__

__all__ = ["BackendUnavailable", "__version__"]
