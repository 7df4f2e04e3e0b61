"""Configurations of the packed backward kernels of fp32 that must compile well on machines that are not here, for what
``packed_fp32_backward.fits`` lets through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..._tuning import CompileCase
from . import packed, packed_fp32_backward
from .problem import UnitConfig

_INDICES = {"first_slot", "tile_first", "slot_query", "slot_row"}
_NUMBERS = {"key_stride", "queries", "first_tile", "end_tile"}

# (activation, D, hidden widths, softmax, precision)
_SHAPES: tuple[tuple[str, int, tuple[int, ...], bool, str], ...] = (
    ("dice", 64, (36,), True, "ieee"),
    ("dice", 64, (36,), True, "tf32"),
    ("dice", 36, (36,), False, "ieee"),
    ("prelu", 64, (64,), True, "ieee"),
    ("sigmoid", 64, (36,), False, "ieee"),
    ("relu", 18, (20,), True, "ieee"),
    ("dice", 50, (36,), True, "ieee"),
    ("dice", 64, (64, 16), True, "ieee"),
    ("dice", 64, (32, 32), True, "ieee"),
    ("sigmoid", 64, (64, 16), False, "tf32"),
    ("prelu", 36, (32, 32), True, "ieee"),
)


def case(
    name: str, kernel: Any, config: UnitConfig, constants: dict[str, Any], options: dict[str, int], target: str
) -> CompileCase:
    everything = {
        **packed_fp32_backward.constants(config), "BIASES": 7 if len(config.hidden_units) > 1 else 3, "FAST": True,
        "CONTIGUOUS": True, "SOFTMAX": config.softmax, "BATCH_STATISTICS": config.uses_dice, "GATHER": -1,
        "HAS_GRAD_WEIGHTS": not config.softmax, **constants,
    }  # fmt: skip
    fixed = {k: v for k, v in everything.items() if k in kernel.arg_names}

    def kind(argument: str) -> str:
        if argument in _NUMBERS:
            return "i32"
        if argument == "scale":
            return "fp32"
        return "*i32" if argument in _INDICES else "*fp32"

    signature = {a: kind(a) for a in kernel.arg_names if a not in fixed}
    widths = "x".join(map(str, config.hidden_units))
    shape = f"D{config.embedding_dim}-{widths}-{config.activation}{'-softmax' if config.softmax else ''}"
    options = dict(options)
    return CompileCase(
        name=f"local_activation/packed/{name}/{shape}-{'tf32' if config.precision == 'tf32' else 'fp32'}",
        kernel=kernel, signature=signature, constexprs=fixed, rows=packed.TILE, targets=(target,),
        aligned=tuple(a for a, k in signature.items() if k.startswith("*") and a not in _INDICES),
        num_warps=options.pop("num_warps"), num_stages=options.pop("num_stages"), options=options,
    )  # fmt: skip


def cases_of(config: UnitConfig, capability: int) -> Iterator[CompileCase]:
    """Every launch of a backward pass."""
    from . import kernels_packed_fp32_backward as kernels

    rows, sums = packed_fp32_backward.ROW_OPTIONS, packed_fp32_backward.SUM_OPTIONS
    columns = {"BLOCK_D": packed_fp32_backward.input_columns(config.embedding_dim, capability)}
    of_sums = packed_fp32_backward.sum_constants(config, capability)
    launches: list[tuple[str, Any, dict[str, Any], dict[str, int]]] = [
        ("first-layer", kernels.backward_first_layer_fp32, {}, rows),
        ("scores", kernels.backward_scores_fp32, {}, rows),
        ("inputs", kernels.backward_inputs_fp32, columns, rows),
        ("first-sums", kernels.first_layer_sums_fp32, of_sums, sums),
    ]
    if config.uses_dice:
        launches += [
            (f"gather-{layer}", kernels.backward_scores_fp32, {"GATHER": layer}, rows)
            for layer in range(len(config.hidden_units))
        ]
    if len(config.hidden_units) > 1:
        launches.append(("second-sums", kernels.second_layer_sums_fp32, {}, sums))
    for name, kernel, constants, options in launches:
        yield case(f"{name}-{capability}", kernel, config, constants, options, f"sm_{capability}")


def compile_cases() -> Iterator[CompileCase]:
    for activation, dim, widths, softmax, precision in _SHAPES:
        config = UnitConfig("product", activation, dim, widths, softmax=softmax, precision=precision)
        for capability in (80, 90):
            if packed_fp32_backward.fits(config, capability):
                yield from cases_of(config, capability)
