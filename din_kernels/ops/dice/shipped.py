"""Every kernel configuration of Dice that must compile well on machines that are not here.

Tilings come from the function that the launches use, so the cases are a spread over widths, precisions and options.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..._tuning import CompileCase
from . import kernels, kernels_backward, kernels_columns
from .tiling import columns_options, columns_tile, launch_options, tiling

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LIKE_X = {"x", "y", "grad", "dx"}
_COUNTS = {"num_rows", "rows_per_part", "num_parts", "x_stride", "grad_stride"}

_ROWS, _PROCESSORS = 65536, 132


def _case(
    kernel: Any,
    width: int,
    dtype: torch.dtype,
    suffix: str = "",
    *,
    heavy: bool = False,
    rows: int = _ROWS,
    **extra: Any,
) -> CompileCase:
    """``rows``: of a program that holds all of them (``*_columns``)."""
    tiles = tiling(rows, width, dtype.itemsize, _PROCESSORS, heavy=heavy)
    tile, options = (tiles.block_r, tiles.block_c), launch_options()
    if rows != _ROWS:
        backward = "grad" in kernel.arg_names
        found = columns_tile(rows, width, dtype.itemsize, backward=backward, strided=heavy)
        assert found is not None
        tile, options = found, columns_options(*found)
        suffix = f"-N{rows}{suffix}"
    unit = next(u for u in (16, 8, 4, 2, 1) if width % u == 0)
    everything = {
        "C": width, "X_UNIT": unit, "GRAD_UNIT": unit, "x_channel": 1, "grad_channel": 1, "alpha_stride": 1,
        "BLOCK_R": tile[0], "BLOCK_C": tile[1], "BLOCK_P": tiles.block_p,
        "HAS_MASK": False, "HAS_SHIFT": False, "AFFINE": False,
        "HAS_RUNNING": True, "HAS_TRACKED": True, "STEP_POINTER": False, "WRITE_DX": False, "MOMENTS": True, **extra,
    }  # fmt: skip
    constants = {name: value for name, value in everything.items() if name in kernel.arg_names}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in _COUNTS:
            signature[name] = "i32"
        elif name == "eps" or (name == "step" and not everything["STEP_POINTER"]):
            signature[name] = "fp32"
        elif name == "mask":
            signature[name] = "*u8"
        elif name == "tracked":
            signature[name] = "*i64"
        else:
            signature[name] = "*" + (_TYPES[dtype] if name in _LIKE_X else "fp32")
    options = dict(options)
    return CompileCase(
        name=f"dice/{kernel.__name__}/C{width}-{_TYPES[dtype]}{suffix}",
        kernel=kernel, signature=signature, constexprs=constants, num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"), options=options,
        rows=tile[0] * tile[1] // 32, unit="32 elements",
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*")),
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    two_passes = (
        kernels.moments_parts,
        kernels.apply_training,
        kernels_backward.sum_parts,
        kernels_backward.apply_gradient,
    )
    columns = (kernels_columns.forward_columns, kernels_columns.backward_columns)
    cases = []
    for width, dtype in ((256, fp32), (200, bf16), (36, fp32), (1, fp32)):
        cases += [_case(kernel, width, dtype) for kernel in (*two_passes, kernels.apply_running)]
    for width in (80, 8192):
        cases += [_case(kernel, width, fp16) for kernel in two_passes]
    for rows, width, dtype in (
        (4096, 200, fp32), (4096, 200, bf16), (4096, 1, fp32), (2048, 200, bf16), (1024, 8192, fp32), (256, 80, fp16),
        (32, 16, fp32),
    ):  # fmt: skip
        cases += [_case(kernel, width, dtype, rows=rows) for kernel in columns]
    # What the options of a call change in the kernels.
    options = {"HAS_MASK": True, "AFFINE": True}
    cases += [_case(kernel, 80, bf16, "-masked-affine", **options) for kernel in (*two_passes, kernels.apply_running)]
    cases += [_case(kernel, 80, bf16, "-masked-affine", rows=4096, **options) for kernel in columns]
    cases += [
        _case(kernels.apply_training, 80, bf16, "-cumulative", STEP_POINTER=True),
        _case(kernels.apply_training, 80, bf16, "-untracked", HAS_RUNNING=False, HAS_TRACKED=False),
        _case(kernels_backward.sum_parts, 80, bf16, "-evaluation", WRITE_DX=True),
        _case(kernels_backward.finish_parts, 256, fp32, "-moments"),
        _case(kernels_backward.finish_parts, 256, fp32, "-sums", MOMENTS=False),
    ]
    shifted_backward = (kernels_backward.sum_parts, kernels_backward.apply_gradient)
    for width, dtype in ((200, bf16), (80, fp32)):
        cases += [
            _case(kernel, width, dtype, "-shift", HAS_SHIFT=True)
            for kernel in (kernels.apply_training, kernels.apply_running)
        ]
        cases += [_case(kernel, width, dtype, "-shift", heavy=True, HAS_SHIFT=True) for kernel in shifted_backward]
        cases += [_case(kernel, width, dtype, "-shift", rows=4096, HAS_SHIFT=True) for kernel in columns]
    cases += [
        _case(kernels_backward.sum_parts, 80, bf16, "-shift-evaluation", heavy=True, HAS_SHIFT=True, WRITE_DX=True),
        _case(kernels_backward.finish_parts, 256, fp32, "-shift-sums", MOMENTS=False, HAS_SHIFT=True),
    ]
    cases += [_transposed(kernel) for kernel in (kernels.moments_parts, kernels_backward.apply_gradient)]
    return cases + [_transposed(kernel, rows=1024) for kernel in columns]


def _transposed(kernel: Any, **options: Any) -> CompileCase:
    """Channels that are not next to one another: a transposed x, or gradient."""
    case = _case(kernel, 64, torch.float32, "-transposed", heavy=True, **options)
    channels = {name: "i32" for name in case.constexprs if name.endswith("_channel")}
    return dataclasses.replace(
        case,
        signature={**case.signature, **channels},
        constexprs={name: value for name, value in case.constexprs.items() if name not in channels},
    )
