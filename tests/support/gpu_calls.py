"""Public calls for ``fake_launch.gpu``, forward and backward: what models and optimizers really pass to the kernels.

    python -m tests.support.gpu_calls [--only PATTERN] [--capability 90] [--bind]

prints one JSON object: call -> {"error": None or what went wrong, "launches": [...]}. ``--bind`` stops before compilation.
Run without ``TRITON_INTERPRET``, as kernels imported under it cannot be compiled.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import din_kernels
from din_kernels.functional import dice, init_state, sparse_update_
from din_kernels.ops.gathered_activation.api import gathered_activation
from din_kernels.ops.local_activation.function import RunningStatistics

from .fake_launch import Tape, gpu

CALLS: dict[str, Callable[[Tape], None]] = {}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICE, memory = "cuda", torch.empty  # ``recorded_launch`` has others


def tensor(*shape: int, dtype: torch.dtype = FP32, grad: bool = True) -> Tensor:
    """Strided memory of ``shape`` on the GPU."""
    made = memory(shape, dtype=dtype, device=DEVICE)
    return made.requires_grad_() if grad and dtype.is_floating_point else made


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return memory(shape, dtype=dtype, device=DEVICE)


# ---- local activation ---------------------------------------------------------------------------------------


def unit(
    tape: Tape, interaction: str, activation: str, dim: int, hidden: tuple[int, ...], *, dtype: torch.dtype = BF16,
    layout: str = "offsets", index: torch.dtype = torch.int64, batch: int = 7, length: int = 40, candidates: int = 0,
    softmax: bool = False, training: bool = False, bias: bool = True, return_weights: bool = False, skew: int = 0,
    gathered: bool = False,
) -> None:  # fmt: skip
    """``skew``: elements by which keys lie off the start of their memory, in rows that much wider."""
    features = 4 * dim if interaction == "product" else dim * (dim + 2)
    widths = [features, *hidden, 1]
    weights = [tensor(o, i, dtype=dtype) for i, o in itertools.pairwise(widths)]
    biases = [tensor(o, dtype=dtype) if bias else None for o in widths[1:]]
    alphas = running = None
    if activation in ("dice", "prelu"):
        alphas = [tensor(h if activation == "dice" else 1, dtype=dtype) for h in hidden]
    if activation == "dice":
        running = [RunningStatistics(tensor(h, grad=False), tensor(h, grad=False)) for h in hidden]
    shared: dict[str, Any] = {
        "interaction": interaction, "activation": activation, "alphas": alphas, "running": running, "training": training,
        "softmax": softmax, "return_weights": return_weights, "scale": 0.125 if softmax else None,
    }  # fmt: skip
    many = (candidates,) if candidates else ()
    if gathered:
        half, rows = dim // 2, batch * length
        gathered_activation(
            indices(batch, *many), indices(batch, *many), indices(rows), indices(rows, dtype=index),
            tensor(50, half, dtype=dtype), tensor(9, dim - half, dtype=dtype), weights, biases,
            offsets=indices(batch + 1, dtype=index), **shared,
        )  # fmt: skip
    else:
        query = tensor(batch, *many, dim, dtype=dtype)
        if layout == "offsets":
            keys = tensor(batch * length, dim + skew, dtype=dtype)[:, skew:]
            given = {"offsets": indices(batch + 1, dtype=index)}
        else:
            keys = tensor(batch, length, dim, dtype=dtype)
            given = {"lengths": indices(batch, dtype=index)}
            if layout == "mask":
                given = {"mask": indices(batch, length, dtype=torch.bool)}
        din_kernels.functional.local_activation(query, keys, weights, biases, **given, **shared)
    tape.backward()


for name, options in {
    "packed sigmoid": {"args": ("product", "sigmoid", 16, (36,))},
    "packed dice training, two layers": {
        "args": ("product", "dice", 16, (16, 16)), "training": True, "index": torch.int32, "bias": False
    },
    "packed dice training softmax, padded, weights": {
        "args": ("product", "dice", 36, (36,)), "layout": "lengths", "softmax": True, "training": True,
        "return_weights": True,
    },
    "packed prelu softmax, padded candidates, weights": {
        "args": ("product", "prelu", 36, (16,)), "layout": "lengths", "index": torch.int32, "candidates": 3,
        "softmax": True, "return_weights": True,
    },
    "packed sigmoid, two layers, 200,000 behaviours": {
        "args": ("product", "sigmoid", 128, (80, 40)), "batch": 4096, "length": 50
    },
    "packed sigmoid, many lists": {"args": ("product", "sigmoid", 16, (16,)), "batch": 10000, "length": 3},
    "tiled outer sigmoid, many lists": {"args": ("outer", "sigmoid", 16, (16,)), "batch": 10000, "length": 3},
    "packed relu softmax, skewed rows": {"args": ("product", "relu", 16, (16,)), "softmax": True, "skew": 1},
    "packed relu softmax, wide": {"args": ("product", "relu", 128, (128,)), "dtype": FP16, "softmax": True},
    "packed fp32 by tf32": {"args": ("product", "sigmoid", 16, (16,)), "dtype": FP32},
    "packed fp32 dice training, two layers": {
        "args": ("product", "dice", 40, (36, 10)), "dtype": FP32, "training": True, "layout": "lengths"
    },
    "packed fp32 prelu softmax, skewed rows": {
        "args": ("product", "prelu", 16, (16,)), "dtype": FP32, "softmax": True, "skew": 1
    },
    "universal outer dice training, masked": {
        "args": ("outer", "dice", 18, (36, 16)), "dtype": FP32, "layout": "mask", "training": True
    },
    "tiled outer prelu softmax, candidates, weights": {
        "args": ("outer", "prelu", 8, (16,)), "candidates": 2, "softmax": True, "return_weights": True, "length": 2000
    },
    "tiled outer dice training, masked, two layers": {
        "args": ("outer", "dice", 36, (36, 16)), "layout": "mask", "training": True, "return_weights": True
    },
    "tiled product dice training, wide layers": {
        "args": ("product", "dice", 32, (64, 16)), "layout": "lengths", "length": 2000, "index": torch.int32,
        "training": True,
    },
    "tiled outer sigmoid, backward tiled too": {"args": ("outer", "sigmoid", 36, (36,))},
    "tiled outer dice training, backward tiled too": {"args": ("outer", "dice", 36, (36,)), "training": True},
    "tiled outer relu softmax, masked, weights, backward tiled too": {
        "args": ("outer", "relu", 16, (16,)), "layout": "mask", "softmax": True, "return_weights": True
    },
    "tiled outer sigmoid, skewed rows": {"args": ("outer", "sigmoid", 16, (16,)), "dtype": FP16, "skew": 1},
    "universal outer relu softmax, candidates, weights": {
        "args": ("outer", "relu", 8, (16,)), "candidates": 2, "softmax": True, "return_weights": True, "dtype": FP32
    },
    "universal product relu, three layers": {"args": ("product", "relu", 16, (16, 8, 5)), "dtype": FP16},
    "universal product, one row of one column": {
        "args": ("product", "sigmoid", 1, (1,)), "dtype": FP32, "batch": 1, "length": 1, "index": torch.int32
    },
    "gathered product dice training": {
        "args": ("product", "dice", 32, (16,)), "gathered": True, "training": True, "index": torch.int32
    },
    "gathered outer, candidates, narrow tables": {
        "args": ("outer", "sigmoid", 3, (16,)), "gathered": True, "candidates": 2, "dtype": FP32
    },
}.items():  # fmt: skip
    CALLS[name] = lambda tape, options=options: unit(
        tape, *options["args"], **{k: v for k, v in options.items() if k != "args"}
    )


# ---- Dice ---------------------------------------------------------------------------------------------------


def activation(
    tape: Tape, rows: int, width: int, *, dtype: torch.dtype = FP32, training: bool = True, masked: bool = False,
    affine: bool = False, shifted: bool = False, momentum: float | None = 0.1, transposed: bool = False,
    one_alpha: bool = False, gradients: bool = True,
) -> None:  # fmt: skip
    x = tensor(width, rows, dtype=dtype).t() if transposed else tensor(rows, width, dtype=dtype)
    vectors = [tensor(width, dtype=dtype) for _ in range(3)]
    if not gradients:
        x, vectors = x.detach(), [v.detach() for v in vectors]
    dice(
        x, vectors[0][:1] if one_alpha else vectors[0], tensor(width, grad=False), tensor(width, grad=False),
        weight=vectors[1] if affine else None, bias=vectors[2] if affine else None,
        shift=vectors[1] if shifted else None, mask=indices(rows, dtype=torch.bool) if masked else None,
        num_batches_tracked=indices(), training=training, momentum=momentum,
    )  # fmt: skip
    # A gradient as sum() leaves it: one element seen everywhere.
    tape.backward(
        lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape) if masked else torch.ones_like(y)
    )


for name, options in {
    "dice training, many rows": {"rows": 5000, "width": 80},
    "dice training, few rows": {"rows": 300, "width": 36},
    "dice training, few rows, masked": {"rows": 300, "width": 36, "masked": True, "dtype": BF16},
    "dice training, one column, average over batches": {"rows": 2000, "width": 1, "momentum": None},
    "dice training, shifted": {"rows": 5000, "width": 36, "shifted": True, "dtype": FP16},
    "dice training, affine, transposed, one alpha": {
        "rows": 2000, "width": 40, "affine": True, "transposed": True, "one_alpha": True
    },
    "dice evaluation": {"rows": 5000, "width": 200, "training": False, "dtype": BF16},
    "dice serving": {"rows": 10, "width": 80, "training": False, "gradients": False},
}.items():  # fmt: skip
    CALLS[name] = lambda tape, options=options: activation(tape, **options)


# ---- sparse update ------------------------------------------------------------------------------------------


def update(
    tape: Tape, optimizer: str, width: int, *, rows: int = 500, count: int = 6000, dtype: torch.dtype = FP32,
    index: torch.dtype = torch.int64, on_device: bool = False, expanded: bool = False, **options: Any,
) -> None:  # fmt: skip
    """``on_device``: every hyper-parameter is read there, as inside a CUDA graph."""
    weight = tensor(rows, width, dtype=dtype, grad=False)
    grad = tensor(1, width, dtype=dtype).expand(count, width) if expanded else tensor(count, width, dtype=dtype)
    if on_device:
        options |= {
            "lr": tensor(), "grad_scale": tensor(), "found_inf": tensor(1), "seed": indices(), "stochastic_rounding": True
        }  # fmt: skip
    else:
        options |= {"lr": 1.0, "grad_scale": 0.5}
    if options.get("regularizer") == "mba":
        options["occurrences"] = indices(rows, dtype=index)
    sparse_update_(
        weight, indices(count, dtype=index), grad, optimizer=optimizer, reg_lambda=0.1,
        state=init_state(weight, optimizer, capturable=on_device), **options,
    )  # fmt: skip


for name, options in {
    "sgd + mba": {"args": ("sgd", 64), "regularizer": "mba"},
    "sgd + mba on 16-bit keys, groups": {"args": ("sgd", 8), "regularizer": "mba", "index": torch.int32, "count": 9000},
    "sgd on 32-bit keys, one row": {"args": ("sgd", 16), "rows": 40000, "count": 1, "padding_idx": 1},
    "sgd on 64-bit keys": {"args": ("sgd", 18), "rows": 2**31, "dtype": BF16, "expanded": True},
    "sgd, one column, one row": {"args": ("sgd", 1), "rows": 1, "count": 70, "regularizer": "difacto"},
    "adagrad + l2, decoupled": {"args": ("adagrad", 36), "regularizer": "l2", "decay": "decoupled"},
    "rowwise_adagrad, wide": {"args": ("rowwise_adagrad", 300), "regularizer": "mba"},
    "adam + mba, stochastic rounding": {
        "args": ("adam", 18), "regularizer": "mba", "dtype": FP16, "stochastic_rounding": True, "seed": 2**40
    },
    "adam in a graph": {"args": ("adam", 32), "regularizer": "difacto", "dtype": BF16, "on_device": True},
}.items():  # fmt: skip
    CALLS[name] = lambda tape, options=options: update(
        tape, *options["args"], **{k: v for k, v in options.items() if k != "args"}
    )

TOO_LARGE = {"sgd on 64-bit keys", "packed sigmoid, two layers, 200,000 behaviours"}  # for memory that exists


# ---- the same with other shapes -----------------------------------------------------------------------------

# Calls next to each other on what chooses a compiled kernel: 1, multiples of 16 and others, dtypes, addresses, numbers and
# tensors.
VARIED: dict[str, Callable[[Any], None]] = {}


def units(tape: Any, activation_name: str, interaction: str, **options: Any) -> None:
    for batch, length, dim, dtype in itertools.product((1, 7, 16), (1, 16, 40), (16, 18), (BF16, FP32)):
        unit(tape, interaction, activation_name, dim, (16,), batch=batch, length=length, dtype=dtype, **options)


for interaction in ("product", "outer"):
    for name, options in {
        "sigmoid": {}, "dice, training": {"training": True}, "dice": {"index": torch.int32},
        "prelu, padded softmax": {"layout": "lengths", "softmax": True}, "relu, masked": {"layout": "mask"},
        "relu, skewed rows": {"skew": 1}, "sigmoid, candidates": {"candidates": 2, "return_weights": True},
    }.items():  # fmt: skip
        VARIED[f"{interaction} {name}"] = lambda tape, kind=interaction, name=name, options=options: units(
            tape, name.split(",")[0], kind, **options
        )


def activations(tape: Any) -> None:
    for rows, width, dtype in itertools.product((2, 16, 17, 5000), (1, 16, 36), (FP32, BF16)):
        for options in ({}, {"momentum": None}, {"masked": True}, {"training": False}, {"transposed": True}):
            activation(tape, rows, width, dtype=dtype, **options)


def updates(tape: Any) -> None:
    for optimizer, width, rows, count in itertools.product(
        ("sgd", "adam"), (1, 16, 18), (1, 16, 500), (1, 32, 70, 6000)
    ):
        for index, options in (
            (torch.int64, {"regularizer": "mba"}), (torch.int32, {"expanded": True}), (torch.int64, {"on_device": True}),
            (torch.int64, {"dtype": BF16, "stochastic_rounding": True, "seed": 1}),
            (torch.int64, {"dtype": BF16, "stochastic_rounding": True, "seed": 2**31}),
        ):  # fmt: skip
            update(tape, optimizer, width, rows=rows, count=count, index=index, **options)


VARIED |= {"dice": activations, "sparse update": updates}


def run(name: str, *, capability: int = 90, compile_kernels: bool = True) -> dict[str, Any]:
    """What came of a call: its launches as plain data, and the error that stopped it, if any."""
    error = None
    if "by tf32" in name:
        torch.set_float32_matmul_precision("high")
    with gpu(capability=capability, compile_kernels=compile_kernels) as tape:
        try:
            CALLS[name](tape)
        except Exception as failure:  # a finding, to be told with the others
            where = traceback.extract_tb(failure.__traceback__)[-1]
            error = f"{type(failure).__name__}: {str(failure).strip()[-600:]} ({where.filename}:{where.lineno})"
    torch.set_float32_matmul_precision("highest")
    launches = [
        {
            "kernel": launch.name, "grid": launch.grid, "seconds": round(launch.seconds, 2),
            "shared": None if launch.compiled is None else int(launch.compiled.metadata.shared),
            "warps": None if launch.compiled is None else int(launch.compiled.metadata.num_warps),
        }
        for launch in tape.launches
    ]  # fmt: skip
    return {"error": error, "launches": launches, "work": tape.work}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.gpu_calls")
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--bind", action="store_true")
    args = parser.parse_args()
    names = [name for name in CALLS if fnmatch.fnmatch(name, args.only)]
    found = {name: run(name, capability=args.capability, compile_kernels=not args.bind) for name in names}
    print(json.dumps(found, indent=1))
    return any(result["error"] for result in found.values())


if __name__ == "__main__":
    sys.exit(main())
