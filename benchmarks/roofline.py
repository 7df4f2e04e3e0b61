"""The least time each problem can take, from four limits: bytes, arithmetic, special functions, instruction issue.

    python -m benchmarks.roofline                  floors of all workloads on the machines of the table
    python -m benchmarks.roofline --machine here   the same for this CPU: bandwidth and peaks measured now

A floor counts what no implementation can avoid: every real behaviour row read once (padding is not), every result written
once, the factorised first layer, one exponential and one reciprocal per sigmoid. Issue time is not of that kind: it takes the
instructions a row of a given kernel (``results/static_budget.json``) and says how fast *that* kernel could be at best.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .workloads import ACTIVATION, DICE, SPARSE, ActivationWorkload, DiceWorkload, SparseWorkload


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peaks in units per second. ``source`` says which are measured; the rest are the vendor's data sheet.

    special  results of the special-function unit (exp2, reciprocal): 16 per clock and multiprocessor
    issue    warp instructions: 4 per clock and multiprocessor
    cache    bytes of last-level cache: a second pass over a tensor that fits does not count as memory traffic
    """

    name: str
    bandwidth: float
    bf16: float
    tf32: float
    fp32: float
    special: float
    issue: float
    cache: float
    source: str

    def peak(self, dtype: torch.dtype, tf32: bool = False) -> float:
        if dtype in (torch.bfloat16, torch.float16):
            return self.bf16
        return self.tf32 if tf32 else self.fp32


def _gpu(
    name: str, bandwidth: float, bf16: float, tf32: float, fp32: float, multiprocessors: int, clock: float, cache: float,
    source: str,
) -> Machine:  # fmt: skip
    special, issue = 16 * multiprocessors * clock, 4 * multiprocessors * clock
    return Machine(name, bandwidth, bf16, tf32, fp32, special, issue, cache, source)


_A100 = _gpu("A100-80GB", 2.039e12, 312e12, 156e12, 19.5e12, 108, 1.41e9, 40e6, "data sheet")
_H100 = _gpu("H100-SXM", 3.35e12, 989e12, 494e12, 67e12, 132, 1.98e9, 50e6, "data sheet")
_H200 = _gpu("H200", 4.8e12, 989e12, 494e12, 67e12, 132, 1.98e9, 50e6, "data sheet")
MACHINES = {m.name: m for m in (_A100, _H100, _H200)}


@dataclasses.dataclass(frozen=True)
class Floor:
    """Amounts of work of one problem (``instructions`` in warp instructions; None where nothing is recorded)."""

    bytes: float
    flops: float
    special: float = 0.0
    instructions: float | None = None

    def __add__(self, other: Floor) -> Floor:
        known = self.instructions is not None and other.instructions is not None
        total = self.instructions + other.instructions if known else None  # type: ignore[operator]
        return Floor(self.bytes + other.bytes, self.flops + other.flops, self.special + other.special, total)

    def times(self, machine: Machine, dtype: torch.dtype, tf32: bool = False) -> dict[str, float]:
        """Seconds for each limit by itself."""
        result = {
            "bytes": self.bytes / machine.bandwidth,
            "arithmetic": self.flops / machine.peak(dtype, tf32),
            "special": self.special / machine.special,
        }
        if self.instructions is not None and machine.issue:
            result["issue"] = self.instructions / machine.issue
        return result

    def binding(self, machine: Machine, dtype: torch.dtype, tf32: bool = False) -> tuple[str, float]:
        """The limit that binds, and its seconds: no implementation is faster."""
        return max(self.times(machine, dtype, tf32).items(), key=lambda item: item[1])


def activation_rows(workload: ActivationWorkload, seed: int = 0) -> int:
    """Real (behaviour, candidate) pairs of the sampled batch."""
    return int(workload.lengths.sample(workload.batch, seed).sum()) * max(workload.candidates, 1)


