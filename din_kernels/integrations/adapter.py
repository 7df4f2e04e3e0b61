"""What an adapter file tells ``din_kernels.convert`` about one class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

# Set on every converted module: the backend its kernels are asked for.
BACKEND = "din_kernels_backend"
# And whether an empty history pools to 0 where the library would give NaN.
EMPTY_AS_ZERO = "din_kernels_empty_as_zero"


@dataclass(frozen=True)
class Adapter:
    """
    fused     class that takes the module's place; None: nothing of it can be fused
    how       what runs fused, for the report, from the module's configuration
    why_not   reason to leave this module as it is, or None
    """

    fused: type[nn.Module] | None
    how: Callable[[Any], str] = lambda module: "fused"
    why_not: Callable[[Any], str | None] = lambda module: None
