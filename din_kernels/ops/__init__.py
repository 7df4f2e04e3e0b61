"""The ``torch.autograd.Function`` classes behind the public calls.

Users want ``din_kernels.functional``, ``din_kernels.modules`` and ``din_kernels.optim``, which check their arguments; the
Functions expect the normal form that each operation's ``problem.py`` or ``function.py`` describes.
"""

from .dice.function import DiceFunction
from .gathered_activation.function import GatheredActivationFunction
from .local_activation.function import LocalActivationFunction
from .sparse_update.function import MBAEmbeddingFunction

__all__ = ["DiceFunction", "GatheredActivationFunction", "LocalActivationFunction", "MBAEmbeddingFunction"]
