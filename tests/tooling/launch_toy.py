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
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch.nn import Parameter
from triton import knobs

from din_kernels import _launch
from tests.support.recorded_launch import Driver, Found, checked, checked_prepared, recording


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
    "alignment": ("if any_of_them & 15:", "if False:"),
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
    "dtypes": ("key = (device, *map(_dtype, tensors))", "key = (device,)"),
    "device": ("key = (device, *map(_dtype, tensors))", "key = (*map(_dtype, tensors),)"),
    "alignment": ("key = (*key, *[address & 15 == 0 for address in addresses])", "pass"),
    "alignment, of which": ("key = (*key, *[address & 15 == 0 for address in addresses])", "key = (*key, True)"),
    "order": ("self._in_order((*tensors, *self._rest))", "(*tensors, *self._rest)"),
    "grid": ("self._three: tuple[int, ...] = (*grid, 1, 1)[:3]", "self._three = (grid[0], 1, 1)"),
    "stream": ("active.get_current_stream(device)", "0"),
    "what stands in": ("place[same_as.get(name, name)]", "place.get(name, 0)"),
}


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
    rest = {name: BASE[name] for name in ("several", "number", "vague", "real", "FIRST", "SECOND")}
    kinds = [
        fresh.Prepared(toy, grid, decided, given, same_as, num_warps=4)
        for grid in ((3,), (3, 2, 4))
        for decided in (rest, {**rest, "number": 16, "real": 1.0}, {**rest, "FIRST": False})
        for given, same_as in (
            (("x", "y"), {"anything": "y"}),
            (("anything", "y", "x"), {}),
            (("y",), {"x": "y", "anything": "y"}),
        )
    ]
    call = checked_prepared(fresh.Prepared.__call__, found, driver)
    for _ in range(2):
        for prepared in kinds:
            for first in tensors:
                for driver.device in (0, 1):
                    for others in ((MEMORY, wide), (MEMORY[1:], MEMORY)):
                        call(prepared, *(first, *others)[: len(prepared.tensors)])
    driver.device = 0
    return found


def many_operands() -> dict[str, Any]:
    return {
        **dict.fromkeys("abcdefghijkm", MEMORY), **dict.fromkeys("nopq", 17), **dict.fromkeys("rstu", 0.5),
        "A": True, "B": 16, "C": "ieee",
    }  # fmt: skip


def in_threads(driver: Driver) -> bool:
    """Whether what several threads launch at once is what each launches alone."""
    fresh, numbers = module(), (1, 2, 16, 2**31, 2**63)
    toy.device_caches.clear()
    start = threading.Barrier(len(numbers))

    def work(number: int) -> None:
        start.wait()
        for _ in range(200):
            fresh.launch(toy, (1,), {**BASE, "number": number}, num_warps=4)

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


def hooks_called(driver: Driver) -> list[str]:
    """The names that profilers' hooks see: in the first launch, the second and, taken away, the third."""
    seen: list[str] = []
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook

    def entered(about: Any) -> None:
        seen.append("enter " + about.get()["name"])

    def left(about: Any) -> None:
        seen.append("leave " + about.get()["name"])

    fresh = module()
    for given in (True, True, False):
        if given:
            enter.add(entered)
            leave.add(left)
        fresh.launch(toy, (1,), BASE, num_warps=4)
        enter.remove(entered)
        leave.remove(left)
        seen.append("launched")
    driver.launches.clear()
    return seen


def failures(driver: Driver) -> list[str]:
    """What comes of a first launch that fails, of the next, and of one that a hook keeps from compiling."""
    fresh, told = module(), []
    toy.device_caches.clear()
    with mock.patch.object(Driver, "load_binary", side_effect=RuntimeError("no room")):
        for _ in range(2):
            try:
                fresh.launch(toy, (1,), BASE, num_warps=4)
            except RuntimeError as error:
                told.append(str(error))
    toy.device_caches.clear()
    with mock.patch.object(knobs.runtime, "jit_cache_hook", mock.Mock(return_value=True)):
        fresh.launch(toy, (1,), BASE, num_warps=4)
    told.append(f"{len(driver.launches)} launched")
    fresh.launch(toy, (1,), BASE, num_warps=4)
    fresh.launch(toy, (1,), BASE, num_warps=4)
    told.append(f"{len(driver.launches)} launched")
    driver.launches.clear()
    return told


def bound(fresh: Any, driver: Driver, **attributes: Any) -> int:
    """How many of three equal launches Triton binds, with attributes of the module replaced."""
    found = Found()
    with contextlib.ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(mock.patch.object(fresh, name, value))
        twice = checked(fresh.launch, found, driver)
        for _ in range(3):
            twice(toy, (1,), BASE, num_warps=4)
    assert not found.wrong
    return found.bound["toy"]


def instrumented(driver: Driver) -> int:
    fresh = module()
    with mock.patch.object(knobs.compilation, "instrumentation_mode", ""):
        assert bound(fresh, driver) == 1
    with mock.patch.object(knobs.compilation, "instrumentation_mode", "default"):
        return bound(fresh, driver)


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
            "threads": in_threads(driver), "hooks": hooks_called(driver), "failures": failures(driver),
            "older": bound(module(), driver, _version=lambda: (3, 5)),
            "newer": bound(module(), driver, _version=lambda: (3, 99)),
            "interpreter": bound(module(), driver, _backend=mock.Mock(interpreting=lambda: True)),
            "amd": bound(module(), driver, torch=mock.Mock(**{"version.hip": "6.0"})),
            "instrumented": instrumented(driver), "around": around(driver), "share of time": share_of_time(driver),
        }  # fmt: skip
    print(json.dumps(answers, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
