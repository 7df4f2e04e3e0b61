"""The unfused reference: modules that define what the kernels must equal, models, data, metrics and the trainer."""

from .units import Dice, LocalActivationUnit

__all__ = ["Dice", "LocalActivationUnit"]
