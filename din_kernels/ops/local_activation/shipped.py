"""Every kernel configuration of the local activation unit that must compile well on machines that are not here.

The packed kernels are compiled for the shapes of the benchmarks and the largest ones that they serve.
The universal kernels are compiled from whatever widths a model has, so the cases are a spread over them: both
interactions, one to three layers, narrow to the limit, every activation, all precisions. Their tilings come from
the functions that the launches use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..._tuning import CompileCase
from . import (
    packed,
    packed_backward,
    packed_sums,
    shipped_packed_fp32,
    shipped_small,
    shipped_tiled,
    shipped_tiled_backward,
)
from .problem import UnitConfig
from .universal import Tiling, kernel_precision, launch_options, shape_constants, tiling

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INDICES = {"starts", "ends", "chunk_offsets", "chunk_list", "counts"}
_LIKE_KEYS = {"keys", "query", "weight2", "weight3", "pooled", "grad_pooled", "grad_keys", "scratch", "hidden_scratch"}
_NUMBERS = {
    "item_rows", "key_stride", "num_lists", "candidates", "num_rows", "groups", "private_size",
    "weight_row", "weight_candidate", "weight_list",
}  # fmt: skip

# (interaction, activation, D, hidden widths)
_SPREAD: tuple[tuple[str, str, int, tuple[int, ...]], ...] = (
    ("product", "dice", 64, (36,)),
    ("product", "sigmoid", 64, (80, 40)),
    ("outer", "dice", 64, (80, 40)),
    ("product", "dice", 36, (64, 16)),
    ("outer", "prelu", 18, (36,)),
    ("product", "dice", 128, (200, 80)),
    ("outer", "relu", 8, (16, 8)),
    ("product", "dice", 256, (256, 256, 256)),
)
_PRECISIONS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"))


def _case(
    name: str,
    kernel: Any,
    config: UnitConfig,
    dtype: torch.dtype,
    extra: dict[str, Any],
    tiles: Tiling,
    targets: tuple[str, ...],
) -> CompileCase:
    everything = {
        **shape_constants(config, tiles), "HAS_MASK": False, "PRECISION": kernel_precision(config, dtype),
        "BLOCK_D": tiles.padded_dim, "DEPTH": len(config.hidden_units), "SOFTMAX": config.softmax, **extra,
    }  # fmt: skip
    constants = {k: v for k, v in everything.items() if k in kernel.arg_names}
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in _NUMBERS:
            signature[argument] = "i32"
        elif argument == "scale":
            signature[argument] = "fp32"
        elif argument == "row_mask":
            signature[argument] = "*u8"
        elif argument in _INDICES:
            signature[argument] = "*i64"
        else:
            signature[argument] = "*" + (_TYPES[dtype] if argument in _LIKE_KEYS else "fp32")
    pointers = tuple(a for a, kind in signature.items() if kind.startswith("*") and a not in ("starts", "ends"))
    aligned = (*pointers, "key_stride") if config.embedding_dim % 16 == 0 else pointers
    options = launch_options(tiles, crowded=constants.get("GATHER") == -1)
    widths = "x".join(map(str, config.hidden_units))
    precision = "tf32" if config.precision == "tf32" else _TYPES[dtype]
    return CompileCase(
        name=f"local_activation/universal/{name}/{config.interaction}-D{config.embedding_dim}-{widths}-"
        f"{config.activation}-{precision}",
        kernel=kernel, signature=signature, constexprs=constants, num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"), rows=tiles.rows, aligned=aligned, options=options, targets=targets,
    )  # fmt: skip


def _cases(
    name: str, kernel: Any, config: UnitConfig, dtype: torch.dtype, extra: dict[str, Any], *, backward: bool = False
) -> Iterator[CompileCase]:
    """One case where all targets share a tiling, else one for each."""
    older = tiling(config, dtype, backward=backward, capability=80)
    newer = tiling(config, dtype, backward=backward, capability=90)
    if older == newer:
        yield _case(name, kernel, config, dtype, extra, newer, ("sm_80", "sm_90", "gfx942"))
    else:
        # Known and left: three Dice layers in tf32 spill two registers a thread in the backward kernel on sm_80.
        known = len(config.hidden_units) == 3 and config.precision == "tf32" and extra.get("GATHER") == -1
        known = known and kernel.__name__ == "backward_items"
        yield _case(f"{name}-80", kernel, config, dtype, extra, older, ("gfx942",) if known else ("sm_80", "gfx942"))
        yield _case(f"{name}-90", kernel, config, dtype, extra, newer, ("sm_90",))


def _universal() -> Iterator[CompileCase]:
    from . import kernels_universal_backward as down
    from . import kernels_universal_forward as up

    for interaction, activation, dim, widths in _SPREAD:
        for dtype, precision in _PRECISIONS:
            config = UnitConfig(interaction, activation, dim, widths, softmax=True, precision=precision)
            yield from _cases("forward", up.forward_items, config, dtype, {"HAS_ATTENTION": False})
            backward = {
                "HAS_GRAD_WEIGHTS": False, "BATCH_STATISTICS": config.uses_dice, "GATHER": -1, "MANY": False,
            }  # fmt: skip
            yield from _cases("backward", down.backward_items, config, dtype, backward, backward=True)
            if config.uses_dice and dim == 64:
                yield from _cases("statistics", up.statistics_items, config, dtype, {"LAYER": len(widths) - 1})
                gather = {**backward, "GATHER": 0}
                yield from _cases("gather", down.backward_items, config, dtype, gather, backward=True)
    # What the options of a call change in the kernels.
    config = UnitConfig("product", "sigmoid", 64, (36,), candidates=3)
    for mask in (False, True):
        extra = {
            "HAS_MASK": mask, "HAS_ATTENTION": True, "HAS_GRAD_WEIGHTS": True, "BATCH_STATISTICS": False, "GATHER": -1,
            "MANY": True,
        }  # fmt: skip
        suffix = "-masked" if mask else ""
        yield from _cases(f"forward-attention{suffix}", up.forward_items, config, torch.bfloat16, extra)
        yield from _cases(
            f"backward-candidates{suffix}", down.backward_items, config, torch.bfloat16, extra, backward=True
        )


# (activation, D, hidden widths, softmax)
_PACKED: tuple[tuple[str, int, tuple[int, ...], bool], ...] = (
    ("sigmoid", 64, (36,), False),
    ("sigmoid", 64, (80, 40), False),
    ("sigmoid", 128, (80, 40), False),
    ("relu", 64, (64, 64), False),
    ("prelu", 64, (36,), True),
    ("prelu", 64, (80, 40), False),
    ("dice", 36, (36,), False),
    ("dice", 64, (36,), True),
    ("dice", 64, (64, 16), False),
    ("dice", 64, (80, 40), False),
    ("dice", 18, (80, 40), True),
    ("dice", 128, (64, 64), True),
)
# Dice in training, what needs all rows first: (D, hidden widths), of sums with softmax or without.
_PACKED_STATISTICS = (
    (36, (36,)),
    (64, (36,)),
    (64, (80, 40)),
    (64, (64, 32)),
    (64, (64, 64)),
    (128, (36, 36)),
    (128, (80, 40)),
    (128, (64, 64)),
)
_PACKED_SUMS = (
    (36, (36,), False),
    (64, (36,), False),
    (64, (36,), True),
    (64, (32, 32), False),
    (64, (32, 16), True),
    (64, (64,), True),
    (64, (64, 32), True),
    (36, (80, 40), False),
    (64, (80, 40), True),
    (128, (36,), False),
    (128, (64, 64), True),
)
# As ``_PACKED``, with the precision of fp32's products.
_PACKED_FP32: tuple[tuple[str, int, tuple[int, ...], bool, str], ...] = (
    ("sigmoid", 64, (36,), False, "ieee"),
    ("prelu", 64, (36,), True, "ieee"),
    ("dice", 64, (36,), True, "ieee"),
    ("dice", 36, (36,), True, "ieee"),
    ("dice", 64, (32, 32), True, "ieee"),
    ("sigmoid", 64, (64, 64), True, "ieee"),
    ("dice", 64, (64, 64), True, "tf32"),
    ("sigmoid", 64, (36,), False, "tf32"),
    ("dice", 64, (36,), True, "tf32"),
)
_TABLES = {"first_slot", "tile_first", "slot_query", "slot_row"}
_PACKED_LIKE_KEYS = {
    "keys", "query", "weight1", "bias1", "alpha1", "weight2", "bias2", "alpha2", "weight_out", "bias_out", "pooled",
    "grad_pooled", "grad_weights", "grad_keys", "dz1", "h1", "dz2",
}  # fmt: skip
_PACKED_NUMBERS = _NUMBERS | {"queries", "first_tile", "end_tile"}


def _packed_case(
    name: str, kernel: Any, config: UnitConfig, dtype: torch.dtype, extra: dict[str, Any], options: dict[str, int],
    targets: tuple[str, ...], fast: bool,
) -> CompileCase:  # fmt: skip
    two = len(config.hidden_units) > 1
    everything = {
        **packed.shape_constants(config), "BIASES": 7 if two else 3, "FAST": fast, "CONTIGUOUS": True,
        "PRECISION": packed.kernel_precision(config, dtype), "SOFTMAX": config.softmax,
        "WGMMA": "sm_90" in targets, **extra,
    }  # fmt: skip
    constants = {k: v for k, v in everything.items() if k in kernel.arg_names}

    def kind(argument: str) -> str:
        if argument in _PACKED_NUMBERS:
            return "i32"
        if argument == "scale":
            return "fp32"
        if argument in _TABLES:
            return "*i32"
        if argument in ("starts", "ends", "counts"):
            return "*i64"
        return "*" + (_TYPES[dtype] if argument in _PACKED_LIKE_KEYS else "fp32")

    signature = {a: kind(a) for a in kernel.arg_names if a not in constants}
    aligned = tuple(a for a, k in signature.items() if k.startswith("*") and a not in (*_TABLES, "starts", "ends"))
    widths = "x".join(map(str, config.hidden_units))
    precision = "tf32" if config.precision == "tf32" else _TYPES[dtype]
    softmax = "-softmax" if config.softmax else ""
    return CompileCase(
        name=f"local_activation/packed/{name}{'' if fast else '-amd'}/D{config.embedding_dim}-{widths}-"
        f"{config.activation}{softmax}-{precision}",
        kernel=kernel, signature=signature, constexprs=constants, rows=packed.TILE, aligned=aligned, targets=targets,
        num_warps=options["num_warps"], num_stages=options["num_stages"], stack=_stack(kernel, config),
    )  # fmt: skip


def _stack(kernel: Any, config: UnitConfig) -> int:
    """Wide layers with Dice or PReLU: ptxas keeps what never changes on the stack, such as descriptors of the tensor cores'
    operands, of which there are more than uniform registers. A few per cent of the instructions; the universal kernels take
    several times as many."""
    wide = config.activation in ("dice", "prelu") and sum(packed_sums.channels(config)) > 64
    kept = ("forward_packed", "statistics_packed", "backward_scores", "backward_sums")
    return 128 if wide and kernel.__name__ in kept else 0


def _packed() -> Iterator[CompileCase]:
    from . import kernels_packed_backward as down
    from . import kernels_packed_forward as up
    from . import kernels_packed_fp32 as fp32
    from . import kernels_packed_gradients as after
    from . import kernels_packed_statistics as statistics
    from . import kernels_packed_sums as sums

    def cases(
        name: str, kernel: Any, config: UnitConfig, dtype: torch.dtype, extra: dict[str, Any], options: dict[str, int],
        fits: Callable[[UnitConfig, torch.dtype, int], bool],
    ) -> Iterator[CompileCase]:  # fmt: skip
        targets = tuple(t for t, capability in (("sm_80", 80), ("sm_90", 90)) if fits(config, dtype, capability))
        if "WGMMA" in kernel.arg_names and targets == ("sm_80", "sm_90"):
            yield _packed_case(f"{name}-80", kernel, config, dtype, extra, options, ("sm_80",), True)
            yield _packed_case(name, kernel, config, dtype, extra, options, ("sm_90",), True)
        elif targets:
            yield _packed_case(name, kernel, config, dtype, extra, options, targets, True)
        if "sm_80" in targets:  # what AMD's GPUs count as
            yield _packed_case(name, kernel, config, dtype, extra, options, ("gfx942",), False)

    def kinds(
        config: UnitConfig, dtype: torch.dtype
    ) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int], Callable[..., bool]]]:
        widths, dim = packed.widths_of(config), config.embedding_dim
        plain, ahead = packed_backward.ROW_OPTIONS, packed_backward.SUM_OPTIONS
        yield "forward", up.forward_packed, {"HAS_ATTENTION": False}, packed.launch_options(config), packed.fits
        scores = {
            "HAS_GRAD_WEIGHTS": False, "BATCH_STATISTICS": config.uses_dice,
            "HANDS_ON": config.uses_dice and packed_sums.hands_on(config),
        }  # fmt: skip
        yield "scores", down.backward_scores, scores, plain, packed_backward.fits
        yield "inputs", after.backward_inputs, {}, plain, packed_backward.fits
        block = {
            "BLOCK_D": packed_backward.sum_columns(dim),
            "H": config.hidden_units[0],
            "A": widths.a1,
            "R": widths.r1,
        }
        yield "first-sums", after.first_layer_sums, block, ahead, packed_backward.fits
        if len(config.hidden_units) > 1:
            yield "second-sums", after.second_layer_sums, {}, ahead, packed_backward.fits

    for activation, dim, widths, softmax in _PACKED:
        config = UnitConfig("product", activation, dim, widths, softmax=softmax)
        for name, kernel, extra, options, fits in kinds(config, torch.bfloat16):
            yield from cases(name, kernel, config, torch.bfloat16, extra, options, fits)
    for dim, widths in _PACKED_STATISTICS:
        config = UnitConfig("product", "dice", dim, widths)
        options = packed_sums.statistics_options(config)
        for layer in range(len(widths)):
            fits = partial(packed_sums.fits_statistics, layer=layer)
            extra = {"LAYER": layer}
            yield from cases(
                f"statistics{layer}", statistics.statistics_packed, config, torch.bfloat16, extra, options, fits
            )
    for dim, widths, softmax in _PACKED_SUMS:
        config = UnitConfig("product", "dice", dim, widths, softmax=softmax)
        options, fits = packed_sums.OPTIONS, packed_backward.fits
        for layer in range(len(widths)):
            extra = {"LAYER": layer, "HAS_GRAD_WEIGHTS": False, "HANDS_ON": packed_sums.hands_on(config)}
            yield from cases(f"sums{layer}", sums.backward_sums, config, torch.bfloat16, extra, options, fits)
    for activation, dim, widths, softmax, precision in _PACKED_FP32:
        config = UnitConfig("product", activation, dim, widths, softmax=softmax, precision=precision)
        extra = {**packed.fp32_constants(config), "HAS_ATTENTION": False}
        yield from cases(
            "forward", fp32.forward_packed_fp32, config, torch.float32, extra, packed.FP32_OPTIONS, packed.fits
        )


def compile_cases() -> list[CompileCase]:
    return [
        *_packed(),
        *shipped_packed_fp32.compile_cases(),
        *shipped_tiled.compile_cases(),
        *shipped_tiled_backward.compile_cases(),
        *_universal(),
        *shipped_small.compile_cases(),
    ]
