"""Hold every shipped kernel configuration to what its machine code promised, without a GPU.

    python -m benchmarks.static_budget                 measure, print the table, compare with the record
    python -m benchmarks.static_budget --update        write benchmarks/results/static_budget.json
    python -m benchmarks.static_budget --check --quick a subset that fits in a few minutes (what CI runs)
    python -m benchmarks.static_budget --only '*dice*' --targets sm_90

Every ``CompileCase`` of ``din_kernels.ops.*.shipped`` is compiled for its targets. A case fails when

* it does not compile, or spills: any stack, local memory or spill instruction (including the fallback in which ptxas
  gives up, keeps everything on the stack and reports 32 registers), beyond the few bytes that some cases are allowed;
* its shared memory does not fit one block of the chip;
* the warp instructions of its main loop for one unit (a behaviour row, an element) exceed the recorded number by more
  than 2 %, or it has no record.

AMD targets must compile, and may not spill more than recorded. Exit status: 0 fine, 1 failures, 3 the installed Triton
is not the one of the record, so that counts cannot be compared.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from din_kernels._tuning import CompileCase

from .machine_code import ARCHITECTURES, measure

RECORD = Path(__file__).parent / "results" / "static_budget.json"
SOURCES = tuple(
    f"din_kernels.ops.{op}.shipped" for op in ("local_activation", "gathered_activation", "dice", "sparse_update")
)
TOLERANCE = 0.02
QUICK_SECONDS = 300.0  # of compile time as recorded, over all processes

Results = dict[str, dict[str, dict[str, Any]]]  # case name -> target -> figures


def load_cases(sources: Iterable[str]) -> list[CompileCase]:
    """All cases of the modules ``sources`` (each has ``compile_cases()``), with unique names."""
    cases: list[CompileCase] = []
    for source in sources:
        if importlib.util.find_spec(source) is None:
            print(f"note: {source} does not exist, so nothing of it is measured", file=sys.stderr)
            continue
        cases += importlib.import_module(source).compile_cases()
    names = [case.name for case in cases]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two cases share a name: {repeated}")
    return cases


_cases: dict[str, CompileCase] = {}


def _start_worker(sources: tuple[str, ...]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Triton prints the whole program when ptxas refuses it
    _cases.update((case.name, case) for case in load_cases(sources))


def _work(name: str, target: str) -> tuple[str, str, dict[str, Any], float]:
    start = time.perf_counter()
    figures = measure(_cases[name], target)
    return name, target, figures, time.perf_counter() - start


def measure_all(
    sources: tuple[str, ...], jobs: list[tuple[str, str]], processes: int, quiet: bool
) -> tuple[Results, float]:
    """Measure ``jobs`` (case name, target) in ``processes`` processes; the results, and seconds of work in total."""
    results: Results = {}
    spent = 0.0
    context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads
    with ProcessPoolExecutor(processes, context, _start_worker, (sources,)) as pool:
        for done, (name, target, figures, seconds) in enumerate(pool.map(_work, *zip(*jobs, strict=True)), start=1):
            results.setdefault(name, {})[target] = figures
            spent += seconds
            if not quiet and sys.stderr.isatty():
                print(f"\r{done}/{len(jobs)} {name} {target}\033[K", end="", file=sys.stderr)
    if not quiet and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return results, spent


def quick_jobs(jobs: list[tuple[str, str]], record: Results) -> list[tuple[str, str]]:
    """A subset for CI: of every kernel (the first two parts of a case's name) on every target the heaviest recorded
    case, then further cases, kernel by kernel in turn, while the recorded number of instructions allows.

    Compile time follows the number of instructions closely enough to plan with (about 400 a second).
    """
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, target in jobs:
        groups.setdefault(("/".join(name.split("/")[:2]), target), []).append((name, target))

    def weight(job: tuple[str, str]) -> int:
        figures = record.get(job[0], {}).get(job[1], {})
        return int(figures.get("instructions", figures.get("registers", 0) * 4))

    for group in groups.values():
        group.sort(key=lambda job: (-weight(job), job))
    chosen: list[tuple[str, str]] = []
    seconds = 0.0
    for depth in range(max(map(len, groups.values()), default=0)):
        for group in groups.values():
            if depth < len(group):
                cost = 0.5 + weight(group[depth]) / 400
                if depth == 0 or seconds + cost <= QUICK_SECONDS:
                    chosen.append(group[depth])
                    seconds += cost
    return chosen


# ---- judging ----------------------------------------------------------------------------------------------


def limits(name: str, target: str, figures: dict[str, Any], stack: int = 0) -> list[str]:
    """Failures that need no record; ``stack``: that of the case."""
    where = f"{name} {target}"
    if "error" in figures:
        return [f"{where}: does not compile: {figures['error']}"]
    if target.startswith("gfx"):
        return []
    failures = []
    if figures["stack"] > stack or (figures["spill_instructions"] and not stack):
        what = "ptxas gave up and keeps everything on the stack" if figures["registers"] <= 32 else "spills"
        failures.append(
            f"{where}: {what}: {figures['registers']} registers, {figures['stack']} bytes of stack a thread, "
            f"{figures['spill_instructions']} spill instructions"
        )
    limit = ARCHITECTURES[target].shared_per_block
    if figures["shared"] > limit:
        failures.append(f"{where}: {figures['shared']} bytes of shared memory do not fit the {limit} of one block")
    return failures


def compare(
    name: str, target: str, figures: dict[str, Any], recorded: dict[str, Any] | None
) -> tuple[list[str], list[str]]:
    """Failures and notes against the record of the same case and target."""
    where = f"{name} {target}"
    if recorded is None:
        return [f"{where}: has no record; run python -m benchmarks.static_budget --update and commit the file"], []
    if "error" in figures or "error" in recorded:
        return [], []
    if target.startswith("gfx"):
        now, before = figures["spilled_registers"], recorded["spilled_registers"]
        return ([f"{where}: spills {now} registers, recorded {before}"] if now > before else []), []
    for what in ("stack", "spill_instructions"):
        if figures.get(what, 0) > recorded.get(what, 0):
            return [f"{where}: {what} {figures[what]}, recorded {recorded[what]}"], []
    now, before = figures["per_unit"], recorded["per_unit"]
    if now is None or before is None or now == before:
        return [], []
    change = now / before - 1
    classes = sorted({*figures["classes"], *recorded["classes"]})
    moved = ", ".join(
        f"{c} {recorded['classes'].get(c, 0)} -> {figures['classes'].get(c, 0)}"
        for c in classes
        if recorded["classes"].get(c, 0) != figures["classes"].get(c, 0)
    )
    text = (
        f"{where}: {before:g} -> {now:g} instructions a unit ({change:+.1%}); in the main loop: {moved or 'no change'}"
    )
    if change > TOLERANCE:
        return [f"{text}; the budget allows {TOLERANCE:.0%}"], []
    return [], ([f"{text}; --update would record the gain"] if change < -TOLERANCE else [])


# ---- the record and the table -------------------------------------------------------------------------------


def read_record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"triton": None, "cases": {}}


def write_record(path: Path, triton_version: str, results: Results, cases: dict[str, CompileCase]) -> None:
    """One line for each case and target, so that a change of the record reads as a diff."""
    lines = ["{", f'"triton": {json.dumps(triton_version)},', '"cases": {']
    for i, name in enumerate(sorted(results)):
        case = cases.get(name)
        head = (
            {"unit": case.unit, "rows": case.rows, "warps": case.num_warps, "stages": case.num_stages} if case else {}
        )
        lines.append(f"{json.dumps(name)}: {{")
        entries = [f'  "case": {json.dumps(head)}'] if case else []
        entries += [f"  {json.dumps(t)}: {json.dumps(results[name][t])}" for t in sorted(results[name])]
        lines.append(",\n".join(entries))
        lines.append("}" + ("," if i + 1 < len(results) else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "}", "}"]) + "\n")


def table(results: Results) -> str:
    """The figures for people: resources, instructions a unit, and what the main loop consists of."""
    lines = [
        f"{'case':<72} {'target':<7} {'regs':>4} {'stack':>5} {'smem KB':>7} {'blocks':>6} {'loop':>5} {'/unit':>7}"
        "  main loop"
    ]
    for name in sorted(results):
        for target, f in sorted(results[name].items()):
            if "error" in f:
                lines.append(f"{name:<72} {target:<7} {f['error']}")
            elif target.startswith("gfx"):
                lines.append(
                    f"{name:<72} {target:<7} {f['registers']:>4} {f['scratch']:>5} {f['shared'] / 1024:>7.1f} "
                    f"{'':>6} {'':>5} {'':>7}  {f['spilled_registers']} registers spilled"
                    + ("" if f["fits"] else ", does not fit the LDS")
                )
            else:
                mix = " ".join(f"{c} {n}" for c, n in list(f["classes"].items())[:7])
                unit = "" if f["per_unit"] is None else f"{f['per_unit']:.2f}"
                lines.append(
                    f"{name:<72} {target:<7} {f['registers']:>4} {f['stack']:>5} {f['shared'] / 1024:>7.1f} "
                    f"{f['blocks_per_sm']:>6} {f['loop_instructions']:>5} {unit:>7}  {mix}"
                )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_budget", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--update", action="store_true", help="write the record (cases left out by --only are kept)")
    parser.add_argument("--check", action="store_true", help="print failures only, not the table")
    parser.add_argument("--quick", action="store_true", help="a subset that fits in a few minutes on two cores")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="shell pattern of case names")
    parser.add_argument("--targets", nargs="+", choices=sorted(ARCHITECTURES), help="default: those of each case")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--cases", nargs="+", default=SOURCES, metavar="MODULE", help="modules with compile_cases()")
    parser.add_argument("--record", type=Path, default=RECORD)
    args = parser.parse_args(argv)

    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: interpreted kernels cannot be compiled
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: nothing can be compiled")
        return 3
    import triton

    record = read_record(args.record)
    known: Results = record["cases"]
    if not args.update and record["triton"] not in (None, triton.__version__):
        print(f"the record is of Triton {record['triton']}, this is {triton.__version__}: counts cannot be compared")
        return 3

    sources = tuple(args.cases)
    cases = {case.name: case for case in load_cases(sources)}
    everything = args.only == "*" and not args.targets and not args.quick
    pattern = args.only if any(c in args.only for c in "*?[") else f"*{args.only}*"
    jobs = [
        (name, target)
        for name, case in cases.items()
        if fnmatch.fnmatch(name, pattern)
        for target in case.targets
        if not args.targets or target in args.targets
    ]
    if args.quick:
        jobs = quick_jobs(jobs, known)
    if not jobs:
        print("no case matches")
        return 1
    started = time.perf_counter()
    results, spent = measure_all(sources, jobs, max(1, min(args.processes, len(jobs))), args.check)

    failures, notes = [], []
    for name in sorted(results):
        for target, figures in sorted(results[name].items()):
            failures += limits(name, target, figures, cases[name].stack)
            if not args.update and known:
                failed, noted = compare(name, target, figures, known.get(name, {}).get(target))
                failures += failed
                notes += noted
    if not known and not args.update:
        failures.append(f"{args.record} has no cases: run python -m benchmarks.static_budget --update and commit it")
    elif everything and not args.update:
        failures += [
            f"{name}: recorded, but no longer shipped; run --update" for name in sorted(set(known) - set(results))
        ]

    if not args.check:
        print(table(results))
    print("\n".join(f"note: {n}" for n in notes), end="\n" if notes else "")
    print("\n".join(f"FAIL {f}" for f in failures), end="\n" if failures else "")
    took = f"{time.perf_counter() - started:.0f} s ({spent:.0f} s of work)"
    print(f"{len(jobs)} compilations of {len(results)} cases, {len(failures)} failures, {took}")
    if args.update:
        merged = dict(results)
        if not everything:
            kept = {name: dict(entry) for name, entry in known.items() if name in cases}
            for entry in kept.values():
                entry.pop("case", None)
            merged = {name: {**kept.get(name, {}), **results.get(name, {})} for name in {*kept, *results}}
        write_record(args.record, triton.__version__, merged, cases)
        print(f"wrote {args.record}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
