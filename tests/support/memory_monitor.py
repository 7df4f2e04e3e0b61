"""Watch every byte a kernel touches in Triton's interpreter: bounds, races, and traffic.

    with memory_monitor() as monitor:
        din_kernels.functional.dice(x, ..., backend="triton")
    monitor.traffic("dice_apply", "x").loads.unique

The interpreter executes programs one after the other on NumPy arrays, so an off-by-one that lands in a neighbouring
allocation, and two programs that write one address, both pass unnoticed. Here each pointer argument gets a tag in its
upper 16 bits (addresses use 47), which pointer arithmetic carries along. At every load and store the tag tells which
tensor the address *should* lie in, even when it has walked into another live tensor. Tags come off before memory is
touched.

Checked, for each launch:

* bounds: an unmasked lane outside the tensor its pointer came from raises ``OutOfBounds``; gaps of strided views count;
* races: an address written by two programs, or written by one and read by another; a store whose lanes disagree about
  one address; a value read back by the program that wrote it without ``tl.debug_barrier`` between (on a GPU another
  thread may hold it);
* atomics: forbidden unless allowed (the design has none);
* order: ``order="reverse"`` or a seed runs programs in another order, which exposes what the above cannot describe.

Counted, for each launch and tensor: ``Traffic`` (see ``memory_shadow``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from din_kernels._backend import interpreting
from din_kernels._interpreter import repair_interpreter

from .memory_shadow import Argument, AtomicUsed, MemoryAccessError, OutOfBounds, Race, Region, Traffic, regions

__all__ = [
    "AtomicUsed",
    "Launch",
    "MemoryAccessError",
    "MemoryMonitor",
    "OutOfBounds",
    "Race",
    "Traffic",
    "memory_monitor",
]

_TAG_SHIFT = 48
_ADDRESS_MASK = np.uint64((1 << _TAG_SHIFT) - 1)
_HOOKS = ("load", "store", "atomic_rmw", "atomic_cas")


@dataclasses.dataclass
class ArgumentTraffic:
    loads: Traffic = dataclasses.field(default_factory=Traffic)
    stores: Traffic = dataclasses.field(default_factory=Traffic)


class Launch:
    """One kernel launch: its name, grid, tensor arguments and what it did to them."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.kernel = kernel
        self.grid: tuple[int, ...] = ()
        self.arguments = [Argument(name, tensor) for name, tensor in tensors.items()]
        self.tags = {id(a.tensor): tag for tag, a in enumerate(self.arguments, start=1)}
        self.regions: list[Region] = regions(self.arguments)
        self.region_starts = np.array([r.start for r in self.regions], np.int64)
        self.order: np.ndarray | None = None
        self.program, self.epoch = 0, 0
        self.program_index: tuple[int, int, int] = (0, 0, 0)
        self.atomics = 0
        self.error: MemoryAccessError | None = None

    def traffic(self, tensor: str | None = None) -> ArgumentTraffic:
        total = ArgumentTraffic()
        for argument in self.arguments:
            if tensor is None or argument.name == tensor:
                total.loads, total.stores = total.loads + argument.loads, total.stores + argument.stores
        return total


