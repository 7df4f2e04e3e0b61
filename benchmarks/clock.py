"""Clocks: wall time with synchronisation, GPU time by events and by graph replay, and peak memory of a call."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from reference.training_loop import PeakMemory

Call = Callable[[Any], Any]  # one call on one set of inputs


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(call: Call, inputs: Any, device: torch.device) -> float:
    """From before the call to the end of all it started. The result is freed outside."""
    synchronise(device)
    begin = time.perf_counter()
    result = call(inputs)
    synchronise(device)
    seconds = time.perf_counter() - begin
    del result
    return seconds


HEAD_START = 5e-3  # seconds; no call takes the host longer that does not keep the GPU as long


def event_seconds(
    calls: dict[str, Call], inputs: Sequence[Any], rounds: int, walls: dict[str, float]
) -> dict[str, list[float]]:
    """GPU time of each call between two events in the stream, ``rounds`` times, the calls taking turns.

    Every measurement is queued behind matrix products that outlast its launches, so that the GPU does not wait for Python
    between kernels: for half again as long as the call took by the wall (``walls``), or ``HEAD_START``. Calls that read a
    value back to the host wait nevertheless, and pay for it here.
    """
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    head_starts = {name: _products(busy, min(1.5 * walls[name], HEAD_START)) for name in calls}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(head_starts[name]):
                torch.mm(busy, busy)
            begin.record()
            call(inputs[turn % len(inputs)])
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    return {name: [b.elapsed_time(e) / 1e3 for b, e in pairs] for name, pairs in events.items()}


def _products(busy: torch.Tensor, seconds: float) -> int:
    """How many products of ``busy`` with itself take so long."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.mm(busy, busy)
    begin.record()
    for _ in range(8):
        torch.mm(busy, busy)
    end.record()
    end.synchronize()
    return math.ceil(seconds / (begin.elapsed_time(end) / 8e3))


class NoGraph(RuntimeError):
    """Why a call cannot be captured in a CUDA graph."""


def graph_seconds(call: Call, inputs: Sequence[Any], rounds: int) -> list[float]:
    """A call's share of the replay of one CUDA graph that makes it once on each of ``inputs``. Raises ``NoGraph`` where the
    call cannot be captured (it reads a value back, or allocates in a way that capture forbids)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), _waiting_forbidden():
        for one in inputs:
            call(one)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        for one in inputs:
            call(one)
    seconds = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(inputs))
    return seconds[1:]


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """``torch.cuda.graph``, but that a capture which fails says what went wrong first, and leaves torch able to go on.

    What is garbage by now (modules of kernels, other graphs) must not be unloaded while a capture is on, so it is before."""
    gc.collect()
    enabled, first = gc.isenabled(), None
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                yield
            except Exception as error:  # the end of the capture will fail too, and say nothing
                first = error
                raise
    except Exception as error:
        _recover(graph)
        raise NoGraph(_first_line(first or error)) from error
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Finds out before a capture, which would not survive it, whether a call waits for the GPU, as reading a value back does,
    or copying from ordinary memory of the host."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise NoGraph(f"it waits for the GPU ({_first_line(error)})") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _recover(graph: torch.cuda.CUDAGraph) -> None:
    """After a capture that failed torch's random generator still believes in it, and refuses every number from then on: it
    gets a new state, with the seed that it had."""
    with contextlib.suppress(RuntimeError):
        graph.reset()
    device = torch.cuda.current_device()
    default = torch.cuda.default_generators[device]
    generator = torch.Generator(f"cuda:{device}")
    generator.manual_seed(default.initial_seed())
    default.graphsafe_set_state(generator)
    torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def peak_bytes(call: Call, inputs: Any, device: torch.device) -> int:
    """Memory one call needs above what is in use, its result included."""
    synchronise(device)
    with PeakMemory(device) as memory:
        result = call(inputs)
        synchronise(device)
    del result
    return memory.bytes
