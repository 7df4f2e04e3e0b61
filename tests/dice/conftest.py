"""Both ways of launching the Triton kernels, whatever the size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from din_kernels._launch import PreparedLaunch
from din_kernels.ops.dice import tiling, triton_impl

NEVER = -1


def forget() -> None:
    """Launches that were planned with other constants, or kernels."""
    triton_impl._plan.cache_clear()
    triton_impl._columns_tile.cache_clear()
    triton_impl._one_forward.cache_clear()
    triton_impl._one_backward.cache_clear()


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``constants(COLUMNS_MAX_ROWS=…)``: other constants of ``tiling`` for one test."""

    def change(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(tiling, name, value)
        forget()

    yield change
    forget()  # later calls may use a plan made with these; they are undone after this fixture


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that hold channels on chip, as they are launched from now on."""
    seen: list[str] = []
    call = PreparedLaunch.__call__

    def noted(prepared: PreparedLaunch, *arguments: Any) -> None:
        seen.append(prepared.kernel.__name__)
        call(prepared, *arguments)

    monkeypatch.setattr(PreparedLaunch, "__call__", noted)
    return seen


@pytest.fixture
def two_launches(constants: Callable[..., None]) -> None:
    constants(COLUMNS_MAX_ROWS=NEVER)


@pytest.fixture(params=["one", "two"])
def launches(request: pytest.FixtureRequest, constants: Callable[..., None]) -> int:
    """1 where a program holds its channels on chip, up to ``COLUMNS_MAX_ROWS`` rows; 2 always."""
    if request.param == "one":
        return 1
    constants(COLUMNS_MAX_ROWS=NEVER)
    return 2
