"""The race: no number for wrong results, turns taken, what is absent is explained, and the floats of the statistics."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import activation, arena, clock, record
from benchmarks.arena import Arena, Contestant, Expected, Options, Race, Skip, WrongResult, check
from benchmarks.record import Spread
from benchmarks.roofline import Floor
from benchmarks.workloads import ActivationWorkload, Lengths, make_activation
from din_kernels.testing import Tolerance, tolerance

TOLERANCE = Tolerance(1e-6)


@pytest.fixture(scope="module")
def small() -> Arena:
    return Arena(Options.for_mode(torch.device("cpu"), quick=True, smoke=True))


class Stopwatch:
    """Stands in for pytest-benchmark's fixture, which takes seconds to set up; the suites' own test uses the real one."""

    def __init__(self) -> None:
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target: Any, setup: Any, rounds: int, iterations: int) -> None:
        assert iterations == 1
        for _ in range(rounds):
            arguments, keywords = setup()
            begin = time.perf_counter()
            target(*arguments, **keywords)
            self.stats.stats.data.append(time.perf_counter() - begin)


def contestant(name: str, call: Callable[[Tensor], Tensor]) -> Contestant:
    return Contestant(name, lambda: call, lambda result, _: {"result": result})


def double(inputs: list[Tensor]) -> Race:
    expected = {"result": Expected(inputs[0].double() * 2, TOLERANCE)}
    return Race("toy", "double", "forward", torch.float32, inputs, expected, Floor(bytes=80.0, flops=10.0))


def test_a_race_gates_times_and_explains(small: Arena) -> None:
    order: list[str] = []

    def noting(name: str, factor: float, pause: float = 0.0) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            order.append(name)
            time.sleep(pause)
            return x * factor

        return call

    def absent() -> Callable[[Tensor], Tensor]:
        raise Skip("it is not installed")

    def broken() -> Callable[[Tensor], Tensor]:
        raise RuntimeError("it fell over\nand more")

    small.records.clear()
    small.race(
        double([torch.ones(10), torch.ones(10)]),
        [
            contestant("fused", noting("fused", 2)),
            contestant("slow", noting("slow", 2, 0.02)),
            contestant("wrong", noting("wrong", 2.001)),
            Contestant("absent", absent, lambda result, _: {}),
            Contestant("broken", broken, lambda result, _: {}),
        ],
        Stopwatch(),
    )
    found = {r.contestant: r for r in small.records}
    assert {name: r.status for name, r in found.items()} == {
        "fused": "ok", "slow": "ok", "wrong": "wrong", "absent": "skipped", "broken": "failed",
    }  # fmt: skip
    assert found["absent"].reason == "it is not installed"
    assert found["broken"].reason == "RuntimeError: it fell over"
    assert found["wrong"].wall is None
    assert order.count("wrong") == 1  # asked once, never timed
    slow, fused = found["slow"], found["fused"]
    assert slow.ratio is not None
    assert fused.ratio is not None
    assert slow.ratio.median > 5
    assert fused.ratio.median == 1
    assert slow.wall is not None
    assert slow.wall.least >= 0.02
    timed = order[-2 * slow.wall.rounds :]
    assert timed == ["slow", "fused"] * slow.wall.rounds
    assert fused.floor is not None
    assert fused.of_floor is not None
    assert set(fused.floor) == {"bytes", "arithmetic", "special"}


def test_the_fused_contestant_must_be_right(small: Arena) -> None:
    with pytest.raises(WrongResult, match="RMS"):
        small.race(double([torch.ones(4)]), [contestant("fused", lambda x: x * 3)], Stopwatch())


@pytest.mark.parametrize("got", [{}, {"result": torch.zeros(3)}, {"result": torch.full((4,), float("nan"))}])
def test_the_gate_refuses(got: dict[str, Tensor]) -> None:
    with pytest.raises(WrongResult):
        check({"result": Expected(torch.zeros(4, dtype=torch.float64), TOLERANCE)}, got)


def test_the_gate_reports_what_came_closest_to_its_allowance() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    expected = {"result": Expected(ones, Tolerance(1e-2)), "keys": Expected(ones, Tolerance(1e-1))}
    error, allowed = check(expected, {"result": ones * 1.005, "keys": ones * 1.02, "other": ones})
    assert (error, allowed) == (pytest.approx(0.005), 1e-2)


def test_inputs_exceed_the_cache_twice_over() -> None:
    assert arena.smallest_cache_multiple(10 << 20, 32 << 20) == 7
    assert arena.smallest_cache_multiple(1 << 30, 32 << 20) == 2
    assert arena.smallest_cache_multiple(1, 32 << 20) == 32


def test_shares_of_the_session_name_every_suite() -> None:
    folder = Path(arena.__file__).parent
    assert set(arena.UNTIL) == {path.stem for path in folder.glob("test_*.py")}
    assert list(arena.UNTIL.values()) == sorted(arena.UNTIL.values())
    assert list(arena.UNTIL.values())[-1] == 1.0


def test_an_announcement_is_followed_by_what_it_announces() -> None:
    assert arena._first_line(RuntimeError("backend='inductor' raised:\n\n  LoweringException: so\nmore")) == (
        "backend='inductor' raised: LoweringException: so"
    )
    assert arena._first_line(RuntimeError("")) == ""


class Card:
    """Stands in for ``torch.cuda``: a stream, a graph whose capture may fail, and what has been done to it."""

    def __init__(self, waits: bool = False, fails: bool = False) -> None:
        self.waits, self.fails, self.mode, self.done = waits, fails, 0, []
        self.default_generators = [
            SimpleNamespace(
                graphsafe_set_state=lambda state: self.done.append(f"new generator, seed {state.seed}"),
                initial_seed=lambda: 5,
            )
        ]
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.CUDAGraph = lambda: SimpleNamespace(
            reset=lambda: self.done.append("reset"), replay=lambda: self.done.append("replay")
        )
        self.Event = lambda enable_timing: SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 6.0
        )
        self.current_stream = self.Stream
        self.stream = lambda stream: contextlib.nullcontext()
        self.current_device = lambda: 0
        self.get_sync_debug_mode = lambda: self.mode
        self.synchronize = lambda: None

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.mode = mode

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Any:
        assert not gc.isenabled()  # what is collected in a capture can end it
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError("operation failed due to a previous error during capture")

    def call(self, _: Any) -> None:
        if self.waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.fails and not gc.isenabled():
            try:
                raise KeyError("which the call knows how to handle")
            except KeyError:
                raise RuntimeError("not permitted when a stream captures\nmore") from None


def test_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that a capture which fails leaves torch able to draw random numbers, and says what failed first."""

    def times(card: Card) -> list[float]:
        monkeypatch.setattr(clock.torch, "cuda", card)
        return clock.graph_seconds(card.call, [1, 2, 3], 4)

    class Generator:
        def __init__(self, device: str) -> None:
            self.manual_seed = lambda seed: setattr(self, "seed", seed)

    monkeypatch.setattr(clock.torch, "Generator", Generator)
    good, waiting, failing = Card(), Card(waits=True), Card(fails=True)
    assert times(good) == [0.002] * 4
    assert good.done == ["replay"] * 5
    with pytest.raises(clock.NoGraph, match=r"waits for the GPU .called a synchronizing"):
        times(waiting)
    assert waiting.done == []
    with pytest.raises(clock.NoGraph, match=r"^not permitted when a stream captures$"):
        times(failing)
    assert failing.done == ["reset", "new generator, seed 5"]
    assert good.mode == waiting.mode == failing.mode == 0
    assert gc.isenabled()


