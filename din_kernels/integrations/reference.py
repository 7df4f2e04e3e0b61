"""This project's own unfused definitions: the fused modules have the same attributes, so they take their class."""

from __future__ import annotations

from torch import nn

import reference.units as units

from ..modules import Dice, LocalActivationUnit
from .adapter import Adapter

ADAPTERS: dict[type[nn.Module], Adapter] = {
    units.LocalActivationUnit: Adapter(LocalActivationUnit, lambda module: "whole unit"),
    units.Dice: Adapter(Dice, lambda module: "fused Dice"),
}
