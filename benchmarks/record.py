"""What a benchmark leaves behind: one record for each contestant of each race, and the run (machine, versions) it is from.

A result file is JSON with two keys, written so that a change reads as a diff: ``runs`` describes each run once (machine,
driver, versions, commit, load), ``records`` holds one line each and names its run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FIRST = "fused"  # the contestant that every other one is compared with


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, quartiles and least of ``rounds`` measurements."""

    median: float
    low: float
    high: float
    least: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0], values[0], len(values))
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, min(values), len(values))


@dataclasses.dataclass(frozen=True)
class Record:
    """One contestant in one race. Times are seconds a call.

    suite, workload, measure, dtype   which race: for example "local_activation", "S1", "forward+backward", "bfloat16"
    contestant                        who; "fused" is this package
    status                            "ok"; "wrong" (failed the correctness gate), "skipped", "failed": then ``reason``
    wall                              from the call to its end (on a GPU: to the end of its kernels), rounds interleaved
    ratio                             wall time over that of the fused contestant in the same round
    device, graph                     GPU only: between two events in the stream, and a call's share of a graph's replay
    device_ratio                      as ratio, of ``device``
    peak_bytes                        memory in use above what was there before the call
    error, allowed                    of the gate: the largest RMS error ratio relative to its tolerance is ``error / allowed``
    floor                             seconds each limit would take by itself, on this machine's measured peaks
    details                           sizes, and whatever else tells what was run
    """

    suite: str
    workload: str
    measure: str
    dtype: str
    contestant: str
    status: str
    reason: str = ""
    run: str = ""
    wall: Spread | None = None
    ratio: Spread | None = None
    device: Spread | None = None
    device_ratio: Spread | None = None
    graph: Spread | None = None
    peak_bytes: int | None = None
    error: float | None = None
    allowed: float | None = None
    floor: dict[str, float] | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def race(self) -> tuple[str, str, str, str]:
        return self.suite, self.workload, self.measure, self.dtype

    @property
    def time(self) -> Spread | None:
        """The time that counts: by events on a GPU, wall time elsewhere."""
        return self.device or self.wall

    @property
    def times_fused(self) -> Spread | None:
        """How many times the fused contestant's time this one took."""
        return self.device_ratio or self.ratio

    @property
    def of_floor(self) -> tuple[str, float] | None:
        """The binding limit, and the share of this contestant's time that it accounts for."""
        if self.time is None or not self.floor:
            return None
        name = max(self.floor, key=lambda limit: (self.floor or {})[limit])
        return name, self.floor[name] / self.time.median


def _short(value: Any) -> Any:
    """Four significant digits, nothing that is absent."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items() if v not in (None, "", {}, [])}
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    return value


def write(path: Path, runs: dict[str, dict[str, Any]], records: Sequence[Record]) -> None:
    lines = [json.dumps(_short(dataclasses.asdict(record)), ensure_ascii=False) for record in records]
    text = json.dumps(_short(runs), indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"runs": ' + text + ',\n"records": [\n' + ",\n".join(lines) + "\n]}\n")


def read(path: Path) -> tuple[dict[str, dict[str, Any]], list[Record]]:
    """Runs and records of a result file."""
    content = json.loads(path.read_text())
    records = []
    for entry in content["records"]:
        spreads = ("wall", "ratio", "device", "device_ratio", "graph")
        found = {name: Spread(**entry[name]) for name in spreads if name in entry}
        record = Record(**{**entry, **found})
        if record.run not in content["runs"]:
            raise ValueError(
                f"{path}: the record of {record.race} names run {record.run!r}, which the file does not describe"
            )
        records.append(record)
    return content["runs"], records


def merge(
    path: Path, runs: dict[str, dict[str, Any]], records: Sequence[Record]
) -> tuple[dict[str, dict[str, Any]], list[Record]]:
    """``records`` and those in ``path`` of races that were not run again, with the runs that either names."""
    if not path.exists():
        return runs, list(records)
    old_runs, old = read(path)
    again = {r.race for r in records}
    merged = [*(r for r in old if r.race not in again), *records]
    named = {r.run for r in merged}
    return {name: run for name, run in {**old_runs, **runs}.items() if name in named}, merged


# ---- the run -----------------------------------------------------------------------------------------------------------

_PACKAGES = (
    "torch", "triton", "numpy", "deepctr-torch", "fuxictr", "torch-rechub", "recbole", "fbgemm-gpu", "fbgemm-gpu-cpu"
)  # fmt: skip


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    return ""


def _field(path: str, key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_run(device: torch.device) -> dict[str, Any]:
    """Machine, driver, versions and commit; nothing that names the machine itself."""
    memory = _field("/proc/meminfo", "MemTotal").split()
    machine: dict[str, Any] = {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory[0]) / 2**20) if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H:%M"),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "changed": bool(
            _output("git", "status", "--porcelain", "--untracked-files=no", "--", "din_kernels", "reference")
        ),
        "machine": machine,
        "versions": _versions(),
    }
