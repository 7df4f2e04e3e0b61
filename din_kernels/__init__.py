"""Fused kernels for Deep Interest Networks: local activation unit, Dice, sparse embedding update with MBA regularization.

Importing this package touches neither CUDA nor the Triton driver, and works without Triton (torch backend).
"""

from . import functional, jagged, ops, optim
from ._backend import BackendUnavailable
from ._version import __version__
from .convert import convert
from .modules import Dice, LinearDice, LocalActivationUnit, MBAEmbedding, convert_sync_dice

__all__ = [
    "BackendUnavailable",
    "Dice",
    "LinearDice",
    "LocalActivationUnit",
    "MBAEmbedding",
    "__version__",
    "convert",
    "convert_sync_dice",
    "functional",
    "jagged",
    "ops",
    "optim",
]
