"""Drop-in modules: same constructors and ``state_dict`` keys as their unfused twins under ``reference/``."""

from .dice import Dice, LinearDice, convert_sync_dice, linear_dice
from .local_activation import LocalActivationUnit
from .mba_embedding import MBAEmbedding

__all__ = ["Dice", "LinearDice", "LocalActivationUnit", "MBAEmbedding", "convert_sync_dice", "linear_dice"]
