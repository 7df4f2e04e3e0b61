"""Run every suite on this machine and leave a result file behind.

    python -m benchmarks.run --cpu [--quick] [--out DIR]     about 6 minutes; 90 seconds with --quick
    python -m benchmarks.run --gpu [--quick] [--out DIR]     parity first, then everything; within 10 minutes with --quick

Writes DIR/cpu.json or DIR/gpu.json (``cpu-quick.json``, ... with --quick) for ``python -m benchmarks.report``;
pytest-benchmark's own file, which names the machine, goes to runs/benchmarks. To publish: ``--out benchmarks/results``, then
``make report``, and commit both. What follows ``--`` goes to pytest, for example ``-- -k dice``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "benchmarks"
PARITY_SECONDS = {True: 190, False: 1500}  # nearly all of it compiles kernels, a second or more for each


def parity(quick: bool) -> int:
    """The numbers before the times: kernels against the references on this GPU. Returns pytest's exit status."""
    folders = ("contract",) if quick else ("contract", "local_activation", "dice", "sparse_update")
    paths = [str(ROOT / "tests" / name) for name in folders if (ROOT / "tests" / name).is_dir()]
    jobs = str(min(16, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", jobs, "-m", "not static and not slow", *paths]
    print("parity:", " ".join(command[1:]), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, timeout=PARITY_SECONDS[quick]).returncode
    except subprocess.TimeoutExpired:
        print(f"parity: not done within {PARITY_SECONDS[quick]} s", flush=True)
        return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--cpu", action="store_true")
    device.add_argument("--gpu", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: see that everything runs")
    parser.add_argument(
        "--minutes", type=float, help="time in all (a slow or busy machine needs more); the rest is skipped"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: all cores")
    parser.add_argument(
        "--keep", action="store_true", help="keep the result file's records of races that are not run again"
    )
    parser.add_argument("--skip-parity", action="store_true", help="do not run the tests on the GPU first")
    parser.add_argument("--out", type=Path, default=RUNS)
    args, rest = parser.parse_known_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: what is timed is compiled
    if args.cpu:  # compile in this process: starting a pool of others costs more than it saves on a few cores
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

    import pytest
    import torch

    from .arena import UNTIL

    if args.gpu and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False, so there is nothing to measure", file=sys.stderr)
        return 3
    began = time.perf_counter()
    if args.gpu and not args.skip_parity:
        status = parity(args.quick or args.smoke)
        if status:
            print("parity failed: no times are taken of wrong numbers (--skip-parity to look anyway)", file=sys.stderr)
            return status
    if args.cpu:
        torch.set_num_threads(args.threads or os.cpu_count() or 1)
    name = ("cpu" if args.cpu else "gpu") + ("-smoke" if args.smoke else "-quick" if args.quick else "")
    args.out.mkdir(parents=True, exist_ok=True)
    own_file = RUNS / f"{name}.pytest-benchmark.json"
    own_file.parent.mkdir(parents=True, exist_ok=True)
    options = [
        *(str(Path(__file__).parent / f"{suite}.py") for suite in UNTIL),
        "--bench-device", "cpu" if args.cpu else "cuda", "--bench-json", str(args.out / f"{name}.json"),
        "--benchmark-columns", "median,iqr,min,rounds", "--benchmark-json", str(own_file),
        "-p", "no:xdist", "-p", "no:randomly", "-q", "-s",
        *(["--bench-minutes", str(args.minutes)] if args.minutes else []),
        *(["--bench-keep"] if args.keep else []),
        *(["--bench-smoke"] if args.smoke else ["--bench-quick"] if args.quick else []),
        *(part for part in rest if part != "--"),
    ]  # fmt: skip
    status = int(pytest.main(options))
    print(f"{time.perf_counter() - began:.0f} s in all; to publish: --out benchmarks/results, then make report")
    return status


if __name__ == "__main__":
    sys.exit(main())
