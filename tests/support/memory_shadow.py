"""Shadow memory of one kernel launch: who touched which byte, in which order, and how often.

Used by ``memory_monitor``. Accesses arrive as arrays of byte addresses with the lane mask applied, so that the cost is
a few NumPy gathers for each load or store the kernel issues.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

SECTOR_BYTES = 32  # what an NVIDIA L2 moves at least; AMD's is larger


class MemoryAccessError(AssertionError):
    """Something a kernel did to memory that it must not do. Subclasses say what."""


class OutOfBounds(MemoryAccessError):
    """An unmasked lane touched an address outside the tensor that its pointer was derived from."""


class Race(MemoryAccessError):
    """Two programs of one launch (or two threads of one program) touched an address without an order between them."""


class AtomicUsed(MemoryAccessError):
    """A kernel used an atomic where the design promises none."""


@dataclasses.dataclass
class Traffic:
    """Bytes one launch moved to or from one tensor, in one direction.

    requested    every unmasked lane counted: what the load/store units see
    per_program  distinct bytes within each program, added up: what reaches the L2 when a program reads nothing twice
    unique       distinct bytes in the launch: what must cross the memory bus at least once
    sectors      ``unique`` rounded up to whole 32-byte sectors
    """

    requested: int = 0
    per_program: int = 0
    unique: int = 0
    sectors: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class Argument:
    """One tensor argument of a launch: its addresses, and which of them were read and written, and by whom."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.itemsize = tensor.element_size()
        self.base = tensor.data_ptr()
        self.strides = tensor.stride()
        span = (
            0 if tensor.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, self.strides, strict=True))
        )
        self.span = span * self.itemsize  # bytes from the first element to the end of the last
        self.has_gaps = span > math.prod(n for n, s in zip(tensor.shape, self.strides, strict=True) if s)
        self.last_reader = np.full(span, -1, np.int32)
        self.last_writer = np.full(span, -1, np.int32)
        self.loads, self.stores = Traffic(), Traffic()

    def outside(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Which accesses of ``width`` bytes at byte ``offsets`` (signed) are not elements of the tensor."""
        bad = (offsets < 0) | (offsets + width > self.span)
        if self.has_gaps and not bad.all():
            rest = offsets // self.itemsize
            for stride, size in sorted(zip(self.strides, self.tensor.shape, strict=True), reverse=True):
                if stride:
                    rest = rest - np.minimum(rest // stride, size - 1) * stride
            bad = bad | (rest != 0)
        return bad

    def position(self, offset: int) -> str:
        """Human-readable place of a byte offset: element number and index."""
        element = offset // self.itemsize
        inside = f"element {element}"
        if self.tensor.is_contiguous() and self.tensor.dim() > 1 and self.tensor.shape[-1] > 0:
            width = math.prod(self.tensor.shape[1:])
            inside += f" (row {element // width}, column {element % width})" if width else ""
        return inside

    def count(self, offsets: np.ndarray, width: int, program: int, *, store: bool) -> None:
        """Add one access to the traffic of this tensor. ``offsets`` are in bounds."""
        total, last = (self.stores, self.last_writer) if store else (self.loads, self.last_reader)
        total.requested += offsets.size * width
        elements = offsets // self.itemsize
        if width > self.itemsize:  # a pointer cast to a wider type
            elements = elements[:, None] + np.arange(width // self.itemsize)
        cells = np.unique(elements)
        previous = last[cells]
        total.per_program += int((previous != program).sum()) * self.itemsize
        total.unique += int((previous == -1).sum()) * self.itemsize
        last[cells] = program

    def finish(self) -> None:
        """Work out the sectors, and drop the arrays."""
        for total, last in ((self.loads, self.last_reader), (self.stores, self.last_writer)):
            touched = np.flatnonzero(last >= 0).astype(np.int64) * self.itemsize + self.base
            first, final = touched // SECTOR_BYTES, (touched + self.itemsize - 1) // SECTOR_BYTES
            total.sectors = int(np.unique(np.concatenate([first, final])).size) * SECTOR_BYTES
        self.last_reader = self.last_writer = np.empty(0, np.int32)


class Region:
    """A stretch of memory under one or several overlapping arguments, watched for races.

    For each cell (the smallest item size of the arguments in it): the last program that wrote it, the barrier epoch of
    that write, the last program that read it, and whether several did.
    """

    def __init__(self, start: int, end: int, cell: int) -> None:
        self.start, self.end, self.cell = start, end, cell
        cells = -(-(end - start) // cell)
        self.writer = np.full(cells, -1, np.int32)
        self.epoch = np.zeros(cells, np.int32)
        self.reader = np.full(cells, -1, np.int32)
        self.shared = np.zeros(cells, bool)
        self.atomic = np.zeros(cells, bool)

    def _cells(self, addresses: np.ndarray, width: int) -> np.ndarray:
        first = (addresses - self.start) // self.cell
        if width <= self.cell:
            return first
        return (first[:, None] + np.arange(width // self.cell)).ravel()

    def load(self, addresses: np.ndarray, width: int, program: int, epoch: int, same_program: bool) -> str | None:
        """Note a load; a description of the conflict if there is one."""
        cells = self._cells(addresses, width)
        writer, reader = self.writer[cells], self.reader[cells]
        self.shared[cells] |= (reader != -1) & (reader != program)
        self.reader[cells] = program
        if bool(((writer != -1) & (writer != program)).any()):
            return f"reads what program {int(writer[(writer != -1) & (writer != program)][0])} of the same launch wrote"
        if same_program and bool(((writer == program) & (self.epoch[cells] == epoch)).any()):
            return "reads back what another thread of the same program may have written, with no barrier between"
        return None

    def store(self, addresses: np.ndarray, values: np.ndarray, width: int, program: int, epoch: int) -> str | None:
        cells = self._cells(addresses, width)
        writer, reader, shared, atomic = self.writer[cells], self.reader[cells], self.shared[cells], self.atomic[cells]
        self.writer[cells], self.epoch[cells] = program, epoch
        other = (writer != -1) & (writer != program)
        if bool((other | atomic).any()):
            who = f"program {int(writer[other][0])}" if other.any() else "an atomic"
            return f"writes where {who} of the same launch also wrote"
        other = (reader != -1) & ((reader != program) | shared)
        if bool(other.any()):
            return f"writes what program {int(reader[other][0])} (among others, perhaps) of the same launch read"
        order = np.argsort(addresses, kind="stable")
        same = addresses[order][1:] == addresses[order][:-1]
        if same.any():
            bits = np.ascontiguousarray(values[order]).view(f"u{values.dtype.itemsize}")
            if bool((same & (bits[1:] != bits[:-1])).any()):
                return "writes two different values to one address in one store"
        return None

    def atomics(self, addresses: np.ndarray, width: int, program: int) -> str | None:
        cells = self._cells(addresses, width)
        writer, reader = self.writer[cells], self.reader[cells]
        self.atomic[cells] = True
        if bool(((writer != -1) & (writer != program)).any() or ((reader != -1) & (reader != program)).any()):
            return "updates atomically what another program reads or writes plainly"
        return None


def regions(arguments: list[Argument]) -> list[Region]:
    """Merge the (possibly overlapping) stretches of ``arguments`` into disjoint regions, in address order."""
    result: list[Region] = []
    start = end = cell = 0
    for argument in sorted((a for a in arguments if a.span), key=lambda a: a.base):
        if cell and argument.base < end:
            end, cell = max(end, argument.base + argument.span), math.gcd(cell, argument.itemsize)
            continue
        if cell:
            result.append(Region(start, end, cell))
        start, end, cell = argument.base, argument.base + argument.span, argument.itemsize
    if cell:
        result.append(Region(start, end, cell))
    return result
