"""Cases of the small kernels around the large ones, for ``shipped.compile_cases``: numbering of work items, Dice's
statistics, the tables of the packed kernels, and what becomes of what their programs and items leave behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..._tuning import CompileCase
from . import first_layer, items, packed_collect, universal_backward
from .dice_statistics import BLOCK_H, BLOCK_P
from .packed import FINISH_LISTS, TABLE_BLOCK, TILE, finish_options, next_power_of_two
from .universal import COMBINE_BLOCK


def compile_cases() -> Iterator[CompileCase]:
    yield from _items()
    yield from _parameters()
    yield from _first_layer()
    yield from _statistics()
    yield from _collect()
    yield from _packed()
    yield from _slots()


def _items() -> Iterator[CompileCase]:
    from . import kernels_items as kernels

    shared = {"starts": "*i64", "ends": "*i64", "sums": "*i64"}
    numbers = {"item_rows": "i32", "num_lists": "i32"}
    yield CompileCase(
        name="local_activation/items/sum_chunks/i64", kernel=kernels.sum_chunks, signature={**shared, **numbers},
        constexprs={"BLOCK": items.BLOCK}, num_warps=4, aligned=("starts", "sums"),
    )  # fmt: skip
    outputs = {"chunk_offsets": "*i64", "chunk_list": "*i64"}
    for name, summed in (("few", False), ("many", True)):
        yield CompileCase(
            name=f"local_activation/items/make_chunks/{name}-i64", kernel=kernels.make_chunks,
            signature={**shared, **outputs, **numbers}, num_warps=4, aligned=("starts", "sums", *outputs),
            constexprs={"BLOCK": items.BLOCK, "BLOCK_SUMS": items.BLOCK_SUMS, "SUMMED": summed},
        )  # fmt: skip


def _parameters() -> Iterator[CompileCase]:
    from .kernels_parameters import gather_parameters, scatter_parameters

    # Two layers with Dice of 80 and 40 channels in bf16, statistics of the first known, without biases.
    kinds = ("*bf16", "*bf16", "*fp32", "*fp32") * 2 + ("*bf16", "*bf16")
    yield CompileCase(
        name="local_activation/parameters/gather_parameters/80x40-dice-bf16", kernel=gather_parameters,
        signature={"vectors": kinds, "flat": "*fp32"}, num_warps=4, aligned=("flat",),
        constexprs={
            "SIZES": (80,) * 4 + (40,) * 4 + (40, 1), "STRIDES": (-1, 1, 1, 1, -1, 1, -1, -1, 1, -1), "BLOCK": 128
        },
    )  # fmt: skip
    # The gradients of the same: of the first layer the slope, of the second all.
    yield CompileCase(
        name="local_activation/parameters/scatter_parameters/80x40-dice-bf16", kernel=scatter_parameters,
        signature={"private": "*fp32", "targets": ("*bf16",) * 6, "programs": "i32"}, num_warps=4, aligned=("private",),
        constexprs={
            "ROW": 3488, "PLACES": (80, 160, 200, 240, 280, 281), "SIZES": (80, 40, 40, 40, 1, 3200),
            "BLOCK": universal_backward.COLLECTED,
        },
    )  # fmt: skip


def _first_layer() -> Iterator[CompileCase]:
    from . import kernels_first_layer as kernels

    limited = {k: v for k, v in first_layer.options().items() if k != "num_warps"}
    for interaction, dim, width, kind, parts in (
        ("outer", 64, 36, "bf16", "bf16"),
        ("outer", 64, 36, "bf16", "fp32"),
        ("outer", 36, 36, "fp32", "fp32"),
        ("product", 64, 80, "bf16", "fp32"),
        ("product", 128, 256, "fp32", "fp32"),
    ):
        shape = f"D{dim}-{width}-{interaction}-{kind}-{parts}"
        given = {"query": f"*{kind}", "weight": f"*{kind}", "bias": f"*{kind}"}
        made = {"shared": f"*{parts}", "rest": f"*{parts}", "to_query": f"*{parts}", "offset": "*fp32"}
        for suffix, options, targets in (("", limited, ("sm_80", "sm_90")), ("-amd", {}, ("gfx942",))):
            yield CompileCase(
                name=f"local_activation/first_layer/take_apart/{shape}{suffix}",
                kernel=kernels.take_apart, signature={**given, **made, "queries": "i32", "query_blocks": "i32"},
                num_warps=4, aligned=(*given, *made), targets=targets, options=options,
                constexprs={
                    "D": dim, "H": width, "BLOCK_Q": first_layer.BLOCK_Q, "BLOCK_H": first_layer.BLOCK_H,
                    "BLOCK_D": first_layer.BLOCK_D, "BLOCK": first_layer.BLOCK, "OUTER": interaction == "outer",
                    "HAS_BIAS": True,
                },
            )  # fmt: skip
    for dim, kind in ((64, "bf16"), (36, "fp32")):
        pointers = {"products": "*fp32", "sums": "*fp32", "weight": f"*{kind}", "bias": f"*{kind}"}
        yield CompileCase(
            name=f"local_activation/first_layer/put_together/D{dim}-36-{kind}", kernel=kernels.put_together,
            signature=pointers, num_warps=4, aligned=tuple(pointers),
            constexprs={"D": dim, "H": 36, "BLOCK": first_layer.BLOCK, "HAS_BIAS": True},
        )  # fmt: skip


def _collect() -> Iterator[CompileCase]:
    from . import kernels_collect as kernels

    for dim, widths, kind in (
        (64, (36,), "bf16"),
        (64, (80, 40), "bf16"),
        (128, (128, 128), "bf16"),
        (64, (36,), "fp32"),
    ):
        first, second = (*widths, 0)[:2]
        shape = f"D{dim}-{'x'.join(map(str, widths))}-{kind}"
        inner = {"list_sums": "*fp32", "weight_parts": "*fp32", "bias_parts": "*fp32"}
        outer = {"query": f"*{kind}", "weight1": f"*{kind}", "grad_query": f"*{kind}"}
        for precision, targets in (("tf32x3", ("sm_80", "sm_90")), ("ieee", ("gfx942",))):
            yield CompileCase(
                name=f"local_activation/collect/finish_queries/{shape}{'-amd' if precision == 'ieee' else ''}",
                kernel=kernels.finish_queries, signature={**inner, **outer, "queries": "i32"},
                num_warps=4,
                rows=packed_collect.BLOCK_Q, unit="query", aligned=(*inner, *outer), targets=targets,
                constexprs={
                    "D": dim, "BLOCK_D": packed_collect.columns(first), "H": first, "BLOCK_H": next_power_of_two(first),
                    "BLOCK_Q": packed_collect.BLOCK_Q, "PRECISION": precision,
                },
            )  # fmt: skip
        sums = ("first_sums", "second_sums", "second_vectors", "vectors", "weight_parts", "bias_parts")
        gradients = ("weight1", "bias1", "weight2", "bias2", "weight_out", "bias_out", "alpha1", "alpha2")
        signature = {**dict.fromkeys(sums, "*fp32"), **dict.fromkeys(gradients, f"*{kind}")}
        numbers = {"programs": "i32", "query_programs": "i32", "unscale": "fp32"}
        limited = {k: v for k, v in finish_options().items() if k != "num_warps"}
        for suffix, options, targets in (("", limited, ("sm_80", "sm_90")), ("-amd", {}, ("gfx942",))):
            yield CompileCase(
                name=f"local_activation/collect/finish_gradients/{shape}{suffix}", kernel=kernels.finish_gradients,
                signature={**signature, **numbers}, num_warps=4, aligned=tuple(signature), options=options,
                targets=targets,
                constexprs={
                    "D": dim, "H1": first, "H2": second, "BLOCK": packed_collect.BLOCK, "BIASES": 7 if second else 3,
                    "HAS_ALPHA": True,
                },
            )  # fmt: skip


def _statistics() -> Iterator[CompileCase]:
    from . import kernels_statistics as kernels

    vectors = ("running_mean", "running_var", "mean", "m2", "used_mean", "used_rstd", "inverse")
    parts = {"counts": "*i64", "means": "*fp32", "m2s": "*fp32", "count": "*fp64"}
    signature = {**parts, **dict.fromkeys(vectors, "*fp32"), "num_parts": "i32", "eps": "fp32"}
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    for width in (36, 80):
        yield CompileCase(
            name=f"local_activation/statistics/finish_moments/H{width}", kernel=kernels.finish_moments,
            signature=signature, num_warps=4, rows=BLOCK_P, unit="part", aligned=pointers,
            constexprs={"H": width, "BLOCK_H": BLOCK_H, "BLOCK_P": BLOCK_P, "NORMALISE": True},
        )  # fmt: skip
    state = ("mean", "m2", "running_mean", "running_var")
    signature = {"count": "*fp64", **dict.fromkeys(state, "*fp32"), "tracked": "*i64", "momentum": "fp32"}
    yield CompileCase(
        name="local_activation/statistics/update_running/H80", kernel=kernels.update_running, signature=signature,
        num_warps=4, aligned=("count", *state, "tracked"),
        constexprs={"H": 80, "BLOCK_H": 128, "TRACKED": True, "CUMULATIVE": False},
    )  # fmt: skip


_LISTS = {"starts": "*i64", "ends": "*i64"}
_TABLES = {"first_slot": "*i32", "tile_first": "*i32", "slot_query": "*i32", "slot_row": "*i32"}
_WEIGHT_STRIDES = {"weight_row": "i32", "weight_candidate": "i32", "weight_list": "i32"}


def _pointers(signature: dict[str, str]) -> tuple[str, ...]:
    """Those that are tensors of their own; ``ends`` may begin one element into the offsets."""
    return tuple(name for name, kind in signature.items() if kind.startswith("*") and name not in _LISTS)


def _packed() -> Iterator[CompileCase]:
    """The tables of the packed kernels, and what follows them."""
    from . import kernels_packed_forward as forward
    from . import kernels_packed_sums as sums
    from . import kernels_packed_tables as tables

    numbers = {"candidates": "i32", "queries": "i32"}

    def case(
        name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], *, rows: int = 0,
        unit: str = "row", num_warps: int = 4,
    ) -> CompileCase:  # fmt: skip
        return CompileCase(
            name=f"local_activation/{name}", kernel=kernel, signature=signature, constexprs=constants, rows=rows,
            unit=unit, num_warps=num_warps, aligned=_pointers(signature),
        )  # fmt: skip

    block = {"BLOCK": TABLE_BLOCK}
    yield case("tables/sum_slots/i64", tables.sum_slots, {**_LISTS, "sums": "*i32", **numbers}, block)
    for name, summed in (("few", False), ("many", True)):
        signature = {**_LISTS, "sums": "*i32", "first_slot": "*i32", "tile_first": "*i32", **numbers}
        constants = {**block, "BLOCK_SUMS": 128, "SUMMED": summed}
        yield case(f"tables/make_tables/{name}-i64", tables.make_tables, signature, constants)
    yield case("tables/fill_slots/i64", tables.fill_slots, {**_LISTS, **_TABLES, **numbers}, {}, rows=TILE, unit="slot")

    # The weighted sums, and the sums of the backward, which stay in fp32; one column: those of softmax's backward.
    for dim, softmax, kind in ((64, True, "bf16"), (128, True, "fp32"), (36, False, "fp32"), (1, False, "fp32")):
        signature = {
            "carry": "*fp32", "carry_softmax": "*fp32", "first_slot": "*i32", "pooled": f"*{kind}",
            "log_normaliser": "*fp32", "queries": "i32",
        }  # fmt: skip
        constants = {"D": dim, "BLOCK_D": max(16, next_power_of_two(dim)), "LISTS": FINISH_LISTS, "SOFTMAX": softmax}
        name = f"packed/finish/D{dim}{'-softmax' if softmax else ''}-{kind}"
        finish = case(name, forward.finish_packed, signature, constants)
        limited = {k: v for k, v in finish_options().items() if k != "num_warps"}
        yield dataclasses.replace(finish, targets=("sm_80", "sm_90"), options=limited)
        yield dataclasses.replace(finish, targets=("gfx942",), name=f"{finish.name}-amd")
    for kind in ("bf16", "fp32"):
        signature = {"scores": "*fp32", "log_normaliser": "*fp32", "weights": f"*{kind}", **_TABLES}
        signature |= {"queries": "i32", "candidates": "i32", **_WEIGHT_STRIDES}
        yield case(f"packed/normalise/{kind}", forward.normalise_packed, signature, {}, rows=TILE)
        signature = {"weights": f"*{kind}", "grad_weights": f"*{kind}", **_TABLES, "sums": "*fp32", "carry": "*fp32"}
        signature |= {"queries": "i32"}
        name = f"packed/weighted-gradients/{kind}"
        yield case(name, sums.weighted_gradients_packed, signature, {}, rows=TILE, num_warps=2)


def _slots() -> Iterator[CompileCase]:
    """What follows the tiled and the universal kernels: slots of one query row added up, weights finished."""
    from . import kernels_universal_backward as backward
    from . import kernels_universal_forward as forward

    chunks = {"chunk_offsets": "*i64", "num_lists": "i32", "candidates": "i32"}

    def case(
        name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], rows: int = 0
    ) -> CompileCase:
        return CompileCase(
            name=f"local_activation/slots/{name}", kernel=kernel, signature=signature, constexprs=constants, rows=rows,
            num_warps=4, aligned=_pointers(signature),
        )  # fmt: skip

    for dim, softmax, kind in ((64, True, "bf16"), (256, True, "fp32"), (36, False, "fp32")):
        signature = {"partial": "*fp32", "partial_softmax": "*fp32", "pooled": f"*{kind}", "log_normaliser": "*fp32"}
        block = min(COMBINE_BLOCK, next_power_of_two(dim))
        constants = {"D": dim, "BLOCK_D": block, "BLOCK_K": 16, "SOFTMAX": softmax}
        name = f"combine/D{dim}{'-softmax' if softmax else ''}-{kind}"
        yield case(name, forward.combine_items, {**signature, **chunks}, constants)
    yield case(
        "add/fp32", backward.add_slots, {"slots": "*fp32", "width": "i32", **chunks}, {"BLOCK": 128, "BLOCK_K": 8}
    )

    shared = {**_LISTS, "row_mask": "*u8", "chunk_list": "*i64", "item_rows": "i32", **chunks, **_WEIGHT_STRIDES}
    for kind, mask in (("bf16", False), ("bf16", True), ("fp32", False)):
        constants = {"T": 128, "HAS_MASK": mask}
        shape = f"{'masked-' if mask else ''}{kind}"
        signature = {"scores": "*fp32", "log_normaliser": "*fp32", "weights": f"*{kind}", **shared}
        yield case(f"normalise/{shape}", forward.normalise_weights, signature, constants, rows=128)
        signature = {"weights": f"*{kind}", "grad_weights": f"*{kind}", "slots": "*fp32", **shared}
        yield case(f"weighted-gradients/{shape}", backward.weighted_gradients, signature, constants, rows=128)
