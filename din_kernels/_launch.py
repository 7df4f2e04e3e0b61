"""Launching on the tensor's own device, whatever the current device is, at a fraction of what Triton takes the host for it.

At every launch Triton binds the arguments and works out anew which compiled kernel serves them, which for some thirty
arguments takes longer than a small kernel does. Which one it is depends on little: the constants and options; the dtypes of
tensors and whether each is aligned to 16 bytes; of integers, whether they are 1, multiples of 16, wider than 32 bits. Here
this is the key under which the kernel that the first launch returned is kept and launched again.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from operator import itemgetter
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
    return lambda source: tuple(source[place] for place in places)


class _Kinds(NamedTuple):
    """Where tensors and integers are among a kernel's arguments. Of the integers, ``exact`` are those whose values Triton looks
    at (``do_not_specialize`` excepts the others)."""

    tensors: Callable[[Any], tuple[Tensor, ...]]
    integers: Callable[[Any], tuple[int, ...]]
    exact: Callable[[Any], tuple[int, ...]]


class _Form:
    """What there is to know about a kernel's arguments, and the kernels compiled for some of them.

    arguments    operands -> all arguments in order
    constants    arguments -> those that are compiled in
    kinds        of the others, by the types of all; None if there are some that are left to Triton
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments = _several(list(kernel.arg_names))
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.kinds: dict[tuple[type, ...], _Kinds | None] = {}
        if _reuses():  # else it is the interpreter's, without these attributes
            self.constants = _several(sorted(kernel.constexprs))

    def _kinds(self, types: tuple[type, ...]) -> _Kinds | None:
        free = [i for i in range(len(types)) if i not in set(self.kernel.constexprs)]
        if not all(t in (int, float) or issubclass(t, Tensor) for t in (types[i] for i in free)):
            return None
        integers = [i for i in free if types[i] is int]
        return _Kinds(
            _several([i for i in free if issubclass(types[i], Tensor)]),
            _several(integers),
            _several([i for i in integers if not self.kernel.params[i].do_not_specialize]),
        )

    def key(self, arguments: tuple[Any, ...]) -> list[Any] | None:
        """What, beside constants and options, chooses the compiled kernel; None where a tensor is not aligned or an integer
        is wider than 32 bits, which are rare enough to be left to Triton."""
        types = tuple(map(type, arguments))
        try:
            kinds = self.kinds[types]
        except KeyError:
            kinds = self.kinds[types] = self._kinds(types)
        if kinds is None:
            return None
        key: list[Any] = [types]
        addresses = 0
        for tensor in kinds.tensors(arguments):
            addresses |= tensor.data_ptr()
            key.append(tensor.dtype)
        if addresses & 15:
            return None
        integers = kinds.integers(arguments)
        if integers and not (max(integers) < _NARROW and min(integers) >= -_NARROW):
            return None
        for value in kinds.exact(arguments):
            key.append("1" if value == 1 else value % 16 == 0)
        return key


@functools.cache
def _reuses() -> bool:
    """Whether compiled kernels are launched again: where they take all arguments of the function (before Triton 3.3 not the
    constants; from 3.6 on it is tested), and what ``_Form.key`` looks at chooses them (on AMD also how large a tensor is)."""
    if not _backend.has_triton() or _backend.interpreting() or torch.version.hip is not None:
        return False
    import triton

    version = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return version is not None and (int(version[1]), int(version[2])) >= (3, 6)


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


_forms: dict[int, _Form] = {}  # by identity (Triton hashes a kernel by its source); a form holds on to its kernel


def launch(kernel: Any, grid: tuple[int, ...], operands: Mapping[str, Any], **options: Any) -> None:
    """Launch ``kernel`` with those of ``operands`` that it takes, and Triton's ``options`` (num_warps, …)."""
    form = _forms.get(id(kernel))
    if form is None:
        form = _forms.setdefault(id(kernel), _Form(kernel))
    arguments = form.arguments(operands)
    key = form.key(arguments) if _reuses() else None
    if key is None:
        kernel[grid](*arguments, **options)
        return
    active = _driver().active
    device = active.get_current_device()
    chosen_by = (device, form.constants(arguments), *options.items(), *key)
    compiled = form.compiled.get(chosen_by)
    if compiled is None:
        form.compiled[chosen_by] = kernel[grid](*arguments, **options)
        return
    compiled[(*grid, 1, 1)[:3]](*arguments, stream=active.get_current_stream(device))
