"""Launches of one kernel that lie next to each other, each made as ``_launch.launch`` makes it and as Triton does.

    python -m tests.tooling.launch_toy

prints one JSON object: what is wrong with the key -> in what launches then differed from Triton's ("nothing": with the real
one), and what else ``test_launch.py`` asks about. Run without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch.nn import Parameter
from triton import knobs

from din_kernels import _launch
from tests.support.recorded_launch import Driver, Found, both, checked, checked_prepared, recording


@triton.jit(do_not_specialize=["vague"])
def toy(
    x, y, several, number, vague, real, anything, FIRST: triton.language.constexpr, SECOND: triton.language.constexpr
):
    pass


@triton.jit
def many(
    a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q, r, s, t, u,
    A: triton.language.constexpr, B: triton.language.constexpr, C: triton.language.constexpr,
):  # fmt: skip
    pass


MEMORY = torch.zeros(64)
BASE = {
    "x": MEMORY, "y": MEMORY, "several": (MEMORY, 3), "number": 17, "vague": 17, "real": 0.5, "anything": None,
    "FIRST": True, "SECOND": 16,
}  # fmt: skip


def launches() -> Iterator[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]]:
    """(grid, operands, options) that differ in one thing from each other."""
    options: dict[str, Any] = {"num_warps": 4, "num_stages": 2}
    for grid in ((3,), (3, 2), (3, 2, 4), (1, 1, 4)):
        yield grid, BASE, options
    yield from (
        ((1,), BASE, other) for other in ({}, {"num_warps": 2}, {"num_stages": 2}, {"num_warps": 2, "num_stages": 4})
    )
    wide = torch.zeros(64, dtype=torch.float64)
    others: dict[str, list[Any]] = {
        "x": [
            MEMORY.clone(), Parameter(MEMORY), MEMORY[1:], MEMORY[2:], MEMORY[4:], MEMORY[:0], wide, wide[1:], MEMORY.half(),
            MEMORY.to(torch.bfloat16), MEMORY.long(), MEMORY.bool(), 1, 0.5, None, (MEMORY,),
        ],
        "y": [MEMORY[1:], MEMORY[4:], wide],
        "several": [
            (MEMORY,), (MEMORY, 1), (MEMORY, 16), (MEMORY, 17), (MEMORY[1:], 3), (wide, 3), (Parameter(MEMORY), 3),
            (3, MEMORY), (MEMORY, 2.0), (MEMORY, 2**31), (MEMORY, 3, MEMORY), ((MEMORY,), 3), ((wide,), 3), (MEMORY, None),
        ],
        "real": [1e-8, 1.0, 0.0, 0, 1, 16, 17, MEMORY, False],
        "anything": [3, 1, 0.5, True, MEMORY, (None,)],
        "FIRST": [False, 1, 0, 2],
        "SECOND": [1, True, 32, None, 16.0, "a", (1, 2), (1, 3)],
    }  # fmt: skip
    numbers = [0, 1, 2, 15, 16, 17, 32, -1, -16, -17, *(2**n + d for n in (31, 32, 63) for d in (-1, 0, 1)), 2**64 - 1]
    others |= {
        "number": [*numbers, -(2**31), -(2**31) - 1, -(2**31) - 16, -(2**63), True, 1.0, MEMORY],
        "vague": numbers,
    }
    for name, values in others.items():
        yield from (((1,), {**BASE, name: value}, options) for value in values)
    yield (1,), {**BASE, "x": MEMORY[1:], "number": 2**31}, options
    yield (1,), {**BASE, "y": MEMORY[1:], "vague": 2**31}, options


# In the source of ``_launch``: what would make it blind to something, to be noticed.
MISTAKES = {
    "constants": ("key = [*self.constants(arguments), *map(_dtype, tensors)]", "key = [*map(_dtype, tensors)]"),
    "dtypes": ("key = [*self.constants(arguments), *map(_dtype, tensors)]", "key = [*self.constants(arguments)]"),
    "types": ("kinds.compiled", "form.__dict__.setdefault('compiled', {})"),
    "types of members": ("key.append((types, *inner))", "key.append((*inner,))"),
    "members": ("key.append((types, *inner))", "key.append(types)"),
    "alignment": ("if any_of_them & 15 else ()", "if False else ()"),
    "alignment, of which": ("tuple([address & 15 == 0 for address in addresses])", "None"),
    "width": ("if integers and not", "if False and not"),
    "width, of which": ('tuple("i32" if', 'frozenset("i32" if'),
    "1": ('"1" if value == 1 else value % 16 == 0', "value % 16 == 0"),
    "multiples of 16": ('"1" if value == 1 else value % 16 == 0', "value == 1"),
    "options": ("*options.items(), ", ""),
    "names of options": ("*options.items(), ", "*options.values(), "),
    "device": ("(device, *options", "(*options"),
    "grid": ("(*grid, 1, 1)[:3]", "(grid[0], 1, 1)"),
    "stream": ("active.get_current_stream(device)", "0"),
}


# The same for launches that are prepared.
PREPARED_MISTAKES = {
    "dtypes": ("*map(type, numbers), *map(_dtype, tensors), ", "*map(type, numbers), "),
    "types of numbers": ("*map(type, numbers), *map(_dtype, tensors), ", "*map(_dtype, tensors), "),
    "device": ("key = (device, *map(type", "key = (*map(type"),
    "alignment": (", *_unaligned([*map(_address, tensors)]))", ")"),
    "alignment, of which": ("tuple([address & 15 == 0 for address in addresses])", "None"),
    "order": ("self._in_order((*tensors, *numbers, *self._rest))", "(*tensors, *numbers, *self._rest)"),
    "grid": ("self._three: tuple[int, ...] = (*grid, 1, 1)[:3]", "self._three = (grid[0], 1, 1)"),
    "stream": ("again.launch(self._three, active.get_current_stream(device)", "again.launch(self._three, 0"),
    "what stands in": ("place[self.same_as.get(name, name)]", "place.get(name, 0)"),
}
UNHOOKED = "again is None or _hooked(knobs.runtime) or", "again is None or"
UNTOLD = " or knobs.compilation.instrumentation_mode:\n            found", ":\n            found"


def module(*mistake: str) -> Any:
    """A fresh ``_launch``."""
    source = Path(str(_launch.__file__)).read_text()
    if mistake:
        assert source.count(mistake[0]) >= 1, f"{mistake[0]!r} is no longer there"
        source = source.replace(*mistake)
    fresh = ModuleType(_launch.__name__)
    fresh.__package__ = _launch.__package__
    with mock.patch.dict(sys.modules, {_launch.__name__: fresh}):
        exec(compile(source, "mistaken", "exec"), vars(fresh))
    return fresh


def compare(launch: Any, driver: Driver) -> Found:
    found = Found()
    twice = checked(launch, found, driver)
    for _ in range(2):
        for grid, operands, options in launches():
            for driver.device in (0, 1):
                twice(toy, grid, operands, **options)
    driver.device = 0
    return found


def compare_prepared(fresh: Any, driver: Driver) -> Found:
    """Tensors of every kind, launched by preparations that differ in one thing."""
    found, wide = Found(), torch.zeros(64, dtype=torch.float64)
    tensors = (
        MEMORY,
        MEMORY.clone(),
        Parameter(MEMORY),
        MEMORY[1:],
        MEMORY[2:],
        MEMORY[4:],
        wide,
        wide[1:],
        MEMORY.half(),
    )
    rest = {name: BASE[name] for name in ("several", "number", "FIRST", "SECOND")}
    kinds = [
        fresh.PreparedLaunch(toy, grid, decided, given, ("vague", "real"), same_as, num_warps=4)
        for grid in ((3,), (3, 2, 4))
        for decided in (rest, {**rest, "number": 16}, {**rest, "FIRST": False})
        for given, same_as in (
            (("x", "y"), {"anything": "y"}), (("anything", "y", "x"), {}), (("y",), {"x": "y", "anything": "y"})
        )
    ]  # fmt: skip
    call = checked_prepared(fresh.PreparedLaunch.__call__, found, driver)
    for _ in range(2):
        for prepared in kinds:
            for first in tensors:
                for driver.device in (0, 1):
                    for others in ((MEMORY, wide), (MEMORY[1:], MEMORY)):
                        for number in (0.5, 1.0, 1):
                            call(prepared, (first, *others)[: len(prepared.tensors)], 16, number)
    driver.device = 0
    return found


Way = Callable[[Any], Callable[..., None]]


def by_launch(fresh: Any) -> Callable[..., None]:
    """One launch, with another number if one is given."""
    return lambda number=17: fresh.launch(toy, (1,), {**BASE, "number": number}, num_warps=4)


def by_preparation(fresh: Any) -> Callable[..., None]:
    rest = {name: BASE[name] for name in ("several", "real", "anything", "FIRST", "SECOND", "vague")}
    made: dict[int, Any] = {}

    def launch(number: int = 17) -> None:
        prepared = made.setdefault(
            number, fresh.PreparedLaunch(toy, (1,), {**rest, "number": number}, ("x", "y"), num_warps=4)
        )
        prepared((MEMORY, MEMORY))

    return launch


WAYS: tuple[Way, Way] = by_launch, by_preparation


def many_operands() -> dict[str, Any]:
    return {
        **dict.fromkeys("abcdefghijkm", MEMORY), **dict.fromkeys("nopq", 17), **dict.fromkeys("rstu", 0.5),
        "A": True, "B": 16, "C": "ieee",
    }  # fmt: skip


def in_threads(driver: Driver, way: Way) -> bool:
    """Whether what several threads launch at once is what each launches alone."""
    launch, numbers = way(module()), (1, 2, 16, 2**31, 2**63)
    toy.device_caches.clear()
    # Of threads that launch a kernel first of all, Triton forgets what some of them compiled: not what this is about.
    toy[(1,)](*BASE.values(), num_warps=4)
    driver.launches.clear()
    start = threading.Barrier(len(numbers))

    def work(number: int) -> None:
        start.wait()
        for _ in range(200):
            launch(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made, driver.launches[:] = list(driver.launches), []
    for number in numbers:
        toy[(1,)](*{**BASE, "number": number}.values(), num_warps=4)
    right = {launch.arguments[3]: launch.function for launch in driver.launches}
    driver.launches.clear()
    # Two threads may compile for the same key at once; what is launched in the end is one of them.
    last = {launch.arguments[3]: launch for launch in made}
    return len(made) == 1000 and all(last[number].function == right[number] for number in numbers)


def hooks_called(driver: Driver, way: Way, *mistake: str) -> list[str]:
    """The names that profilers' hooks see: in the first launch, the second and, taken away, the third."""
    seen: list[str] = []
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook

    def entered(about: Any) -> None:
        seen.append("enter " + about.get()["name"])

    def left(about: Any) -> None:
        seen.append("leave " + about.get()["name"])

    launch = way(module(*mistake))
    for given in (True, True, False):
        if given:
            enter.add(entered)
            leave.add(left)
        launch()
        enter.remove(entered)
        leave.remove(left)
        seen.append("launched")
    driver.launches.clear()
    return seen


