"""The race: contestants take turns on the same inputs, after each has shown that its numbers are right.

pytest-benchmark times the fused contestant; before each of its rounds every other contestant is timed once on the same
inputs, in an order that rotates, so that a ratio compares two calls of one moment, whatever else the machine is doing by
the minute.
Inputs rotate through copies that together exceed the last-level cache twice over.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from din_kernels.testing import Tolerance, compare

from . import clock, record
from .record import Record, Spread
from .roofline import Floor, Machine, measure_cpu, measure_gpu


class Skip(Exception):
    """A contestant that cannot take part; the message says why and becomes part of the results."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """name, and ``make``: build the thing and return its call. ``make`` may raise ``Skip``.

    named(result, inputs) turns a call's result into the tensors that the gate compares, by name; names that the expected
    values lack are not compared. ``compiled`` contestants draw on the time allowed for compilation.
    """

    name: str
    make: Callable[[], clock.Call]
    named: Callable[[Any, Any], dict[str, Tensor]]
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Expected:
    """A float64 result; ``scale`` is the size of its terms where the sum may cancel to less (see ``testing.compare``)."""

    value: Tensor
    tolerance: Tolerance
    scale: float | None = None


@dataclasses.dataclass
class Race:
    """One problem and everything that all contestants share.

    expected   results of the first call on ``inputs[0]``
    dtype, tf32   which peak the arithmetic is held against
    """

    suite: str
    workload: str
    measure: str
    dtype: torch.dtype
    inputs: Sequence[Any]
    expected: dict[str, Expected]
    floor: Floor | None = None
    tf32: bool = False
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


@dataclasses.dataclass
class Options:
    """seconds: of timing a race; rounds: least and most; compile_seconds: for all compilations together; total_seconds:
    after which remaining races are skipped; smoke: tiny shapes, to see that everything runs.

    Suites run in the order of ``UNTIL``, and none may go on after its share of the total (or compile after its share of
    ``compile_seconds``), so that the first does not starve the last.
    """

    device: torch.device
    smoke: bool = False
    quick: bool = False
    seconds: float = 3.0
    rounds: tuple[int, int] = (5, 60)
    compile_seconds: float = 150.0
    total_seconds: float = 330.0

    def lasting(self, minutes: float | None) -> Options:
        """The same with more or less time in all, for compilation in proportion."""
        if minutes is None:
            return self
        factor = minutes * 60 / self.total_seconds
        return dataclasses.replace(self, total_seconds=minutes * 60, compile_seconds=self.compile_seconds * factor)

    @classmethod
    def for_mode(cls, device: torch.device, *, quick: bool, smoke: bool) -> Options:
        gpu = device.type == "cuda"
        if smoke:
            return cls(device, smoke=True, quick=True, seconds=0.05, rounds=(2, 3), compile_seconds=0.0)
        if quick and gpu:
            return cls(device, quick=True, seconds=1.0, rounds=(10, 100), compile_seconds=180.0, total_seconds=400.0)
        if quick:
            return cls(device, quick=True, seconds=1.0, rounds=(3, 40), compile_seconds=25.0, total_seconds=75.0)
        if gpu:
            return cls(device, seconds=3.0, rounds=(20, 200), compile_seconds=1200.0, total_seconds=3000.0)
        return cls(device)


UNTIL = {
    "test_local_activation": 0.5,
    "test_dice": 0.6,
    "test_sparse_update": 0.7,
    "test_training_step": 0.85,
    "test_scoring": 0.92,
    "test_sweep": 1.0,
}


def smallest_cache_multiple(inputs_bytes: int, cache: int, most: int = 32) -> int:
    """How many copies of inputs exceed twice ``cache``: at least 2, at most ``most``."""
    return max(2, min(most, -(-2 * cache // max(inputs_bytes, 1))))


class Arena:
    """Runs races and keeps their records; one for each session."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = options.device
        self.records: list[Record] = []
        self.run = record.describe_run(self.device)
        on_gpu = self.device.type == "cuda"
        self.machine: Machine = measure_gpu() if on_gpu else measure_cpu(0.01 if options.smoke else 0.6)
        self.run["peaks"] = {k: v for k, v in dataclasses.asdict(self.machine).items() if v}
        self.run_name = f"{self.run['date']} {self.run['time']} {self.run['commit']}"
        self.began = time.perf_counter()
        self.compiling = 0.0  # seconds spent so far
        self.share = 1.0  # of the session, that may be spent when the current suite ends: see ``UNTIL``

    def copies(self, inputs_bytes: int) -> int:
        """How many copies of the inputs a race rotates through."""
        return 2 if self.options.smoke else smallest_cache_multiple(inputs_bytes, int(self.machine.cache))

    def time_left(self) -> float:
        """Seconds in which the current suite may still begin a race."""
        return self.share * self.options.total_seconds - (time.perf_counter() - self.began)

    # ---- one race ----------------------------------------------------------------------------------------------------

    def race(self, race: Race, contestants: Sequence[Contestant], benchmark: Any) -> None:
        """Gate, then time; ``contestants[0]`` is the fused one, which must be right. Appends a record for each."""
        gc.collect()
        if self.compiling:
            torch.compiler.reset()  # or the recompilations of many shapes end in a fallback to eager
        ready: dict[str, clock.Call] = {}
        drafts: dict[str, dict[str, Any]] = {}
        for place, contestant in enumerate(contestants):
            try:
                ready[contestant.name], drafts[contestant.name] = self._enter(race, contestant)
            except Exception as error:
                if place == 0:
                    raise
                self._absent(race, contestant.name, error)
        self._time(race, ready, drafts, benchmark)
        for name, draft in drafts.items():
            self._keep(race, name, status="ok", floor=self._floor(race), **draft)
        del ready
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _enter(self, race: Race, contestant: Contestant) -> tuple[clock.Call, dict[str, Any]]:
        """Build, call once, compare, measure memory."""
        begin = time.perf_counter()
        allowed = self.share * self.options.compile_seconds
        if contestant.compiled and self.compiling >= allowed:
            raise Skip(f"the {allowed:.0f} s allowed for compilation so far are spent")
        call = contestant.make()
        result = call(race.inputs[0])
        clock.synchronise(self.device)
        if contestant.compiled:
            self.compiling += time.perf_counter() - begin
        error, tolerated = check(race.expected, contestant.named(result, race.inputs[0]))
        del result
        memory = clock.peak_bytes(call, race.inputs[1 % len(race.inputs)], self.device)
        return call, {"peak_bytes": memory, "error": error, "allowed": tolerated}

    def _time(
        self, race: Race, ready: dict[str, clock.Call], drafts: dict[str, dict[str, Any]], benchmark: Any
    ) -> None:
        inputs, (fewest, most) = race.inputs, self.options.rounds
        once = {name: clock.wall_seconds(call, inputs[0], self.device) for name, call in ready.items()}
        rounds = max(fewest, min(most, int(self.options.seconds / sum(once.values()))))
        fused, *others = ready
        walls: dict[str, list[float]] = {name: [] for name in ready}
        turn = iter(range(10**9))

        def the_others() -> tuple[tuple[Any], dict[str, Any]]:
            now = next(turn)
            chosen = inputs[now % len(inputs)]
            first = now % max(len(others), 1)
            for name in others[first:] + others[:first]:  # whoever goes before leaves its caches and its heap behind
                walls[name].append(clock.wall_seconds(ready[name], chosen, self.device))
            clock.synchronise(self.device)
            return (chosen,), {}

        def the_fused(chosen: Any) -> None:
            ready[fused](chosen)
            clock.synchronise(self.device)

        benchmark.group = " ".join((race.suite, race.workload, race.measure, race.dtype_name))
        benchmark.pedantic(the_fused, setup=the_others, rounds=rounds, iterations=1)
        walls[fused] = list(benchmark.stats.stats.data)
        for name, seconds in walls.items():
            drafts[name] |= {"wall": Spread.of(seconds), "ratio": _ratio(seconds, walls[fused])}
        if self.device.type == "cuda":
            events = clock.event_seconds(ready, inputs, rounds, once)
            for name, seconds in events.items():
                drafts[name] |= {"device": Spread.of(seconds), "device_ratio": _ratio(seconds, events[fused])}
                drafts[name]["graph"] = self._graph(ready[name], inputs, rounds, drafts[name])

    def _graph(
        self, call: clock.Call, inputs: Sequence[Any], rounds: int, draft: dict[str, Any]
    ) -> Spread | None:  # fmt: skip
        try:
            return Spread.of(clock.graph_seconds(call, inputs, rounds))
        except Exception as error:  # capture forbids many things; which one is the finding
            clock.synchronise(self.device)
            draft["reason"] = f"no CUDA graph: {_first_line(error)}"
            return None

    def _floor(self, race: Race) -> dict[str, float] | None:
        return None if race.floor is None else race.floor.times(self.machine, race.dtype, race.tf32)

    # ---- records -----------------------------------------------------------------------------------------------------

    def _absent(self, race: Race, name: str, error: Exception) -> None:
        if isinstance(error, Skip):
            status, reason = "skipped", str(error)
        elif isinstance(error, WrongResult):
            status, reason = "wrong", str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            status, reason = "failed", "out of memory"
        else:
            status, reason = "failed", f"{type(error).__name__}: {_first_line(error)}"
        print(f"\n{race.suite} {race.workload} {race.measure}: {name} {status}: {reason}")
        self._keep(race, name, status=status, reason=reason)

    def _keep(self, race: Race, name: str, **found: Any) -> None:
        self.records.append(
            Record(
                race.suite, race.workload, race.measure, race.dtype_name, name,
                run=self.run_name, details=race.details if name == record.FIRST else {}, **found,
            )
        )  # fmt: skip


class WrongResult(AssertionError):
    """A contestant's numbers are not those of the float64 reference: it gets no time."""


def check(expected: dict[str, Expected], got: dict[str, Tensor]) -> tuple[float, float]:
    """The (error, allowance) of the result closest to its allowance, in RMS; raises ``WrongResult``."""
    worst = (0.0, 1.0)
    if "result" not in got:
        raise WrongResult("gave no result")
    for name in got.keys() & expected.keys():
        value, want = got[name], expected[name]
        if value.shape != want.value.shape:
            raise WrongResult(f"{name}: shape {tuple(value.shape)}, expected {tuple(want.value.shape)}")
        found = compare(value, want.value, want.tolerance, scale=want.scale)
        if not found.ok:
            raise WrongResult(f"{name}: {found}")
        if found.rms_ratio / want.tolerance.rms >= worst[0] / worst[1]:
            worst = (found.rms_ratio, want.tolerance.rms)
    return worst


def _ratio(seconds: Sequence[float], fused: Sequence[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(seconds, fused, strict=True)])


def _first_line(error: Exception) -> str:
    """What is wrong; also the second line where the first only announces it ("… raised:")."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if first.endswith(":") and others:
        first = f"{first} {others[0]}"
    return first[:160]
