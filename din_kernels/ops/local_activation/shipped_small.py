"""Cases of the small kernels around the large ones, for ``shipped.compile_cases``: numbering of work items, Dice's
statistics, what becomes of the packed backward's sums."""

from __future__ import annotations

from collections.abc import Iterator

from ..._tuning import CompileCase
from . import items, packed_collect
from .dice_statistics import BLOCK_H, BLOCK_P
from .packed import next_power_of_two


def compile_cases() -> Iterator[CompileCase]:
    yield from _items()
    yield from _parameters()
    yield from _statistics()
    yield from _collect()


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
    from .kernels_parameters import gather_parameters

    # Two layers with Dice of 80 and 40 channels in bf16, statistics of the first known, without biases.
    kinds = ("*bf16", "*bf16", "*fp32", "*fp32") * 2 + ("*bf16", "*bf16")
    yield CompileCase(
        name="local_activation/parameters/gather_parameters/80x40-dice-bf16", kernel=gather_parameters,
        signature={"vectors": kinds, "flat": "*fp32"}, num_warps=4, aligned=("flat",),
        constexprs={
            "SIZES": (80,) * 4 + (40,) * 4 + (40, 1), "STRIDES": (-1, 1, 1, 1, -1, 1, -1, -1, 1, -1), "BLOCK": 128
        },
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
        yield CompileCase(
            name=f"local_activation/collect/finish_gradients/{shape}", kernel=kernels.finish_gradients,
            signature={**signature, **numbers}, num_warps=4, aligned=tuple(signature),
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
    vectors = ("mean", "m2", "running_mean", "running_var")
    signature = {"count": "*fp64", **dict.fromkeys(vectors, "*fp32"), "tracked": "*i64", "momentum": "fp32"}
    yield CompileCase(
        name="local_activation/statistics/update_running/H80", kernel=kernels.update_running, signature=signature,
        num_warps=4, aligned=("count", *vectors, "tracked"),
        constexprs={"H": 80, "BLOCK_H": 128, "TRACKED": True, "CUMULATIVE": False},
    )  # fmt: skip
