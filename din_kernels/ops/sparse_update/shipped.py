"""Every kernel configuration of the sparse update that must compile well on machines that are not here.

Tile shapes come from the function that the launches use, so the cases are a spread over widths, optimizers, precisions and
options.
"""

from __future__ import annotations

from typing import Any

import torch

from ..._tuning import CompileCase
from . import kernels
from .function import CHUNK, GROUP, OPTIMIZERS, REGULARIZERS, launch_config

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
_POINTERS = {
    "order": "*i64", "occurrences": "*i64", "carry_in": "*fp32", "carry_out": "*fp32", "counts_in": "*i32",
    "counts_out": "*i32", "group_sums": "*fp32", "found_inf": "*fp32", "ids": "*i64",
}  # fmt: skip
_HYPER = ("lr", "grad_scale", "bias", "seed")
_INTEGERS = {"N", "num_rows", "stride_gn", "stride_gd", "stride_w", "padding_idx", "seed"}


def _case(
    kernel: Any,
    width: int,
    optimizer: str = "sgd",
    regularizer: str = "mba",
    *,
    dtype: torch.dtype = torch.float32,
    keys: torch.dtype = torch.int32,
    suffix: str = "",
    on_device: bool = False,
    **options: Any,
) -> CompileCase:
    """``on_device``: rate, scale, bias and verdict are read there, as inside a CUDA graph."""
    config = launch_config(width, optimizer)
    everything = {
        "D": width, "BLOCK_D": config.block_d, "CHUNK": CHUNK, "GROUP": GROUP, "LANES": config.lanes,
        "UNROLL": config.unroll, "ROWS": config.rows, "OPTIMIZER": OPTIMIZERS.index(optimizer),
        "REGULARIZER": REGULARIZERS.index(regularizer), "COUPLED": True, "ROUNDING": False, "GROUPED": True,
        "HAS_FOUND_INF": on_device, "LR_POINTER": on_device, "SCALE_POINTER": on_device, "BIAS_POINTER": on_device,
        "SEED_POINTER": on_device, "BLOCK": 1024, "stride_gd": 1, **options,
    }  # fmt: skip
    constants = {name: value for name, value in everything.items() if name in kernel.arg_names}
    # A specialisation that has no state or no counts is launched with the table or the keys in their place.
    state = "*fp32" if optimizer != "sgd" else "*" + _TYPES[dtype]
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if on_device and name in _HYPER:
            signature[name] = "*i64" if name == "seed" else "*fp32"
        elif name in _INTEGERS:
            signature[name] = "i32"
        elif name in ("grad", "weight"):
            signature[name] = "*" + _TYPES[dtype]
        elif name in ("state0", "state1"):
            signature[name] = state
        elif name == "keys":
            signature[name] = "*" + _TYPES[keys]
        else:
            signature[name] = _POINTERS.get(name, "fp32")
    rows = {"update_chunks": config.lanes * config.unroll, "sum_groups": config.rows, "make_keys": 32}
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    if width % 16 == 0:
        aligned += [name for name in ("stride_gn", "stride_w") if name in signature]
    precision = "" if dtype is torch.float32 else f"-{_TYPES[dtype]}"
    return CompileCase(
        name=f"sparse_update/{kernel.__name__}/D{width}-{optimizer}-{regularizer}{precision}{suffix}",
        kernel=kernel, signature=signature, constexprs=constants,
        num_warps=4 if kernel is kernels.make_keys else config.num_warps, num_stages=3,
        rows=rows.get(kernel.__name__, config.rows), unit="occurrence" if kernel is kernels.update_chunks else "row",
        aligned=tuple(aligned),
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    updates = (kernels.update_chunks, kernels.finish_cut_runs)
    cases = [_case(kernels.make_keys, 64, suffix="-keys")]
    for width in (1, 8, 16, 18, 36, 64, 100, 128, 256, 512, 1024):
        cases += [_case(kernel, width) for kernel in (*updates, kernels.sum_groups)]
    for width in (18, 64, 128, 256, 1024):
        for optimizer in OPTIMIZERS[1:]:
            cases += [_case(kernel, width, optimizer) for kernel in updates]
    # What the options of a call change in the kernels.
    bf16 = torch.bfloat16
    for kernel in updates:
        cases += [
            _case(kernel, 64, "sgd", "none"),
            _case(kernel, 64, "adam", "difacto", suffix="-decoupled", COUPLED=False),
            _case(kernel, 64, "adam", "l2", on_device=True, suffix="-graph"),
            _case(kernel, 64, "sgd", dtype=bf16, ROUNDING=True, suffix="-stochastic"),
            _case(kernel, 256, "adam", dtype=bf16, ROUNDING=True, suffix="-stochastic"),
            _case(kernel, 64, "rowwise_adagrad", dtype=torch.float16, ROUNDING=True, on_device=True, suffix="-graph"),
            _case(kernel, 128, "adagrad", "mba", keys=torch.int64, suffix="-keys64"),
        ]
    return cases
