"""Set-up shared by all tests.

Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors, so the switch must be set before any kernel
module is imported. With a GPU the tests that take ``device`` run on it, compiled; those that need the interpreter (mutants,
the memory monitor, CPU tensors) are skipped there, and run with ``TRITON_INTERPRET=1``, as do then all.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)  # tests run side by side; two threads each on two cores only fight

import pytest

from din_kernels._backend import interpreting


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels under test run: the GPU when there is one, otherwise the CPU (interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")


# What the package says to CPU tensors, what Triton does behind it, and Triton where there is no GPU at all.
_TOLD = ("was asked for but the tensors are on 'cpu'", "cannot be accessed from Triton", "0 active drivers")


def _needs_the_interpreter(error: BaseException | None) -> bool:
    """Whether ``error``, or what led to it, says that kernels cannot run on CPU tensors."""
    return error is not None and (
        any(told in str(error) for told in _TOLD) or _needs_the_interpreter(error.__cause__ or error.__context__)
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except Exception as error:
        if not interpreting() and _needs_the_interpreter(error):
            pytest.skip("runs kernels on CPU tensors, which takes the interpreter: TRITON_INTERPRET=1")
        raise


class _Namer:
    """Names what fails as soon as it does: a run that is cut off has told its findings."""

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reporter.write_line(f" {report.nodeid} ({report.when})", red=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Namer(reporter))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(20180819)
    torch.autograd.set_detect_anomaly(False)  # importing RecBole's trainer switches it on for the whole process


@pytest.fixture
def poison_scratch():
    """Fill every ``torch.empty`` with NaN (integers with their maximum): reading what nobody wrote then shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
