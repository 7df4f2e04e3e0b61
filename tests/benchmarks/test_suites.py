"""Every suite runs, on tiny shapes and in a process of its own, and leaves results that the report can read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import record, report, run
from benchmarks.arena import UNTIL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks.run", "--cpu", "--smoke", "--threads", "1", "--out", str(out)]
    # A worker of parallel tests says so in its environment, and pytest-benchmark then measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out / "cpu-smoke.json", done.stdout


def test_all_suites_leave_records(finished: tuple[Path, str]) -> None:
    path, output = finished
    runs, records = record.read(path)
    assert {f"test_{r.suite}" for r in records} == set(UNTIL)
    assert {r.run for r in records} == set(runs)
    for r in records:
        assert (r.wall is not None) == (r.status == "ok"), r
        assert r.status in ("ok", "skipped"), r
        assert r.status == "ok" or r.reason
        if r.wall is not None:
            assert r.error is not None
            assert r.error <= (r.allowed or 0)
    assert {r.contestant for r in records} >= {"fused", "eager", "compiled", "jagged torch", "factorised", "by hand"}
    assert "ratios, pair by pair" in output
    assert "compiled                               skipped: " in output


def test_the_report_reads_them(finished: tuple[Path, str]) -> None:
    path, _ = finished
    text = report.device_section(path, full=True)
    for suite, title in report.SUITES.items():
        assert f"**{title}**" in text, suite


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_run_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the command changes it
    assert run.main(["--gpu", "--quick"]) == 3
    assert "no GPU" in capsys.readouterr().err