def test_events_begin_when_the_host_is_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight products take 6 ms here: a call of 1 ms needs 2 before it, one of a second no more than ``HEAD_START`` has."""
    products: list[str] = []
    calls = {name: lambda _, name=name: products.append(name) for name in ("short", "long")}
    monkeypatch.setattr(clock.torch, "cuda", Card())
    monkeypatch.setattr(clock.torch, "randn", lambda *shape, device, dtype: None)
    monkeypatch.setattr(clock.torch, "mm", lambda a, b: products.append("product"))
    found = clock.event_seconds(calls, [0], 1, {"short": 1e-3, "long": 1.0})
    assert found == {"short": [0.006], "long": [0.006]}
    assert products == ["product"] * (9 + 9 + 2) + ["short"] + ["product"] * 7 + ["long"]


# ---- the local activation contestants --------------------------------------------------------------------------------


@pytest.mark.parametrize("interaction", ["product", "outer"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("candidates", [0, 3])
@pytest.mark.parametrize("kind", ["sigmoid", "dice"])
def test_every_baseline_is_the_same_function(interaction: str, softmax: bool, candidates: int, kind: str) -> None:
    """In float64, so that a baseline which is merely close does not pass. With softmax forward only: gradients of the output
    layer cancel there, and the gate's scale does not know by how much."""
    measure = "forward" if softmax else "forward+backward"
    workload = ActivationWorkload(
        "t", 4, Lengths("uniform", 1, 5), 6, (5, 3), activation=kind, interaction=interaction, softmax=softmax,
        candidates=candidates,
    )  # fmt: skip
    inputs = make_activation(workload, dtype=torch.float64)
    for leaf in (inputs.query, inputs.keys, inputs.padded):
        leaf.requires_grad_()
    unit = activation.reference_unit(workload).double()
    expected = activation.expected_results(unit, inputs, measure, tf32=False, row_limit=1)
    assert softmax or {"result", "query", "keys", "linears.0.weight"} <= set(expected)
    found = activation.contestants(unit, workload, measure, compiled=False, with_peers=False)
    assert [c.name for c in found] == ["fused", "fused, padded in", "eager", "jagged torch", "factorised"]
    for one in found:
        named = one.named(one.make()(inputs), inputs)
        assert set(named) == set(expected)
        error, allowed = check(expected, named)
        assert error <= allowed <= 1e-10