def failures(driver: Driver, way: Way) -> list[str]:
    """What comes of a first launch that fails, of the next, and of one that a hook keeps from compiling."""
    launch, told = way(module()), []
    toy.device_caches.clear()
    with mock.patch.object(Driver, "load_binary", side_effect=RuntimeError("no room")):
        for _ in range(2):
            try:
                launch()
            except RuntimeError as error:
                told.append(str(error))
    toy.device_caches.clear()
    with mock.patch.object(knobs.runtime, "jit_cache_hook", mock.Mock(return_value=True)):
        launch()
    told.append(f"{len(driver.launches)} launched")
    launch()
    launch()
    told.append(f"{len(driver.launches)} launched")
    driver.launches.clear()
    return told


def binds(launch: Callable[..., None], driver: Driver) -> int:
    """How many of three equal launches Triton binds; −1 if one is not what Triton would launch."""
    found = Found()
    for _ in range(3):
        both(launch, toy, (1,), BASE, {"num_warps": 4}, found, driver)
    return -1 if found.wrong else found.bound["toy"]


def bound(fresh: Any, driver: Driver, way: Way, **attributes: Any) -> int:
    """The same with attributes of the module replaced."""
    with contextlib.ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(mock.patch.object(fresh, name, value))
        return binds(way(fresh), driver)


