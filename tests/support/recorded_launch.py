"""Real calls on CPU tensors up to Triton's launcher, which writes down what it was handed instead of launching it.

Inside ``recording()`` the public calls take the Triton backend, kernels are bound by Triton itself or launched again by
``_launch.launch``, and no kernel is compiled: a ``CompiledKernel`` of Triton's own class stands for what would have been.
Inside ``both_ways(found)`` every launch is made twice, as ``launch`` makes it and through ``kernel[grid]``, and the two must
hand the launcher the same.

    python -m tests.support.recorded_launch

prints one JSON object: public call -> what differed and which kernels were bound anew the second time. Without
``TRITON_INTERPRET``: kernels imported under it cannot be bound.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import itertools
import json
import pkgutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import din_kernels.ops
from din_kernels import _backend, _checks, _launch


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """What a launcher was handed. ``function`` is there once for every compiled kernel."""

    grid: tuple[int, ...]
    stream: int
    function: int
    metadata: Any
    arguments: tuple[Any, ...]
    thread: int

    def differs(self, other: Launch) -> str:
        """In what; empty if in nothing."""
        for name in ("grid", "stream", "function", "metadata"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name)}, where Triton has {getattr(other, name)}"
        if len(self.arguments) != len(other.arguments):
            return f"{len(self.arguments)} arguments, where Triton has {len(other.arguments)}"
        for place, (mine, theirs) in enumerate(zip(self.arguments, other.arguments, strict=True)):
            if mine is not theirs:
                return f"argument {place} {mine!r}, where Triton has {theirs!r}"
        return ""


class Driver:
    """As much of a driver as binding and launching take, for an H100."""

    device, stream = 0, 7

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches: list[Launch] = []
        self.target = GPUTarget("cuda", 90, 32)
        self.functions = itertools.count(1)
        self.utils = self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, next(self.functions), 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launcher(
            x: int,
            y: int,
            z: int,
            stream: int,
            function: int,
            packed: Any,
            about: Any,
            enter: Any,
            leave: Any,
            *args: Any,
        ) -> None:
            if enter is not None:
                enter(about)
            self.launches.append(Launch((x, y, z), stream, function, packed, args, threading.get_ident()))
            if leave is not None:
                leave(about)

        return launcher


def compiled(source: Any, target: Any, options: dict[str, Any], **_: Any) -> Any:
    """Stands for ``triton.compiler.compile``."""
    from triton.compiler import CompiledKernel

    class Kernel(CompiledKernel):
        def __init__(self) -> None:
            metadata = {
                **options,
                "name": source.name,
                "shared": 0,
                "warp_size": 32,
                "tmem_size": None,
                "target": target,
            }
            self.metadata = SimpleNamespace(**metadata)
            self.packed_metadata, self.src, self.name, self.kernel = object(), source, source.name, b""
            self.hash, self.asm, self.metadata_group = "", {}, {}
            self.module = self._module_pid = self.function = self._run = None

        def __del__(self) -> None:  # there is nothing to unload
            pass

    return Kernel()


@contextlib.contextmanager
def recording() -> Iterator[Driver]:
    from triton.runtime import driver

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, driver, "_active", driver._active)
        found = Driver()
        driver.set_active(found)  # type: ignore[arg-type]
        for place, name, value in (
            ("triton.compiler", "compile", compiled),
            (_backend, "resolve", lambda backend, device: "triton"),
            (_checks, "values_readable", lambda tensor: False),  # as on a GPU: nobody looks
        ):
            place = importlib.import_module(place) if isinstance(place, str) else place
            stack.enter_context(mock.patch.object(place, name, value))
        yield found


class Found:
    """What ``both_ways`` found. launches, bound: how often each kernel was launched, and of these through Triton's binder;
    wrong: in what a launch differed from Triton's."""

    def __init__(self) -> None:
        self.launches: collections.Counter[str] = collections.Counter()
        self.bound: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []


