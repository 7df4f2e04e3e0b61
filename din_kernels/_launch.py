"""Launching on the tensor's own device, whatever the current device is, at a fraction of what Triton takes the host for it.

At every launch Triton binds the arguments and works out anew which compiled kernel serves them, which for some thirty
arguments takes longer than a small kernel does. Which one it is depends on little: the constants and options; the dtypes of
tensors and whether each is aligned to 16 bytes; of integers, whether they are 1, multiples of 16, wider than 32 bits. Here
this is the key under which the kernel that the first launch returned is kept and launched again.

Triton's settings (``TRITON_DEBUG``, …) are those of the first launch; but hooks are called, and kernels instrumented, as soon
as a profiler asks for it. ``tests/tooling/test_launch.py`` launches everything both ways.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend
from ._interpreter import repair_interpreter

# A product and the sum that it goes into are one instruction, as the budgets count them. Triton 3.10 will do so only if asked.
FUSED = {"enable_fp_fusion": True}

_NOTHING: AbstractContextManager[object] = contextlib.nullcontext()
_NARROW = 1 << 31


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on ``tensor``'s GPU; a no-op for CPU tensors (the interpreter)."""
    device = tensor.device
    if device.type == "cuda":
        return _NOTHING if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    repair_interpreter()
    return _NOTHING


