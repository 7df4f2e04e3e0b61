"""Options of the suites, the arena they share, and the table and result file at the end.

Run by ``python -m benchmarks.run``; by hand: ``python -m pytest benchmarks/test_dice.py --bench-quick``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import record, report
from .arena import UNTIL, Arena, Options

_arena = pytest.StashKey[Arena]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("din_kernels benchmarks")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    group.addoption("--bench-quick", action="store_true", help="fewer rounds and shapes")
    group.addoption("--bench-smoke", action="store_true", help="tiny shapes: see that everything runs")
    group.addoption("--bench-minutes", type=float, help="time in all; what does not fit is skipped")
    group.addoption("--bench-keep", action="store_true", help="keep what FILE holds of races that are not run again")
    group.addoption("--bench-json", type=Path, metavar="FILE", help="write the records here")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = Options.for_mode(
        device, quick=config.getoption("--bench-quick"), smoke=config.getoption("--bench-smoke")
    )  # fmt: skip
    config.stash[_options] = options.lasting(config.getoption("--bench-minutes"))


_options = pytest.StashKey[Options]()


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config) -> Arena:
    """The session's arena: measures this machine's peaks when first asked for."""
    made = Arena(pytestconfig.stash[_options])
    pytestconfig.stash[_arena] = made
    return made


@pytest.fixture(autouse=True)
def _in_time(arena: Arena, request: pytest.FixtureRequest) -> None:
    arena.share = UNTIL[request.module.__name__.rpartition(".")[2]]
    if arena.time_left() <= 0:
        pytest.skip(f"this suite's share of the session's {arena.options.total_seconds:.0f} s is spent")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Suites list their cases by mode: a module's ``cases(options)`` gives the arguments of its one test."""
    cases = getattr(metafunc.module, "cases", None)
    if cases is not None and "case" in metafunc.fixturenames:
        found = cases(metafunc.config.stash[_options])
        metafunc.parametrize("case", found, ids=[str(case) for case in found])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    made = config.stash.get(_arena, None)
    if made is None or not made.records:
        return
    terminalreporter.write_sep("=", "ratios, pair by pair")
    terminalreporter.write_line(report.text_table(made.records, made.run))
    path = config.getoption("--bench-json")
    if path is not None:
        runs, records = {made.run_name: made.run}, made.records
        if config.getoption("--bench-keep"):
            runs, records = record.merge(path, runs, records)
        record.write(path, runs, records)
        terminalreporter.write_line(f"wrote {path}")