def activation_floor(
    workload: ActivationWorkload,
    dtype: torch.dtype,
    *,
    rows: int | None = None,
    backward: bool = False,
    per_row: float | None = None,
) -> Floor:
    """Floor of one forward (or, with ``backward``, of the backward alone, recomputing the hidden layers).

    rows: scored rows (candidates × behaviours); default from the workload's sampled lengths. per_row: warp instructions a
    row of a kernel, for the issue limit. Bytes: forward reads keys, queries and weights and writes the result; backward
    reads keys, queries and output gradients and writes gradients of keys and queries. With C candidates a list is read
    once. FLOP: with N rows, D columns, widths H1, H2 …: 2·N·D·H1 for A_b e, the later layers, pooling 2·N·D; per query
    4·D·H1 for c_b and A_b ("product") or 2·D·H1 + 2·D²·H1 ("outer"). Backward does each product three times (recompute
    and two gradients).
    """
    size = torch.empty(0, dtype=dtype).element_size()
    rows = activation_rows(workload) if rows is None else rows
    candidates = max(workload.candidates, 1)
    queries = workload.batch * candidates
    dim, first, *rest = workload.dim, *workload.hidden
    last = workload.hidden[-1]
    parameters = (3 * dim * first if workload.interaction == "product" else (2 + dim) * dim * first) + last
    layers = 0
    for width_in, width_out in zip(workload.hidden[:-1], rest, strict=True):
        parameters += width_in * width_out
        layers += 2 * rows * width_in * width_out
    per_query = 2 * queries * dim * first * (2 if workload.interaction == "product" else 1 + dim)
    network = 2 * rows * dim * first + layers
    heads = 2 * rows * last + 2 * rows * dim
    sigmoids = rows * sum(workload.hidden) if workload.activation in ("sigmoid", "dice") else 0
    key_bytes = rows // candidates * dim * size
    special = 2 * sigmoids + (rows if workload.softmax else 0)
    issue = None if per_row is None else rows * per_row
    if backward:
        moved = 2 * key_bytes + 4 * queries * dim * size + 8 * workload.batch + parameters * 4
        return Floor(moved, 3 * (network + per_query) + 2 * heads, special, issue)
    moved = key_bytes + 2 * queries * dim * size + 8 * workload.batch + parameters * 4
    return Floor(moved, network + per_query + heads, special, issue)


def dice_floor(
    workload: DiceWorkload, dtype: torch.dtype, *, training: bool = True, backward: bool = False, cached: bool = False
) -> Floor:
    """Floor of Dice. Training reads the input for the statistics and again to apply them; ``cached`` (the tensor fits the
    last-level cache) makes the second read free. Backward: input and gradient twice, one gradient written."""
    size = torch.empty(0, dtype=dtype).element_size()
    elements = workload.rows * workload.channels
    if backward:
        passes = 3 if cached or not training else 5
    else:
        passes = 2 if cached or not training else 3
    return Floor(passes * elements * size, (12 if backward else 8) * elements, 2.0 * elements)


def sparse_floor(
    workload: SparseWorkload, dtype: torch.dtype = torch.float32, *, distinct: int | None = None, state_rows: int = 0
) -> Floor:
    """Floor of the sorted update: every occurrence's gradient row and index read once, every distinct row (and
    ``state_rows`` rows of optimizer state with it) read and written once, its count read once. The sort is not included."""
    size = torch.empty(0, dtype=dtype).element_size()
    if distinct is None:
        distinct = int(workload.ids().unique().numel())
    row = workload.dim * size
    moved = workload.occurrences * (row + 8) + distinct * (2 * row * (1 + state_rows) + 8)
    return Floor(moved, workload.occurrences * workload.dim + 3.0 * distinct * workload.dim)


# ---- this machine ----------------------------------------------------------------------------------------------