def instrumented(driver: Driver, way: Way, *mistake: str) -> int:
    """The same of launches that are kept before a profiler asks for kernels to be instrumented."""
    launch = way(module(*mistake))
    with mock.patch.object(knobs.compilation, "instrumentation_mode", ""):
        assert binds(launch, driver) == 1
    with mock.patch.object(knobs.compilation, "instrumentation_mode", "default"):
        return binds(launch, driver)


def around(driver: Driver) -> int:
    """How many of two launches reach something that only looks like a kernel, as an autotuner does."""
    fresh, reached = module(), []

    class Around:
        arg_names = toy.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            reached.append(grid)
            return toy[grid]

    kernel = Around()
    for _ in range(2):
        fresh.launch(kernel, (1,), BASE, num_warps=4)
    assert len(driver.launches) == 2
    driver.launches.clear()
    return len(reached)


def share_of_time(driver: Driver) -> float:
    """Fastest launch of ``launch``, over Triton's."""
    operands, best = many_operands(), [1.0, 1.0]
    launch, arguments = module().launch, tuple(operands.values())
    options = {"num_warps": 4, "num_stages": 2}
    for _ in range(3000):
        for which, call in enumerate(
            (lambda: launch(many, (1,), operands, **options), lambda: many[(1,)](*arguments, **options))
        ):
            started = time.perf_counter()
            call()
            best[which] = min(best[which], time.perf_counter() - started)
        driver.launches.clear()
    return best[0] / best[1]


