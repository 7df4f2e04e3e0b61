"""Configurations of the tiled forward and statistics kernels that must compile well on machines that are not here: the
shapes of the benchmarks, the paper's own (outer, Dice, 36), and the widest that ``tiled.fits`` lets through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..._tuning import CompileCase
from . import packed, tiled
from .problem import UnitConfig

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INDICES = {"starts", "ends", "chunk_offsets", "chunk_list", "counts"}
_NUMBERS = {
    "item_rows", "key_stride", "num_lists", "candidates", "weight_row", "weight_candidate", "weight_list",
}  # fmt: skip

# (interaction, activation, D, hidden widths, softmax)
_FORWARD: tuple[tuple[str, str, int, tuple[int, ...], bool], ...] = (
    ("outer", "dice", 64, (36,), False),
    ("outer", "dice", 64, (80, 40), True),
    ("outer", "dice", 128, (80, 40), True),
    ("outer", "dice", 36, (36,), False),
    ("outer", "dice", 64, (128,), True),
    ("outer", "sigmoid", 64, (80, 40), False),
    ("outer", "prelu", 128, (64, 64), True),
    ("product", "sigmoid", 64, (36,), False),
    ("product", "sigmoid", 64, (64, 16), False),
    ("product", "dice", 64, (80, 40), False),
    ("product", "dice", 128, (80, 40), True),
    ("product", "prelu", 128, (80, 40), True),
)
# The same for lists so short that a tile has one warp: Dice with softmax.
_SHORT: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("outer", 64, (36,)),
    ("outer", 128, (36,)),
    ("product", 64, (36,)),
    ("product", 128, (36,)),
    ("product", 128, (32, 16)),
)
# The same in tf32: (interaction, activation, hidden widths), D = 64 and softmax.
_TF32: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("outer", "dice", (36,)),
    ("outer", "sigmoid", (80, 40)),
    ("outer", "prelu", (64,)),
    ("product", "dice", (36,)),
    ("product", "dice", (64,)),
    ("product", "dice", (48, 16)),
    ("product", "prelu", (32, 32)),
)
# (interaction, D, hidden widths, layer)
_STATISTICS: tuple[tuple[str, int, tuple[int, ...], int], ...] = (
    ("outer", 64, (36,), 0),
    ("outer", 64, (80, 40), 0),
    ("outer", 64, (80, 40), 1),
    ("product", 128, (80, 40), 0),
    ("product", 128, (80, 40), 1),
    ("product", 128, (64, 64), 1),
)


def case(
    name: str, kernel: Any, config: UnitConfig, dtype: torch.dtype, constants: dict[str, Any], like_keys: set[str],
    options: dict[str, Any], rows: int, targets: tuple[str, ...],
) -> CompileCase:  # fmt: skip
    """One case, forward or backward. ``constants``: those that ``kernel`` does not take are left out. ``like_keys``: tensors
    with the dtype of the keys."""
    fixed = {k: v for k, v in constants.items() if k in kernel.arg_names}

    def kind(argument: str) -> str:
        if argument in _NUMBERS:
            return "i32"
        if argument == "scale":
            return "fp32"
        if argument == "row_mask":
            return "*u8"
        if argument in _INDICES:
            return "*i64"
        return "*" + (_TYPES[dtype] if argument in like_keys else "fp32")

    signature = {a: kind(a) for a in kernel.arg_names if a not in fixed}
    widths = "x".join(map(str, config.hidden_units))
    shape = f"{config.interaction}-D{config.embedding_dim}-{widths}-{config.activation}"
    precision = "tf32" if dtype == torch.float32 else _TYPES[dtype]
    return CompileCase(
        name=f"local_activation/tiled/{name}/{shape}{'-softmax' if config.softmax else ''}-{precision}",
        kernel=kernel, signature=signature, constexprs=fixed, rows=rows, targets=targets,
        aligned=tuple(a for a, k in signature.items() if k.startswith("*") and a not in ("starts", "ends")),
        num_warps=options["num_warps"], num_stages=options["num_stages"],
        options={k: v for k, v in options.items() if k not in ("num_warps", "num_stages")},
    )  # fmt: skip


def _case(
    name: str, kernel: Any, config: UnitConfig, dtype: torch.dtype, extra: dict[str, Any], targets: tuple[str, ...], *,
    fast: bool = True, form: tiled.Form = tiled.LONG,
) -> CompileCase:  # fmt: skip
    constants = {
        **tiled.shape_constants(config, form), "HAS_MASK": False, "HAS_ATTENTION": False, "SOFTMAX": config.softmax,
        "PRECISION": packed.kernel_precision(config, dtype), "CONTIGUOUS": True,
        "FAST": fast, **extra,
    }  # fmt: skip
    like_keys = {"keys", "query", "weight2", "pooled"} | ({"first"} if config.interaction == "outer" else set())
    options = tiled.launch_options(config, dtype, form, statistics="LAYER" in extra)
    return case(name, kernel, config, dtype, constants, like_keys, options, form.rows, targets)


def compile_cases() -> Iterator[CompileCase]:
    from . import kernels_tiled_forward as kernels

    def cases(
        name: str, kernel: Any, config: UnitConfig, extra: dict[str, Any], fits: Callable[[int], bool],
        dtype: torch.dtype = torch.bfloat16,
    ) -> Iterator[CompileCase]:  # fmt: skip
        old = tiled.long_form(config, 80) if "TALL" in kernel.arg_names else tiled.LONG
        if fits(90) and fits(80) and old == tiled.LONG:
            yield _case(name, kernel, config, dtype, extra, ("sm_80", "sm_90"))
        elif fits(90):
            yield _case(f"{name}-90", kernel, config, dtype, extra, ("sm_90",))
            if fits(80):
                yield _case(f"{name}-80", kernel, config, dtype, extra, ("sm_80",), form=old)
        if fits(80):  # what AMD's GPUs count as
            yield _case(f"{name}-amd", kernel, config, dtype, extra, ("gfx942",), fast=False)

    # Short lists of narrow layers.
    for interaction, dim, widths in _SHORT:
        config = UnitConfig(interaction, "dice", dim, widths, softmax=True)
        assert tiled.fits_short(config, torch.bfloat16)
        both, options = ("sm_80", "sm_90"), {"HAS_MASK": True, "HAS_ATTENTION": True}
        kinds: list[tuple[str, Any, dict[str, Any]]] = [
            ("forward", kernels.forward_tiled, {}),
            ("forward-masked-attention", kernels.forward_tiled, options),
            (f"statistics{len(widths) - 1}", kernels.statistics_tiled, {"LAYER": len(widths) - 1}),
        ]
        for name, kernel, extra in kinds:
            yield _case(f"{name}-short", kernel, config, torch.bfloat16, extra, both, form=tiled.SHORT)
            yield _case(
                f"{name}-short-amd", kernel, config, torch.bfloat16, extra, ("gfx942",), fast=False, form=tiled.SHORT
            )
    for interaction, activation, dim, widths, softmax in _FORWARD:
        config = UnitConfig(interaction, activation, dim, widths, softmax=softmax)
        fits = partial(tiled.fits, config, torch.bfloat16)
        yield from cases("forward", kernels.forward_tiled, config, {}, fits)
        options = {"HAS_MASK": True, "HAS_ATTENTION": True}  # what else of a call takes registers
        if activation == "dice" and tiled.fits(config, torch.bfloat16, 90, masked=True, attention=True):
            yield from cases("forward-masked-attention", kernels.forward_tiled, config, options, fits)
    for interaction, dim, widths, layer in _STATISTICS:
        config = UnitConfig(interaction, "dice", dim, widths)
        fits = partial(tiled.fits_statistics, config, torch.bfloat16, layer=layer)
        yield from cases(f"statistics{layer}", kernels.statistics_tiled, config, {"LAYER": layer}, fits)
    for interaction, activation, widths in _TF32:
        config = UnitConfig(interaction, activation, 64, widths, softmax=True, precision="tf32")
        fits = partial(tiled.fits, config, torch.float32)
        yield from cases("forward", kernels.forward_tiled, config, {}, fits, torch.float32)
        attention = partial(tiled.fits, config, torch.float32, attention=True)
        yield from cases(
            "forward-attention", kernels.forward_tiled, config, {"HAS_ATTENTION": True}, attention, torch.float32
        )
        if config.uses_dice and len(widths) == 1:
            fits = partial(tiled.fits_statistics, config, torch.float32, layer=0)
            yield from cases("statistics0", kernels.statistics_tiled, config, {"LAYER": 0}, fits, torch.float32)
