"""Cases of the small kernels around Dice's statistics (``kernels_statistics.py``), for ``shipped.compile_cases``."""

from __future__ import annotations

from collections.abc import Iterator

from ..._tuning import CompileCase
from .dice_statistics import BLOCK_H, BLOCK_P


def compile_cases() -> Iterator[CompileCase]:
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
