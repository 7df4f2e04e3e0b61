"""Configurations of the universal kernels that read behaviours from tables, to be compiled ahead of time.

They are those of the unit over keys in memory, with the tables and ids in place of ``keys``: the same tilings must hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ..._tuning import CompileCase
from ..local_activation.problem import UnitConfig
from ..local_activation.shipped import _TYPES, _cases

# (interaction, activation, D, hidden widths); both tables D/2 wide
_SPREAD: tuple[tuple[str, str, int, tuple[int, ...]], ...] = (
    ("product", "dice", 64, (36,)),
    ("product", "sigmoid", 64, (80, 40)),
    ("outer", "dice", 64, (36,)),
    ("outer", "prelu", 18, (36,)),
    ("product", "dice", 128, (80, 40)),
)


def _gathered(case: CompileCase, dtype: torch.dtype) -> CompileCase:
    table = "*" + _TYPES[dtype]
    signature = {**case.signature, "keys": (table, table, "*i64", "*i64"), "key_stride": ("i32", "i32", "i32")}
    return dataclasses.replace(
        case, name=case.name.replace("local_activation/universal", "gathered_activation"), signature=signature
    )


def _all() -> Iterator[CompileCase]:
    from ..local_activation import kernels_universal_backward as down
    from ..local_activation import kernels_universal_forward as up

    for interaction, activation, dim, widths in _SPREAD:
        for dtype, precision in ((torch.float32, "tf32"), (torch.bfloat16, "ieee")):
            config = UnitConfig(interaction, activation, dim, widths, softmax=True, precision=precision)
            backward = {
                "HAS_GRAD_WEIGHTS": False, "BATCH_STATISTICS": config.uses_dice, "GATHER": -1, "MANY": False,
            }  # fmt: skip
            cases = [
                *_cases("forward", up.forward_items, config, dtype, {"HAS_ATTENTION": False}),
                *_cases("backward", down.backward_items, config, dtype, backward, backward=True),
            ]
            yield from (_gathered(case, dtype) for case in cases)


def compile_cases() -> list[CompileCase]:
    return list(_all())
