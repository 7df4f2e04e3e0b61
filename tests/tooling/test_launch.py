"""Launching again what was compiled is launching what Triton would: every launch is made both ways, up to the launcher, and
must hand it the same compiled kernel, grid and arguments. In processes of their own, without ``TRITON_INTERPRET``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tooling.test_real_signatures import launched, without_interpreter

pytestmark = pytest.mark.static


@pytest.fixture(scope="module")
def calls() -> dict[str, Any]:
    return without_interpreter("tests.support.recorded_launch")


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    return without_interpreter("tests.tooling.launch_toy")


def test_public_calls_launch_what_triton_would(calls):
    for name, result in calls.items():
        assert result["error"] is None, (name, result["error"])
        assert result["wrong"] == [], name
        assert result["launches"], name


def test_public_calls_bind_only_once(calls):
    """Every kernel of a call made for the second time is launched again."""
    assert {name: result["bound"] for name, result in calls.items() if result["bound"]} == {}


def test_every_kernel_is_launched_both_ways(calls):
    seen = {kernel for result in calls.values() for kernel in result["launches"]}
    assert launched().keys() == seen


def test_neighbours_launch_what_triton_would(toy):
    """1, 2, 16, 17, 2³¹; one address or another; a float or an integer; True or 1; a parameter or a tensor; …"""
    assert toy["nothing"] == []
    assert toy["bound"] < toy["launches"] / 2


def test_prepared_launches_are_what_triton_would_launch(toy):
    assert toy["prepared"] == []
    assert toy["prepared bound"] < toy["prepared launches"] / 2


def test_mistakes_of_prepared_launches_are_told(toy):
    assert len(toy["prepared mistakes"]) == 9
    assert [name for name, wrong in toy["prepared mistakes"].items() if not wrong] == []


def test_mistakes_are_told(toy):
    """What the key does not look at shows."""
    assert len(toy["mistakes"]) == 16
    assert [name for name, wrong in toy["mistakes"].items() if not wrong] == []


@pytest.fixture(params=[0, 1], ids=["launch", "prepared"])
def way(request, toy):
    return toy["ways"][request.param]


def test_threads(way):
    assert way["threads"]


def test_hooks_are_called(way, toy):
    both = ["enter toy", "leave toy", "launched"]
    assert way["hooks"] == [*both, *both, "launched"]
    assert toy["unhooked"] != way["hooks"]


def test_what_failed_is_not_kept(way):
    assert way["failures"] == ["no room", "no room", "0 launched", "2 launched"]


def test_where_triton_binds_every_time(way, toy):
    assert {name: way[name] for name in ("older", "newer", "interpreter", "amd", "instrumented")} == {
        "older": 3, "newer": 1, "interpreter": 3, "amd": 3, "instrumented": 3
    }  # fmt: skip
    assert toy["untold"] == -1


def test_what_is_around_a_kernel_is_called(toy):
    assert toy["around"] == 2


def test_costs_less(toy):
    """0.54 to 0.57 of Triton's time where measured."""
    assert toy["share of time"] < 0.85
