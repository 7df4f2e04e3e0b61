"""Configurations of the tiled backward kernel that must compile well on machines that are not here: each step and the pass
that gathers Dice's sums, for what ``tiled_backward.fits`` lets through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..._tuning import CompileCase
from . import shipped_tiled, tiled_backward
from .problem import UnitConfig

_LIKE_KEYS = {"keys", "query", "weight2", "grad_pooled", "grad_weights", "grad_keys", "dz1", "h1", "dz2"}

# (activation, D, hidden width, softmax)
_SHAPES: tuple[tuple[str, int, int, bool], ...] = (
    ("dice", 64, 36, False),
    ("dice", 64, 36, True),
    ("dice", 36, 36, True),
    ("sigmoid", 64, 36, False),
    ("prelu", 18, 36, True),
    ("relu", 64, 48, True),
)
# What a launch is: GATHER and STEP.
_LAUNCHES = {"down": (-1, 1), "first-layer": (-1, 2), "gather": (0, 1)}


def _case(name: str, config: UnitConfig, constants: dict[str, Any], gather: int, step: int) -> CompileCase:
    from .kernels_tiled_backward import backward_tiled

    everything = {
        **tiled_backward.shape_constants(config), "SOFTMAX": config.softmax, "BATCH_STATISTICS": config.uses_dice,
        "GATHER": gather, "STEP": step, "PRECISION": "ieee", "CONTIGUOUS": True, "PRIVATE": 1 << 14, **constants,
    }  # fmt: skip
    return shipped_tiled.case(
        f"backward-{name}", backward_tiled, config, torch.bfloat16, everything, _LIKE_KEYS,
        tiled_backward.launch_options(), tiled_backward.TILE, ("sm_90",),
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    for activation, dim, width, softmax in _SHAPES:
        config = UnitConfig("outer", activation, dim, (width,), softmax=softmax)
        for name, (gather, step) in _LAUNCHES.items():
            if gather >= 0 and not config.uses_dice:
                continue
            for more in (False, True):
                if tiled_backward.fits(config, torch.bfloat16, 90, masked=more, through_weights=more):
                    constants = {"HAS_MASK": more, "HAS_GRAD_WEIGHTS": more, "FAST": True}
                    yield _case(f"{name}{'-masked-weights' if more else ''}", config, constants, gather, step)
