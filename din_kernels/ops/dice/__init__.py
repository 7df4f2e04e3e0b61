"""Dice, the data-adaptive activation of Deep Interest Networks."""

from .api import dice
from .function import DiceFunction

__all__ = ["DiceFunction", "dice"]