class MemoryMonitor:
    """What ``memory_monitor`` yields: the launches seen so far. ``errors`` fills up when ``raise_errors=False``."""

    def __init__(self, *, races: bool, same_program: bool, atomics: bool, order: str | int | None, raise_errors: bool):
        self.races, self.same_program, self.allow_atomics = races, same_program, atomics
        self.order, self.raise_errors = order, raise_errors
        self.launches: list[Launch] = []
        self.errors: list[MemoryAccessError] = []
        self.current: Launch | None = None

    # ---- results -----------------------------------------------------------------------------------------------------

    def kernels(self) -> list[str]:
        """Names of the kernels launched, in order, with repeats."""
        return [launch.kernel for launch in self.launches]

    def traffic(self, kernel: str | None = None, tensor: str | None = None) -> ArgumentTraffic:
        """Bytes moved, summed over launches of ``kernel`` (None: all) for argument ``tensor`` (None: all)."""
        total = ArgumentTraffic()
        for launch in self.launches:
            if kernel is None or launch.kernel == kernel:
                part = launch.traffic(tensor)
                total.loads, total.stores = total.loads + part.loads, total.stores + part.stores
        return total

    def bytes_moved(self, kernel: str | None = None) -> int:
        """Unique bytes loaded plus unique bytes stored, launch by launch: the least that memory must move."""
        part = self.traffic(kernel)
        return part.loads.unique + part.stores.unique

    def table(self) -> str:
        """The traffic of every launch and tensor, for people."""
        lines = [
            f"{'kernel.tensor':<48} {'load unique':>12} {'per program':>12} {'store unique':>12} {'per program':>12}"
        ]
        for launch in self.launches:
            for a in launch.arguments:
                lines.append(
                    f"{launch.kernel + '.' + a.name:<48} {a.loads.unique:>12} {a.loads.per_program:>12} "
                    f"{a.stores.unique:>12} {a.stores.per_program:>12}"
                )
        return "\n".join(lines)

    # ---- called by the hooks -----------------------------------------------------------------------------------------

    def report(self, kind: type[MemoryAccessError], what: str) -> None:
        launch = self.current
        assert launch is not None
        error = kind(f"kernel {launch.kernel}, program {launch.program_index} of grid {launch.grid}: {what}")
        self.errors.append(error)
        if self.raise_errors:
            launch.error = error
            raise error

    def access(
        self, pointers: np.ndarray, mask: np.ndarray, width: int, kind: str, values: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check and count one access; return the untagged pointers and the lanes that are safe to perform."""
        launch = self.current
        assert launch is not None
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        mask = np.broadcast_to(mask, shape).astype(bool, copy=True)
        pointers = np.broadcast_to(pointers, shape)
        plain = pointers & _ADDRESS_MASK
        live = pointers[mask]
        lanes = None if values is None else np.broadcast_to(values, shape)[mask]
        if live.size:
            tags = (live >> np.uint64(_TAG_SHIFT)).astype(np.int64)
            for tag in np.unique(tags):
                chosen = tags == tag
                self._access_tensor(
                    int(tag),
                    (live[chosen] & _ADDRESS_MASK).astype(np.int64),
                    width,
                    kind,
                    None if lanes is None else lanes[chosen],
                )
        if not self.raise_errors:  # carry on without the lanes that would touch foreign memory
            mask &= self._inside(pointers, width)
        return plain, mask

    def _inside(self, pointers: np.ndarray, width: int) -> np.ndarray:
        launch = self.current
        assert launch is not None
        tags, addresses = (
            (pointers >> np.uint64(_TAG_SHIFT)).astype(np.int64),
            (pointers & _ADDRESS_MASK).astype(np.int64),
        )
        good = np.zeros(pointers.shape, bool)
        for tag, argument in enumerate(launch.arguments, start=1):
            good |= (tags == tag) & ~argument.outside(addresses - argument.base, width)
        return good

    def _access_tensor(self, tag: int, addresses: np.ndarray, width: int, kind: str, values: np.ndarray | None) -> None:
        launch = self.current
        assert launch is not None
        if not 1 <= tag <= len(launch.arguments):
            self.report(
                OutOfBounds, f"{kind} through a pointer that belongs to no argument (address {int(addresses[0]):#x})"
            )
            return
        argument = launch.arguments[tag - 1]
        offsets = addresses - argument.base
        bad = argument.outside(offsets, width)
        if bad.any():
            at = int(offsets[bad][0])
            self.report(
                OutOfBounds,
                f"{kind} of '{argument.name}' at byte {at}, {argument.position(at)}, outside its shape "
                f"{tuple(argument.tensor.shape)}, strides {argument.tensor.stride()}, {argument.span} bytes; "
                f"{int(bad.sum())} of {bad.size} unmasked lanes are",
            )
            addresses, offsets = addresses[~bad], offsets[~bad]
            values = None if values is None else values[~bad]
        if not addresses.size:
            return
        if kind == "atomic":
            launch.atomics += 1
            if not self.allow_atomics:
                self.report(AtomicUsed, f"atomic on '{argument.name}'")
        if kind != "store":
            argument.count(offsets, width, launch.program, store=False)
        if kind != "load":
            argument.count(offsets, width, launch.program, store=True)
        if self.races:
            region = launch.regions[int(np.searchsorted(launch.region_starts, addresses[0], side="right")) - 1]
            if kind == "load":
                conflict = region.load(addresses, width, launch.program, launch.epoch, self.same_program)
            elif kind == "store":
                assert values is not None
                conflict = region.store(addresses, values, width, launch.program, launch.epoch)
            else:
                conflict = region.atomics(addresses, width, launch.program)
            if conflict:
                self.report(Race, f"{kind} of '{argument.name}' {conflict}")


class _Memory:
    """Stands in for the interpreter's native memory module; everything that is not an access passes through."""

    def __init__(self, native: Any, monitor: MemoryMonitor) -> None:
        self._native, self._monitor = native, monitor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> Any:
        plain, lanes = self._monitor.access(pointers, mask, np.dtype(dtype).itemsize, "load", None)
        return self._native.load(plain, lanes, np.broadcast_to(other, plain.shape), dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        plain, lanes = self._monitor.access(pointers, mask, value.dtype.itemsize, "store", value)
        return self._native.store(plain, np.broadcast_to(value, plain.shape), lanes)

    def atomic_rmw(self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, sem: Any) -> Any:
        plain, lanes = self._monitor.access(pointers, mask, value.dtype.itemsize, "atomic", value)
        return self._native.atomic_rmw(op, plain, value, lanes, sem)

    def atomic_cas(self, pointers: np.ndarray, compare: np.ndarray, value: np.ndarray, sem: Any) -> Any:
        everyone = np.ones(pointers.shape, bool)
        plain, _ = self._monitor.access(pointers, everyone, value.dtype.itemsize, "atomic", value)
        return self._native.atomic_cas(plain, compare, value, sem)


def _find_hooks() -> Any:
    """The interpreter module, checked for the names the monitor replaces (present from Triton 3.0 to 3.9 at least)."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not interpreting():
        pytest.skip("the memory monitor watches Triton's interpreter, and kernels are being compiled here")
    wanted = (
        [(interpreter, n) for n in ("GridExecutor", "InterpreterBuilder", "_implicit_cvt", "_interpreter")]
        + [(interpreter.GridExecutor, n) for n in ("__call__", "_init_args_hst")]
        + [(interpreter.InterpreterBuilder, n) for n in ("set_grid_idx", "set_grid_dim")]
        + [(interpreter._interpreter, n) for n in _HOOKS]
    )
    for owner, name in wanted:
        if not hasattr(owner, name):
            pytest.skip(f"this Triton's interpreter has no {name}: the memory monitor cannot watch it")
    return interpreter


def _named_tensors(executor: Any, positional: Any, keywords: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensor arguments of a launch by parameter name; members of tuples as ``name[i]``, descriptors by their base."""
    names = list(inspect.signature(executor.fn).parameters)
    pairs = [*zip(names, positional, strict=False), *keywords.items()]
    found: dict[str, torch.Tensor] = {}
    while pairs:
        name, value = pairs.pop(0)
        if hasattr(value, "data_ptr"):
            found[name] = value
        elif isinstance(value, tuple):
            pairs.extend((f"{name}[{i}]", v) for i, v in enumerate(value))
        elif hasattr(value, "base") and hasattr(value, "block_shape"):
            pairs.append((name, value.base))
    return found


@contextlib.contextmanager
def memory_monitor(
    *,
    races: bool = True,
    same_program: bool = True,
    atomics: bool = False,
    order: str | int | None = None,
    raise_errors: bool = True,
) -> Iterator[MemoryMonitor]:
    """Watch all kernels launched inside the block (see the module's text). Skips the test where that is impossible.

    races         look for conflicting accesses
    same_program  among them, values read back by the program that wrote them without a barrier
    atomics       allow atomic operations
    order         "reverse", or a seed: run the programs of each launch in another order
    raise_errors  raise at the first finding; otherwise collect them in ``monitor.errors`` and carry on
    """
    interpreter = _find_hooks()
    repair_interpreter()
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    monitor = MemoryMonitor(
        races=races, same_program=same_program, atomics=atomics, order=order, raise_errors=raise_errors
    )
    run, to_host, convert = executor.__call__, executor._init_args_hst, interpreter._implicit_cvt
    set_index, set_dims, barrier = builder.set_grid_idx, builder.set_grid_dim, getattr(builder, "create_barrier", None)

    def init_args(self: Any, positional: Any, keywords: Any, *rest: Any) -> Any:
        result = to_host(self, positional, keywords, *rest)
        launch = Launch(getattr(self.fn, "__name__", "kernel"), _named_tensors(self, result[0], result[1]))
        monitor.launches.append(launch)
        monitor.current = launch
        return result

    def implicit_cvt(value: Any) -> Any:
        converted = convert(value)
        launch = monitor.current
        tag = launch.tags.get(id(value)) if launch is not None and hasattr(value, "data_ptr") else None
        if tag is not None:
            converted.handle.data = converted.handle.data | np.uint64(tag << _TAG_SHIFT)
        return converted

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, *args, **kwargs)
        except Exception:
            if monitor.current is not None and monitor.current.error is not None:
                raise monitor.current.error from None  # not the interpreter's wrapping of it
            raise
        finally:
            if monitor.current is not None:
                for argument in monitor.current.arguments:
                    argument.finish()
                monitor.current.regions = []
            monitor.current = None

    def grid_dim(self: Any, *dims: int) -> None:
        set_dims(self, *dims)
        launch = monitor.current
        if launch is not None:
            launch.grid = tuple(dims)
            count = int(np.prod(dims))
            if monitor.order == "reverse":
                launch.order = np.arange(count)[::-1]
            elif monitor.order is not None:
                launch.order = np.random.default_rng(int(monitor.order)).permutation(count)

    def grid_idx(self: Any, x: int, y: int, z: int) -> None:
        launch = monitor.current
        if launch is not None:
            _, ny, nz = launch.grid
            linear = (x * ny + y) * nz + z
            if launch.order is not None:
                linear = int(launch.order[linear])
                x, y, z = linear // (ny * nz), linear // nz % ny, linear % nz
            launch.program, launch.epoch, launch.program_index = linear, 0, (x, y, z)
        set_index(self, x, y, z)

    def create_barrier(self: Any, *args: Any, **kwargs: Any) -> Any:
        if monitor.current is not None:
            monitor.current.epoch += 1
        return barrier(self, *args, **kwargs) if barrier is not None else None

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(executor, "_init_args_hst", init_args)
        patch.setattr(executor, "__call__", call)
        patch.setattr(interpreter, "_implicit_cvt", implicit_cvt)
        patch.setattr(interpreter, "_interpreter", _Memory(interpreter._interpreter, monitor))
        patch.setattr(builder, "set_grid_dim", grid_dim)
        patch.setattr(builder, "set_grid_idx", grid_idx)
        if barrier is not None:
            patch.setattr(builder, "create_barrier", create_barrier)
        yield monitor
