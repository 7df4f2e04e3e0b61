"""Turn ``benchmarks/results/*.json`` into the README's tables, full tables beside the results, and plots.

    python -m benchmarks.report            write all of it
    python -m benchmarks.report --check    only say what disagrees (exit status 1 if anything does)

The README holds its tables between ``<!-- benchmarks:begin NAME -->`` and ``<!-- benchmarks:end NAME -->`` for NAME in
``cpu``, ``gpu`` and ``static``. They show training (or the only measure of a suite) for every shape, and every other row in
which a baseline wins; ``results/cpu.md`` and ``results/gpu.md`` show all rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .record import FIRST, RESULTS, Record, read
from .static_budget import RECORD as STATIC_RECORD

ROOT = Path(__file__).parents[1]
NOT_MEASURED = "Not yet measured."
SECTIONS = ("cpu", "gpu", "static")
SUITES = {
    "local_activation": "Local activation unit",
    "scoring": "Scoring C candidates of one user",
    "training_step": "Training step of DIN, batch to updated weights",
    "dice": "Dice in training",
    "sparse_update": "Sparse update with mini-batch-aware regularization",
    "sweep": "Growth with one size at a time",
}

Race = list[Record]  # the records of one race, the fused contestant's among them


def races(records: Iterable[Record], suite: str) -> list[Race]:
    """Races of a suite in the order measured, without those in which the fused contestant has no time."""
    grouped: dict[tuple[str, str, str, str], Race] = {}
    for record in records:
        if record.suite == suite:
            grouped.setdefault(record.race, []).append(record)
    return [race for race in grouped.values() if any(r.contestant == FIRST and r.time for r in race)]


def fused_of(race: Race) -> Record:
    return next(r for r in race if r.contestant == FIRST)


def rivals(race: Race) -> list[Record]:
    """Measured contestants that are not this package."""
    return [r for r in race if r.times_fused and not r.contestant.startswith(FIRST)]


def lost(race: Race) -> bool:
    return any(r.times_fused is not None and r.times_fused.median < 1 for r in rivals(race))


# ---- cells -------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def size(count: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return "< 1 MiB"


def times(record: Record) -> str:
    """As "2.9× (2.7–3.1)", in bold where the fused contestant loses (to another than itself in another layout)."""
    spread = record.times_fused
    if spread is None:
        return "–"
    text = f"{spread.median:.2g}× ({spread.low:.2g}–{spread.high:.2g})"
    if spread.median >= 10:
        text = f"{spread.median:.0f}× ({spread.low:.0f}–{spread.high:.0f})"
    return f"**{text}**" if spread.median < 1 and not record.contestant.startswith(FIRST) else text


def shape(record: Record) -> str:
    """The sizes of a race in a line."""
    d = record.details
    if "rows" in d and "padded_rows" in d:
        candidates = f"{d['candidates']} candidates, " if d.get("candidates") else ""
        batch = f"{d['batch']} lists, " if d["batch"] > 1 else ""
        return (
            f"{candidates}{batch}{d['rows']} behaviours of {d['padded_rows']}, D={d['dim']}, {d['hidden']}, "
            f"{d['interaction']}, {d['activation']}"
        )
    if "channels" in d:
        return f"{d['rows']} × {d['channels']}"
    return f"{d['occurrences']} ids, {d['distinct']} distinct, of {d['table']} × {d['dim']}" if "table" in d else ""


def floor_cell(record: Record) -> str:
    found = record.of_floor
    return "" if found is None else f"{found[1]:.0%} ({found[0]})"


# ---- tables ------------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is the head. Columns empty below the head are left out."""
    keep = [i for i in range(len(rows[0])) if any(row[i] not in ("", "–") for row in rows[1:])]
    lines = ["| " + " | ".join(row[i] for i in keep) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(keep), *lines[1:]])


