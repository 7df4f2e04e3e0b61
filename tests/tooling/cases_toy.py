"""Compile cases over the toy kernels: one that is fine, and one for each way to fail the static budget."""

from __future__ import annotations

from din_kernels._tuning import CompileCase

from . import kernels_toy as toy


def _matmul(
    name: str,
    *,
    d: int = 64,
    h: int = 32,
    extra: int = 0,
    stages: int = 2,
    targets: tuple[str, ...] = ("sm_80", "sm_90"),
    **options: int,
) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=toy.matmul_rows,
        signature={"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*fp32", "rows": "i32"},
        constexprs={"ROWS": 64, "D": d, "H": h, "EXTRA": extra},
        num_stages=stages,
        rows=64,
        aligned=("x_ptr", "w_ptr", "out_ptr"),
        targets=targets,
        options=options,
    )


def compile_cases() -> list[CompileCase]:
    return [
        _matmul("toy/matmul/fine"),
        _matmul("toy/matmul/slower", extra=1),
        _matmul("toy/matmul/spilling", h=128, extra=1, targets=("sm_80",), maxnreg=48),
        _matmul("toy/matmul/oversized", d=256, h=256, stages=8),
        CompileCase(
            name="toy/scale_rows/fine",
            kernel=toy.scale_rows,
            signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"},
            constexprs={"BLOCK": 1024},
            rows=1024,
            unit="element",
            aligned=("x_ptr", "out_ptr"),
        ),
        CompileCase(
            name="toy/broken/arguments",
            kernel=toy.scale_rows,
            signature={"x_ptr": "*fp32", "out": "*fp32", "n": "i32"},
            constexprs={"BLOCK": 1024},
        ),
    ]