def test_what_16_bits_lose_is_not_held_against_the_baselines() -> None:
    """The gradient of a bias before Dice, which is beyond unfused operations in bfloat16. The fused unit is held to it."""
    workload = ActivationWorkload("t", 64, Lengths("uniform", 1, 100), 16, (8, 4), activation="dice")
    inputs = make_activation(workload, dtype=torch.bfloat16)
    for leaf in (inputs.query, inputs.keys, inputs.padded):
        leaf.requires_grad_()
    unit = activation.reference_unit(workload).bfloat16()
    expected = activation.expected_results(unit, inputs, "forward+backward", tf32=False)
    for one in activation.contestants(unit, workload, "forward+backward", compiled=False, with_peers=False):
        named = one.named(one.make()(inputs), inputs)
        missing = set() if one.name.startswith("fused") else {"linears.0.bias", "linears.1.bias"}
        assert set(expected) - set(named) == missing
        check(expected, named)
    assert activation.lost_in_rounding(unit.float()) == set()


# ---- records ---------------------------------------------------------------------------------------------------------


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 1.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 1)


def test_records_survive_the_file(tmp_path: Path) -> None:
    run = record.describe_run(torch.device("cpu"))
    assert run["machine"]["cpu"]
    # The package's metadata may leave out which toolkit torch was built with.
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    one = record.Record(
        "dice", "w", "forward", "float32", "fused", "ok", run="r", wall=Spread.of([1.0, 2.0]), ratio=Spread.of([1.0, 1.0]),
        peak_bytes=5, error=1e-7, allowed=1e-6, floor={"bytes": 0.75, "arithmetic": 0.1}, details={"rows": 3},
    )  # fmt: skip
    other = record.Record("dice", "w", "forward", "float32", "eager", "skipped", reason="so", run="r")
    record.write(tmp_path / "x.json", {"r": run}, [one, other])
    runs, records = record.read(tmp_path / "x.json")
    assert records == [one, other]
    assert runs["r"]["commit"] == run["commit"]
    assert one.of_floor == ("bytes", 0.5)
    record.write(tmp_path / "y.json", {}, [one])
    with pytest.raises(ValueError, match="names run 'r'"):
        record.read(tmp_path / "y.json")


def test_a_later_run_replaces_its_races_and_keeps_the_others(tmp_path: Path) -> None:
    def of(workload: str, run: str) -> record.Record:
        return record.Record("dice", workload, "forward", "float32", "fused", "skipped", reason="so", run=run)

    path = tmp_path / "x.json"
    record.write(path, {"a": {"date": "1"}, "b": {"date": "2"}}, [of("one", "a"), of("two", "b")])
    runs, records = record.merge(path, {"c": {"date": "3"}}, [of("two", "c")])
    assert records == [of("one", "a"), of("two", "c")]
    assert set(runs) == {"a", "c"}
    assert record.merge(tmp_path / "none.json", {"c": {}}, [of("two", "c")]) == ({"c": {}}, [of("two", "c")])


def test_tolerances_of_the_gate_are_the_projects() -> None:
    workload = ActivationWorkload("t", 3, Lengths("full", 4, 4), 6, (5,))
    inputs = make_activation(workload)
    expected = activation.expected_results(activation.reference_unit(workload), inputs, "forward", tf32=False)
    assert expected["result"].tolerance == tolerance(torch.float32, length=24, stages=6)