def suite_table(found: Sequence[Race], *, full: bool) -> str:
    """One row a race: the fused time, every other contestant's time as a multiple of it, memory, share of the floor."""
    names = list(dict.fromkeys(r.contestant for race in found for r in race if r.times_fused and r.contestant != FIRST))
    graph = any(fused_of(race).graph for race in found)
    rows = [
        [
            "",
            "sizes",
            "fused",
            *(["in a graph", "by the wall: fused, eager"] if graph else []),
            *names,
            "memory: fused, eager",
            "of floor",
        ]
    ]
    for race in found:
        fused, by_name = fused_of(race), {r.contestant: r for r in race}
        assert fused.time is not None
        label = " ".join(
            x for x in (fused.workload, fused.measure, "" if fused.dtype == "float32" else fused.dtype) if x
        )
        cells = [label, shape(fused), duration(fused.time.median)]
        if graph:
            cells.append(duration(fused.graph.median) if fused.graph else "–")
            both = [r.wall for r in (fused, by_name.get("eager")) if r and r.wall]
            cells.append(", ".join(duration(wall.median) for wall in both))
        for name in names:
            cells.append(times(by_name[name]) if name in by_name else "–")
        eager = by_name.get("eager")
        memory = size(fused.peak_bytes or 0)
        if eager and eager.status == "ok":
            memory += f", {size(eager.peak_bytes or 0)}"
        elif eager:
            memory += f", {eager.reason}"
        rows.append([*cells, memory, floor_cell(fused)])
    return markdown(rows) + (("\n\n" + absences(found)) if full and absences(found) else "")


def absences(found: Sequence[Race]) -> str:
    """Who has no number, and why."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for race in found:
        for r in race:
            if r.status != "ok":
                place = f"{r.workload} {r.measure}" + ("" if r.dtype == "float32" else f" {r.dtype}")
                reasons.setdefault((r.contestant, r.status, r.reason), []).append(place)
    lines = []
    for (name, status, reason), where in reasons.items():
        places = "everywhere" if len(where) == len(found) else ", ".join(where)
        lines.append(f"- {name}: {status} ({places}): {reason}")
    return "\n".join(lines)


def headline(race: Race) -> bool:
    """Rows for the README: training, the only measure of a suite, and whatever is lost."""
    return fused_of(race).measure != "forward" or fused_of(race).suite == "scoring" or lost(race)


def describe(run: dict[str, Any]) -> str:
    machine, versions = run["machine"], run["versions"]
    what = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    if machine.get("gpu"):
        what += f" (driver {machine.get('driver', '?')}, CUDA {machine.get('cuda', '?')})"
    load = machine.get("load_average")
    return (
        f"{what}; torch {versions.get('torch')}, Triton {versions.get('triton', 'none')}; commit {run['commit']}"
        f"{' with changes' if run.get('changed') else ''}, {run['date']}"
        + (f"; load average at the start {load:.1f}" if load is not None and not machine.get("gpu") else "")
    )


_LEGEND = (
    "Times are medians; `2.9× (2.7–3.1)` is a contestant's time as a multiple of the fused one, measured in turns and divided "
    "round by round: median and quartiles. In bold where the fused version loses. Numbers were checked against float64 "
    'before any was timed. "of floor" is the share of the time that the binding limit of this machine accounts for.'
)


def device_section(path: Path, *, full: bool = False) -> str:
    """The tables of one result file, or that there is none."""
    if not path.exists():
        return NOT_MEASURED
    runs, records = read(path)
    parts = [f"Measured on {describe(run)}." for run in runs.values()]
    parts.append(_LEGEND)
    for suite, title in SUITES.items():
        found = races(records, suite)
        if not full:
            found = [race for race in found if (lost(race) if suite == "sweep" else headline(race))]
        if found:
            parts.append(f"**{title}**\n\n{suite_table(found, full=full)}")
    return "\n\n".join(parts)


def static_section(path: Path = STATIC_RECORD, *, full: bool = False) -> str:
    """What the machine code of all shipped configurations says: a row per family of kernels, or, ``full``, per kernel with
    its instructions."""
    content = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    if not content["cases"]:
        return "Not yet recorded."
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for name, entry in content["cases"].items():
        parts = name.split("/")
        kernel = re.sub(r"-(80|90)$", "", "/".join(parts[:-1]) if len(parts) > 2 else name)
        if not full:
            kernel = "/".join(kernel.split("/")[: 2 if parts[0] == "local_activation" else 1])
        for target in ("sm_80", "sm_90"):
            if target in entry and "error" not in entry[target]:
                groups.setdefault((kernel, target), []).append((entry.get("case", {}), entry[target]))
    rows = [
        [
            "kernels",
            "chip",
            "configurations",
            "registers",
            "bytes spilled",
            "shared memory",
            "occupancy",
            "instructions",
        ]
    ]
    for (kernel, target), found in sorted(groups.items()):
        figures = [f for _, f in found]
        unit = next((case["unit"] for case, _ in found if case.get("unit")), "unit")
        counts = [f["per_unit"] for f in figures if f["per_unit"] is not None]
        rows.append([
            kernel, target, str(len(figures)), _range([f["registers"] for f in figures]),
            str(max(f["stack"] for f in figures)), f"{_range([f['shared'] / 1024 for f in figures])} KiB",
            f"{_range([100 * f['occupancy'] for f in figures])} %",
            f"{_range(counts)} a {unit}" if counts else "–",
        ])  # fmt: skip
    head = f"Compiled ahead of time by Triton {content['triton']}, without a GPU; ranges over configurations."
    return f"{head}\n\n{markdown(rows if full else [row[:-1] for row in rows])}"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{v:.3g}" for v in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def text_table(records: Sequence[Record], run: dict[str, Any]) -> str:
    """All records for a terminal."""
    lines = [describe(run)]
    for suite in dict.fromkeys(r.suite for r in records):
        for race in races(records, suite):
            fused = fused_of(race)
            lines.append(f"\n{suite} {fused.workload} {fused.measure} {fused.dtype}: {shape(fused)}")
            for r in race:
                if r.time is None or r.times_fused is None:
                    lines.append(f"  {r.contestant:<38} {r.status}: {r.reason}")
                    continue
                ratio = f"{r.times_fused.median:8.2f}× ({r.times_fused.low:.2f}–{r.times_fused.high:.2f})"
                cells = f"{duration(r.time.median):>9} {ratio:<26} {size(r.peak_bytes or 0):>9}  {floor_cell(r):<18}"
                graph = f"  in a graph {duration(r.graph.median)}" if r.graph else ""
                lines.append(f"  {r.contestant:<38} {cells}{graph}".rstrip())
    return "\n".join(lines)


# ---- files -------------------------------------------------------------------------------------------------------------


def sections(results: Path = RESULTS) -> dict[str, str]:
    """What stands between the README's markers, by name."""
    return {
        "cpu": device_section(results / "cpu.json"),
        "gpu": device_section(results / "gpu.json"),
        "static": static_section(results / STATIC_RECORD.name),
    }