def _several(places: list[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """``itemgetter`` that returns a tuple for any number of places."""
    if len(places) > 1:
        return itemgetter(*places)
    if not places:
        return lambda source: ()
    (only,) = places
    return lambda source: (source[only],)


_dtype, _address = attrgetter("dtype"), Tensor.data_ptr
_KNOWN = (int, float, bool, type(None), tuple)  # of which int and tuple take a closer look


def _unaligned(addresses: list[int]) -> tuple[Any, ...]:
    """Nothing if all are multiples of 16; else which are."""
    any_of_them = 0
    for address in addresses:
        any_of_them |= address
    return (tuple([address & 15 == 0 for address in addresses]),) if any_of_them & 15 else ()


class _Kinds:
    """Where what is among arguments of given types. ``vague``: the places of integers whose values Triton does not look at."""

    def __init__(self, types: tuple[type, ...], constants: Collection[int] = (), vague: Collection[int] = ()) -> None:
        free = [i for i in range(len(types)) if i not in constants]
        integers = [i for i in free if types[i] is int]
        self.constants = _several(sorted(constants))
        self.tensors = _several([i for i in free if issubclass(types[i], Tensor)])
        self.integers = _several(integers)
        self.exact = _several([i for i in integers if i not in vague])
        self.tuples = [i for i in free if types[i] is tuple]
        self.known = all(types[i] in _KNOWN or issubclass(types[i], Tensor) for i in free)
        self.compiled: dict[tuple[Any, ...], _Again] = {}

    def key(self, arguments: tuple[Any, ...]) -> list[Any] | None:
        """What, beside types and options, chooses the compiled kernel; None if there is what only Triton knows about."""
        if not self.known:
            return None
        tensors = self.tensors(arguments)
        key = [*self.constants(arguments), *map(_dtype, tensors)]
        key += _unaligned([*map(_address, tensors)])
        integers = self.integers(arguments)
        if integers and not (max(integers) < _NARROW and min(integers) >= -_NARROW):
            key.append(tuple("i32" if -_NARROW <= i < _NARROW else "i64" if i < 1 << 63 else "u64" for i in integers))
        for value in self.exact(arguments):
            key.append("1" if value == 1 else value % 16 == 0)
        for place in self.tuples:
            members = arguments[place]
            types = tuple(map(type, members))
            inner = _kinds_of_members(types).key(members)
            if inner is None:
                return None
            key.append((types, *inner))
        return key


_kinds_of_members = functools.cache(_Kinds)


class _Form:
    """What there is to know about a kernel's arguments: their order, and what is where by their types."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments = _several(list(kernel.arg_names))
        self.kinds: dict[tuple[type, ...], _Kinds] = {}

    def learn(self, types: tuple[type, ...]) -> _Kinds:
        parameters = getattr(self.kernel, "params", None)
        if parameters is None:  # not a function of Triton's, but something around one
            kinds = _Kinds(types)
            kinds.known = False
        else:
            vague = {i for i, parameter in enumerate(parameters) if parameter.do_not_specialize}
            kinds = _Kinds(types, frozenset(self.kernel.constexprs), vague)
        return self.kinds.setdefault(types, kinds)


@functools.cache
def _version() -> tuple[int, int]:
    import triton

    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def _triton() -> tuple[Any, Any] | None:
    """Triton's driver and knobs; None where compiled kernels are not launched again. They are where they take all arguments of
    the function (before Triton 3.3 not the constants; from 3.6 on it is tested), and where what ``_Kinds.key`` looks at chooses
    them (on AMD also how large a tensor is)."""
    if not _backend.has_triton() or _backend.interpreting() or torch.version.hip is not None or _version() < (3, 6):
        return None
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs


class _Again(NamedTuple):
    """A compiled kernel and what ``compiled[grid]`` would look up; ``run`` is None where that may look different."""

    compiled: Any
    run: Any
    function: Any
    metadata: Any

    @classmethod
    def of(cls, launched: Any) -> _Again:
        compiled = launched.result() if hasattr(launched, "result") else launched  # compiled in another thread
        run = compiled.run if _version() <= (3, 9) else None
        return cls(compiled, run, compiled.function, compiled.packed_metadata)

    def launch(self, grid: tuple[int, ...], stream: int, arguments: tuple[Any, ...]) -> None:
        """As ``compiled[grid]`` does it for kernels without hooks."""
        self.run(*grid, stream, self.function, self.metadata, None, None, None, *arguments)


_forms: dict[int, _Form] = {}  # by identity (Triton hashes a kernel by its source); a form holds on to its kernel


def launch(kernel: Any, grid: tuple[int, ...], operands: Mapping[str, Any], **options: Any) -> _Again | None:
    """Launch ``kernel`` with those of ``operands`` that it takes, and Triton's ``options`` (num_warps, …). Returns what was
    launched if it is kept."""
    form = _forms.get(id(kernel))
    if form is None:
        form = _forms.setdefault(id(kernel), _Form(kernel))
    arguments = form.arguments(operands)
    triton = _triton()
    if triton is None:
        kernel[grid](*arguments, **options)
        return None
    driver, knobs = triton
    types = tuple(map(type, arguments))
    kinds = form.kinds.get(types) or form.learn(types)
    key = kinds.key(arguments)
    if key is None or knobs.compilation.instrumentation_mode:
        kernel[grid](*arguments, **options)
        return None
    active = driver.active
    device = active.get_current_device()
    chosen_by = (device, *options.items(), *key)
    again = kinds.compiled.get(chosen_by)
    if again is None:
        launched = kernel[grid](*arguments, **options)
        if launched is not None:  # else a hook of Triton's has kept it from compiling
            kinds.compiled[chosen_by] = again = _Again.of(launched)
        return again
    grid = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    if again.run is None or _hooked(knobs.runtime):
        again.compiled[grid](*arguments, stream=stream)
    else:
        again.launch(grid, stream, arguments)
    return again


class PreparedLaunch:
    """Launches of which all but the tensors and a few numbers is decided, in half the host's time of ``launch``.

    decided   constants, and numbers that stay: by the name of the kernel's argument
    tensors   the names of the arguments that calls give, in their order
    numbers   the same of numbers, at whose values Triton does not look (``do_not_specialize``, or floats), within 32 bits
    same_as   other arguments, each the same tensor as one that is given (those for what is absent, and not read)
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], decided: Mapping[str, Any], tensors: Sequence[str],
        numbers: Sequence[str] = (), same_as: Mapping[str, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.decided, self.options = kernel, grid, decided, options
        self.tensors, self.numbers, self.same_as = tuple(tensors), tuple(numbers), same_as or {}
        place = {name: i for i, name in enumerate((*tensors, *numbers, *decided))}
        self._three: tuple[int, ...] = (*grid, 1, 1)[:3]
        self._rest = tuple(decided.values())
        self._in_order = _several([place[self.same_as.get(name, name)] for name in kernel.arg_names])
        self._again: dict[tuple[Any, ...], _Again] = {}

    def operands(self, tensors: Sequence[Tensor], *numbers: float) -> dict[str, Any]:
        """For ``launch``."""
        given = dict(zip((*self.tensors, *self.numbers), (*tensors, *numbers), strict=True))
        return {**self.decided, **given, **{name: given[other] for name, other in self.same_as.items()}}

    def __call__(self, tensors: Sequence[Tensor], *numbers: float) -> None:
        triton = _triton()
        if triton is None:
            launch(self.kernel, self.grid, self.operands(tensors, *numbers), **self.options)
            return
        driver, knobs = triton
        active = driver.active
        device = active.get_current_device()
        key = (device, *map(type, numbers), *map(_dtype, tensors), *_unaligned([*map(_address, tensors)]))
        again = self._again.get(key)
        if again is None or _hooked(knobs.runtime) or knobs.compilation.instrumentation_mode:
            found = launch(self.kernel, self.grid, self.operands(tensors, *numbers), **self.options)
            if found is not None and found.run is not None:
                self._again[key] = found
            return
        again.launch(self._three, active.get_current_stream(device), self._in_order((*tensors, *numbers, *self._rest)))


def _hooked(runtime: Any) -> Any:
    """Whether anybody wants to be called before or after a launch. A hook may be a chain of several, or none."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
