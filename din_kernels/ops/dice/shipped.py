"""Every kernel configuration of Dice that must compile well on machines that are not here.

Tilings come from the function that the launches use, so the cases are a spread over widths, precisions and options.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..._tuning import CompileCase
from . import kernels, kernels_backward
from .triton_impl import launch_options, tiling

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LIKE_X = {"x", "y", "grad", "dx"}
_COUNTS = {"num_rows", "rows_per_part", "num_parts", "x_stride", "grad_stride"}

_ROWS, _PROCESSORS = 65536, 132


def _case(
    kernel: Any, width: int, dtype: torch.dtype, suffix: str = "", *, heavy: bool = False, **extra: Any
) -> CompileCase:
    tiles = tiling(_ROWS, width, dtype.itemsize, _PROCESSORS, heavy=heavy)
    unit = next(u for u in (16, 8, 4, 2, 1) if width % u == 0)
    everything = {
        "C": width, "X_UNIT": unit, "GRAD_UNIT": unit, "x_channel": 1, "grad_channel": 1, "alpha_stride": 1,
        "BLOCK_R": tiles.block_r, "BLOCK_C": tiles.block_c, "BLOCK_P": tiles.block_p,
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
    options = launch_options(crowded=not kernel.__name__.endswith("_columns"))
    return CompileCase(
        name=f"dice/{kernel.__name__}/C{width}-{_TYPES[dtype]}{suffix}",
        kernel=kernel, signature=signature, constexprs=constants, num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"), options=options,
        rows=tiles.block_r * tiles.block_c // 32, unit="32 elements",
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*")),
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    two_passes = (
        kernels.moments_parts,
        kernels.apply_training,
        kernels_backward.sum_parts,
        kernels_backward.apply_gradient,
    )
    one_pass = (kernels.apply_running, kernels.forward_columns, kernels_backward.backward_columns)
    cases = []
    for width, dtype in ((256, torch.float32), (200, torch.bfloat16), (36, torch.float32), (1, torch.float32)):
        cases += [_case(kernel, width, dtype) for kernel in (*two_passes, *one_pass)]
    for width in (80, 8192):
        cases += [_case(kernel, width, torch.float16) for kernel in two_passes]
    # What the options of a call change in the kernels.
    bf16 = torch.bfloat16
    cases += [
        _case(kernel, 80, bf16, "-masked-affine", HAS_MASK=True, AFFINE=True) for kernel in (*two_passes, *one_pass)
    ]
    cases += [
        _case(kernels.apply_training, 80, bf16, "-cumulative", STEP_POINTER=True),
        _case(kernels.apply_training, 80, bf16, "-untracked", HAS_RUNNING=False, HAS_TRACKED=False),
        _case(kernels_backward.sum_parts, 80, bf16, "-evaluation", WRITE_DX=True),
        _case(kernels_backward.finish_parts, 256, torch.float32, "-moments"),
        _case(kernels_backward.finish_parts, 256, torch.float32, "-sums", MOMENTS=False),
    ]
    shifted_forward = (kernels.apply_training, kernels.apply_running, kernels.forward_columns)
    shifted_backward = (kernels_backward.sum_parts, kernels_backward.apply_gradient, kernels_backward.backward_columns)
    for width, dtype in ((200, bf16), (80, torch.float32)):
        cases += [_case(kernel, width, dtype, "-shift", HAS_SHIFT=True) for kernel in shifted_forward]
        cases += [_case(kernel, width, dtype, "-shift", heavy=True, HAS_SHIFT=True) for kernel in shifted_backward]
    cases += [
        _case(kernels_backward.sum_parts, 80, bf16, "-shift-evaluation", heavy=True, HAS_SHIFT=True, WRITE_DX=True),
        _case(kernels_backward.finish_parts, 256, torch.float32, "-shift-sums", MOMENTS=False, HAS_SHIFT=True),
    ]
    return cases + [_transposed(kernel) for kernel in (kernels.moments_parts, kernels_backward.apply_gradient)]


def _transposed(kernel: Any) -> CompileCase:
    """Channels that are not next to one another: a transposed x, or gradient."""
    case = _case(kernel, 64, torch.float32, "-transposed", heavy=True)
    channels = {name: "i32" for name in case.constexprs if name.endswith("_channel")}
    return dataclasses.replace(
        case,
        signature={**case.signature, **channels},
        constexprs={name: value for name, value in case.constexprs.items() if name not in channels},
    )