def _marker(name: str) -> re.Pattern[str]:
    begin, end = re.escape(f"<!-- benchmarks:begin {name} -->"), re.escape(f"<!-- benchmarks:end {name} -->")
    return re.compile(f"({begin}\n)(.*?)({end})", re.DOTALL)


def insert(text: str, found: dict[str, str]) -> str:
    """``text`` with the tables between its markers; every marker must be there, once."""
    for name, table in found.items():
        if len(_marker(name).findall(text)) != 1:
            raise ValueError(
                f"the README needs <!-- benchmarks:begin {name} --> and <!-- benchmarks:end {name} -->, once each"
            )
        begin, end = _marker(name).search(text).span(2)  # type: ignore[union-attr]
        text = f"{text[:begin]}{table}\n{text[end:]}"
    return text


def full_tables(results: Path = RESULTS) -> dict[Path, str]:
    """The files with all rows, for the result files that exist."""
    made = {}
    for name, title in (("cpu", "CPU"), ("gpu", "GPU")):
        if (results / f"{name}.json").exists():
            note = "Written by `python -m benchmarks.report` from the JSON beside it."
            body = device_section(results / f"{name}.json", full=True)
            made[results / f"{name}.md"] = f"# Benchmarks on a {title}\n\n{note}\n\n{body}\n"
    budget = results / STATIC_RECORD.name
    if budget.exists():
        note = (
            "Written by `python -m benchmarks.report` from the JSON beside it. Instructions are those of a kernel's main loop, "
            "each counted once: a loop inside it runs as often as its trip count says."
        )
        made[budget.with_suffix(".md")] = f"# Machine code\n\n{note}\n\n{static_section(budget, full=True)}\n"
    return made


def disagreements(readme: Path, results: Path = RESULTS) -> list[str]:
    """Files that are not what the results say."""
    wrong = []
    text = readme.read_text()
    try:
        if insert(text, sections(results)) != text:
            wrong.append(f"{readme.name} does not show what {results.name}/*.json say")
    except ValueError as error:
        wrong.append(str(error))
    for path, content in full_tables(results).items():
        if not path.exists() or path.read_text() != content:
            wrong.append(f"{path.name} does not show what {path.with_suffix('.json').name} says")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something disagrees")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.check:
        wrong = disagreements(args.readme, args.results)
        print("\n".join(wrong) or "README and results agree")
        return 1 if wrong else 0
    for path, content in full_tables(args.results).items():
        path.write_text(content)
        print(f"wrote {path}")
    from . import plots

    for path in plots.draw(args.results):
        print(f"wrote {path}")
    args.readme.write_text(insert(args.readme.read_text(), sections(args.results)))
    print(f"wrote {args.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
