"""Tables say what the records say, the README says what the tables say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import plots, record, report
from benchmarks.record import RESULTS, Record, Spread

ROOT = Path(__file__).parents[2]
RUN = {
    "date": "2026-01-01", "commit": "abc", "changed": False,
    "machine": {"cpu": "Some CPU", "cores": 4, "threads": 2, "load_average": 0.5},
    "versions": {"torch": "2.9"},
}  # fmt: skip
EMPTY = "".join(f"<!-- benchmarks:begin {n} -->\nold\n<!-- benchmarks:end {n} -->\ntext\n" for n in report.SECTIONS)


def spread(value: float) -> Spread:
    return Spread(value, value * 0.9, value * 1.1, value * 0.8, 9)


def made(workload: str, measure: str, ratios: dict[str, float], suite: str = "local_activation") -> list[Record]:
    details = {
        "batch": 8, "rows": 30, "padded_rows": 80, "longest": 10, "dim": 4, "hidden": "36", "interaction": "product",
        "activation": "sigmoid",
    }  # fmt: skip
    fused = Record(
        suite, workload, measure, "float32", "fused", "ok", run="r", wall=spread(2e-3), ratio=Spread(1, 1, 1, 1, 9),
        peak_bytes=3 << 20, error=1e-8, allowed=1e-6, floor={"bytes": 5e-4, "special": 1e-3}, details=details,
    )  # fmt: skip
    others = [
        dataclasses.replace(
            fused, contestant=name, wall=spread(2e-3 * r), ratio=spread(r), peak_bytes=40 << 20, details={}
        )
        for name, r in ratios.items()
    ]
    return [
        fused,
        *others,
        Record(suite, workload, measure, "float32", "compiled", "skipped", reason="no time", run="r"),
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    records = [
        *made("S1", "forward+backward", {"eager": 3.0, "factorised": 0.5}),
        *made("S1", "forward", {"eager": 12.0}),
        *made("S2", "forward", {"eager": 0.7}),
        *made("N=8", "forward+backward", {"eager": 4.0}, suite="sweep"),
        *made("N=16", "forward+backward", {"eager": 5.0}, suite="sweep"),
    ]
    record.write(folder / "cpu.json", {"r": RUN}, records)
    return folder


def test_section_shows_training_and_whatever_is_lost(results: Path) -> None:
    text = report.device_section(results / "cpu.json")
    assert (
        "Some CPU, 2 of 4 cores; torch 2.9, Triton none; commit abc, 2026-01-01; load average at the start 0.5" in text
    )
    rows = [line for line in text.splitlines() if line.startswith("| S")]
    assert len(rows) == 2
    assert "| S1 forward+backward |" in rows[0]
    assert "| 2 ms |" in rows[0]
    assert "3× (2.7–3.3)" in rows[0]
    assert "**0.5× (0.45–0.55)**" in rows[0]
    assert "3 MiB, 40 MiB" in rows[0]
    assert "50% (special)" in rows[0]
    assert "| S2 forward |" in rows[1]
    assert "**0.7×" in rows[1]
    assert "N=8" not in text


def test_full_table_shows_all_and_who_is_absent(results: Path) -> None:
    text = report.device_section(results / "cpu.json", full=True)
    assert "| S1 forward |" in text
    assert "12× (11–13)" in text
    assert "N=16" in text
    assert "- compiled: skipped (everywhere): no time" in text


def test_what_was_not_measured_is_called_so(results: Path) -> None:
    found = report.sections(results)
    assert found["gpu"] == "Not yet measured."
    assert found["static"] == "Not yet recorded."


def test_static_section_is_arithmetic(tmp_path: Path) -> None:
    figures = {"registers": 100, "stack": 0, "shared": 2048, "occupancy": 0.5, "per_unit": 30.0}
    cases = {
        "op/kernel/one": {"case": {"unit": "row"}, "sm_90": figures, "gfx942": {"registers": 5}},
        "op/kernel/two": {
            "case": {"unit": "row"},
            "sm_90": {**figures, "registers": 128, "stack": 8, "per_unit": 41.5},
        },
    }
    path = tmp_path / "static_budget.json"
    path.write_text(json.dumps({"triton": "3.9.0", "cases": cases}))
    row = "| op/kernel | sm_90 | 2 | 100–128 | 8 | 2 KiB | 50 % | 30–41.5 a row |"
    assert row in report.static_section(path, full=True)
    assert row in report.full_tables(tmp_path)[path.with_suffix(".md")]
    assert "| op | sm_90 | 2 | 100–128 | 8 | 2 KiB | 50 % |" in report.static_section(path)


def test_check_notices_an_edited_readme(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    assert len(report.disagreements(readme, results)) == 2  # README and cpu.md
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    assert readme.read_text().count("text\n") == len(report.SECTIONS)
    readme.write_text(readme.read_text().replace("3× (2.7", "30× (2.7"))
    assert report.disagreements(readme, results) == ["README.md does not show what results/*.json say"]
    readme.write_text("no markers")
    assert "benchmarks:begin cpu" in report.disagreements(readme, results)[0]


def test_pictures_are_reproducible(results: Path) -> None:
    first = {path.name: path.read_bytes() for path in plots.draw(results)}
    assert set(first) == {"cpu-speedup.svg", "cpu-floors.svg", "cpu-growth.svg"}
    assert {path.name: path.read_bytes() for path in plots.draw(results)} == first
    assert b"eager" in first["cpu-speedup.svg"]
    assert b"special" in first["cpu-floors.svg"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (1.2e-8, "0.012 µs")],
)
def test_durations(value: float, text: str) -> None:
    assert report.duration(value) == text


def test_readme_and_results_agree() -> None:
    """``make report`` makes it so."""
    if "benchmarks:begin" not in (ROOT / "README.md").read_text():
        pytest.skip("the README has no tables of benchmarks yet")
    assert report.disagreements(ROOT / "README.md", RESULTS) == []