def _best(function: Callable[[], object], seconds: float) -> float:
    """Least seconds of one call, looking for about ``seconds``."""
    function()
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _last_level_cache() -> float:
    """Bytes, from Linux' description of the first core; 32 MiB (a server's core complex) where it has none."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2.0**10, "M": 2.0**20}
    return max((float(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2.0**20)


def measure_cpu(seconds: float = 0.6) -> Machine:
    """Copy bandwidth, GEMM peaks and sigmoid rate of this CPU with torch's current number of threads, ``seconds`` each."""
    source = torch.randn(1 << 25)  # 128 MiB: beyond the last-level cache of most processors
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), seconds)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)
    fp32 = 2 * 1024**3 / _best(lambda: torch.mm(a, b, out=out), seconds)
    a16, b16 = a.bfloat16(), b.bfloat16()
    bf16 = 2 * 1024**3 / _best(lambda: torch.mm(a16, b16), seconds)
    values = torch.randn(1 << 15)  # 128 KiB: in the cache
    result = torch.empty_like(values)
    special = 2 * values.numel() / _best(lambda: torch.sigmoid(values, out=result), seconds)
    threads = torch.get_num_threads()
    return Machine(
        f"CPU, {threads} threads",
        bandwidth,
        bf16,
        fp32,
        fp32,
        special,
        0.0,
        _last_level_cache(),
        "all measured in this run",
    )


def measure_gpu(device: torch.device | str = "cuda") -> Machine:
    """This GPU by name, with copy bandwidth and GEMM peaks measured and the rest from its properties."""
    properties = torch.cuda.get_device_properties(device)

    def seconds(function: Callable[[], object], repeat: int = 20) -> float:
        function()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeat):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeat

    def copy() -> float:
        source = torch.empty(1 << 28, device=device)
        target = torch.empty_like(source)
        return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))

    def gemm(dtype: torch.dtype, precision: str = "highest") -> float:
        torch.set_float32_matmul_precision(precision)
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        return 2 * 8192**3 / seconds(lambda: a @ a, 5)

    before = torch.get_float32_matmul_precision()
    try:
        bf16, tf32, fp32 = gemm(torch.bfloat16), gemm(torch.float32, "high"), gemm(torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or 1.98e9
    return _gpu(
        properties.name, copy(), bf16, tf32, fp32, properties.multi_processor_count, clock,
        float(getattr(properties, "L2_cache_size", 50e6)),
        "copy and GEMM measured in this run; special functions and issue from multiprocessors × clock",
    )  # fmt: skip


def _problems(machine: Machine) -> Iterator[tuple[str, Floor, torch.dtype]]:
    """Every workload as (name, floor, dtype)."""
    for w in ACTIVATION.values():
        for dtype in (torch.float32, torch.bfloat16):
            forward, backward = activation_floor(w, dtype), activation_floor(w, dtype, backward=True)
            yield f"{w.name} forward", forward, dtype
            yield f"{w.name} forward+backward", forward + backward, dtype
    for d in DICE.values():
        cached = d.rows * d.channels * 4 <= machine.cache / 2
        forward = dice_floor(d, torch.float32, cached=cached)
        backward = dice_floor(d, torch.float32, backward=True, cached=cached)
        yield f"Dice {d.name} forward+backward", forward + backward, torch.float32
    for s in SPARSE.values():
        yield f"sparse update {s.name}", sparse_floor(s), torch.float32


def table(machine: Machine) -> str:
    """Floors of every workload in microseconds, the binding limit marked."""
    tera = {name: getattr(machine, name) / 1e12 for name in ("bandwidth", "bf16", "tf32", "fp32")}
    lines = [
        f"{machine.name}: {tera['bandwidth']:.2f} TB/s, bf16 {tera['bf16']:.2f} TFLOP/s, "
        f"tf32 {tera['tf32']:.2f}, fp32 {tera['fp32']:.2f} ({machine.source})"
    ]
    for name, floor, dtype in _problems(machine):
        times = floor.times(machine, dtype, tf32=True)
        binding, _ = floor.binding(machine, dtype, tf32=True)
        cells = "  ".join(f"{k} {v * 1e6:9.1f}{'*' if k == binding else ' '}" for k, v in times.items())
        amount = f"{floor.bytes / 1e6:9.1f} MB {floor.flops / 1e9:8.2f} GFLOP"
        lines.append(f"  {name:<36} {str(dtype).removeprefix('torch.'):<9} {amount}   us: {cells}")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--machine", nargs="+", choices=[*MACHINES, "here"], default=list(MACHINES))
    args = parser.parse_args(argv)
    measure = measure_gpu if torch.cuda.is_available() else measure_cpu
    for name in args.machine:
        print(table(measure() if name == "here" else MACHINES[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