def both(
    mine: Callable[[], Any], kernel: Any, grid: tuple[int, ...], operands: Any, options: Any, found: Found, driver: Driver
) -> None:  # fmt: skip
    """``mine``, which launches, and the other way."""
    from triton.runtime.jit import JITFunction

    bind = JITFunction.run
    name, before = kernel.__name__, len(driver.launches)
    bound: list[Any] = []

    def noted(function: Any, *args: Any, **others: Any) -> Any:
        bound.append(function)
        return bind(function, *args, **others)

    with mock.patch.object(JITFunction, "run", noted):
        mine()
    kernel[grid](*(operands[argument] for argument in kernel.arg_names), **options)
    found.launches[name] += 1
    found.bound[name] += len(bound)
    ours, theirs = driver.launches[before:]
    difference = ours.differs(theirs)
    if difference:
        found.wrong.append(f"{name}: {difference}")
    del driver.launches[before:]


def checked(launch: Callable[..., Any], found: Found, driver: Driver) -> Callable[..., None]:
    """``launch`` that launches the other way too."""

    def twice(kernel: Any, grid: tuple[int, ...], operands: Any, **options: Any) -> None:
        both(lambda: launch(kernel, grid, operands, **options), kernel, grid, operands, options, found, driver)

    return twice


def checked_prepared(call: Callable[..., None], found: Found, driver: Driver) -> Callable[..., None]:
    """``PreparedLaunch.__call__`` that launches the other way too."""

    def twice(prepared: Any, tensors: Sequence[Tensor], *numbers: float) -> None:
        operands = prepared.operands(tensors, *numbers)
        both(
            lambda: call(prepared, tensors, *numbers),
            prepared.kernel,
            prepared.grid,
            operands,
            prepared.options,
            found,
            driver,
        )

    return twice


@contextlib.contextmanager
def both_ways(found: Found, driver: Driver) -> Iterator[None]:
    launch, Prepared = _launch.launch, _launch.PreparedLaunch
    twice = checked(launch, found, driver)
    for module in pkgutil.walk_packages(din_kernels.ops.__path__, "din_kernels.ops."):
        importlib.import_module(module.name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Prepared, "__call__", checked_prepared(Prepared.__call__, found, driver)))
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("din_kernels.ops.") and vars(module).get("launch") is launch:
                stack.enter_context(mock.patch.object(module, "launch", twice))
        yield


class Tape:
    """Autograd's own, as ``gpu_calls`` use ``fake_launch.Tape``."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

        def noted(function: Any, *args: Any) -> Any:
            outputs = apply(function, *args)
            self.outputs += outputs if isinstance(outputs, tuple) else (outputs,)
            return outputs

        with mock.patch.object(torch.autograd.Function, "apply", classmethod(noted)):
            yield

    def backward(self, gradient: Callable[[Tensor], Tensor] = torch.ones_like) -> None:
        outputs = [tensor for tensor in self.outputs if tensor.requires_grad and tensor.numel()]
        self.outputs.clear()
        torch.autograd.backward(outputs, [gradient(tensor) for tensor in outputs])


def run(call: Callable[[Any], None], driver: Driver) -> dict[str, Any]:
    """``call`` twice: what differed from Triton's launches, and the kernels that Triton bound the second time."""
    error, first, second = None, Found(), Found()
    for found in (first, second):
        tape = Tape()
        try:
            with tape.running(), both_ways(found, driver):
                call(tape)
        except Exception as failure:  # a finding, to be told with the others
            where = traceback.extract_tb(failure.__traceback__)[-1]
            error = f"{type(failure).__name__}: {str(failure).strip()[-600:]} ({where.filename}:{where.lineno})"
    return {
        "error": error, "wrong": first.wrong + second.wrong, "launches": second.launches,
        "bound": {name: count for name, count in second.bound.items() if count},
    }  # fmt: skip


def main() -> int:
    from . import gpu_calls

    calls = {name: call for name, call in gpu_calls.CALLS.items() if name not in gpu_calls.TOO_LARGE} | gpu_calls.VARIED
    with (
        mock.patch.object(gpu_calls, "DEVICE", "cpu"),
        mock.patch.object(gpu_calls, "memory", torch.zeros),
        recording() as driver,
    ):
        print(json.dumps({name: run(call, driver) for name, call in calls.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