def of_way(driver: Driver, way: Way) -> dict[str, Any]:
    """What does not depend on how the launch is said."""
    return {
        "threads": in_threads(driver, way), "hooks": hooks_called(driver, way), "failures": failures(driver, way),
        "older": bound(module(), driver, way, _version=lambda: (3, 5)),
        "newer": bound(module(), driver, way, _version=lambda: (3, 99)),
        "interpreter": bound(module(), driver, way, _backend=mock.Mock(interpreting=lambda: True)),
        "amd": bound(module(), driver, way, torch=mock.Mock(**{"version.hip": "6.0"})),
        "instrumented": instrumented(driver, way),
    }  # fmt: skip


def main() -> int:
    with recording() as driver:
        found = compare(module().launch, driver)
        told = {name: compare(module(*mistake).launch, driver).wrong[:3] for name, mistake in MISTAKES.items()}
        prepared = compare_prepared(module(), driver)
        told_prepared = {
            name: compare_prepared(module(*mistake), driver).wrong[:3] for name, mistake in PREPARED_MISTAKES.items()
        }
        answers = {
            "prepared": prepared.wrong, "prepared launches": prepared.launches["toy"], "prepared bound": prepared.bound["toy"],
            "prepared mistakes": told_prepared,
            "nothing": found.wrong, "launches": found.launches["toy"], "bound": found.bound["toy"], "mistakes": told,
            "ways": [of_way(driver, way) for way in WAYS], "unhooked": hooks_called(driver, by_preparation, *UNHOOKED),
            "untold": instrumented(driver, by_preparation, *UNTOLD),
            "around": around(driver), "share of time": share_of_time(driver),
        }  # fmt: skip
    print(json.dumps(answers, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
