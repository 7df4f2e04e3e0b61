"""``python -m din_kernels.env_report``: versions, devices, switches, and which backend would serve what, and why not.

    python -m din_kernels.env_report
    python -m din_kernels.env_report --embedding-dim 64 --hidden 512 80 --dtype bfloat16

The second form answers for one local activation unit. Paste the output into bug reports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

from . import _backend
from ._version import __version__
from .ops.dice.api import MAX_WIDTH as DICE_MAX_WIDTH
from .ops.local_activation import limits
from .ops.sparse_update.function import MAX_WIDTH as SPARSE_MAX_WIDTH

SWITCHES = {
    "DIN_KERNELS_BACKEND": "backend of calls that name none: triton, torch, auto",
    "DIN_KERNELS_DEBUG": "1 checks values too (offsets, lengths, ids, NaN), waiting for the device",
    "TRITON_INTERPRET": "1 runs the kernels on the CPU, slowly",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> Iterator[str]:
    yield f"din_kernels   {__version__}"
    yield f"python        {platform.python_version()} on {platform.platform()}"
    toolkit = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"HIP {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    yield f"torch         {torch.__version__} ({toolkit} build), {torch.get_num_threads()} threads"
    # AMD and Windows builds of torch bring Triton under other names.
    triton = next(
        (v for p in ("triton", "pytorch-triton-rocm", "triton-windows") if (v := _version(p)) != "not installed"), None
    )
    yield f"triton        {triton if triton and _backend.has_triton() else 'not installed'}"
    yield f"numpy         {_version('numpy')}"


def devices() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "no GPU that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}  {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} processors, "
            f"{p.total_memory / 2**30:.0f} GiB"
            + (", too old for the kernels" if _backend.why_too_old(torch.device("cuda", index)) else "")
        )
    yield f"float32 products: {torch.get_float32_matmul_precision()!r} (the kernels take tf32 unless it is 'highest')"


def backends() -> Iterator[str]:
    """For each device: what backend=None means there, and whether backend="triton" could serve."""
    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        device = torch.device(name)
        try:
            automatic = _backend.resolve(None, device)
        except (_backend.BackendUnavailable, ValueError) as problem:
            automatic = f"an error: {problem}"
        yield f"{name:5} automatic choice: {automatic}"
        try:
            _backend.resolve("triton", device)
        except _backend.BackendUnavailable as problem:
            yield f"{'':5} not the kernels: {problem}"
        else:
            yield f"{'':5} the kernels can run{' (in the interpreter)' if name == 'cpu' else ''}"


def kernel_limits() -> Iterator[str]:
    """What the Triton kernels serve; beyond it an automatic choice falls back to torch and logs it once, an explicit
    one raises."""
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in limits.DTYPES)
    yield (
        f"local_activation   embedding 1..{limits.MAX_EMBEDDING_DIM}, 1..{limits.MAX_HIDDEN_LAYERS} hidden layers of width "
        f"1..{limits.MAX_WIDTH}; {dtypes}"
    )
    yield f"dice               1..{DICE_MAX_WIDTH} channels; {dtypes}"
    yield f"sparse_update_     tables of 1..{SPARSE_MAX_WIDTH} columns; {dtypes}"
    yield "float64 and anything larger: torch backend"


def unit(embedding_dim: int, hidden_units: list[int], dtype: torch.dtype) -> Iterator[str]:
    """Which backend serves one local activation unit on each device."""
    reason = limits.why_unsupported(dtype, embedding_dim, hidden_units)
    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        automatic = _backend.resolve(None, torch.device(name))
        if automatic == "triton" and reason is not None:
            yield f"{name:5} torch: {reason}"
        else:
            yield f"{name:5} {automatic}"
    if reason is None:
        yield "      the kernels serve this unit wherever they can run"
    else:
        yield f"      the kernels do not serve this unit: {reason}"


def report() -> str:
    sections = {
        "Versions": versions(),
        "Devices": devices(),
        "Switches": (f"{k:20} {os.environ.get(k, '(not set)'):10} {meaning}" for k, meaning in SWITCHES.items()),
        "Backends": backends(),
        "What the kernels serve": kernel_limits(),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m din_kernels.env_report", description="What would run where, and why not."
    )
    parser.add_argument("--embedding-dim", type=int, metavar="D", help="answer for one local activation unit")
    parser.add_argument("--hidden", type=int, nargs="+", default=[36], metavar="H", help="its hidden widths")
    names = [str(d).removeprefix("torch.") for d in (*limits.DTYPES, torch.float64)]
    parser.add_argument("--dtype", default="float32", choices=names)
    options = parser.parse_args(arguments)
    if options.embedding_dim is None:
        print(report())
    else:
        print("\n".join(unit(options.embedding_dim, options.hidden, getattr(torch, options.dtype))))


if __name__ == "__main__":
    main()
