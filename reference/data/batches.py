"""Jagged batches: histories leave the loader as ``values`` + ``offsets`` and are never padded."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .prepare import check_jagged
from .schema import ClickData, DataError, IntArray, Samples


@dataclass(frozen=True)
class Batch:
    """B samples with N behaviours in all; ids are int64, ``label`` is float32.

    user, item, category [B]; profile [B, F]; label [B]; history_item, history_category [N]; offsets [B + 1]
    """

    user: Tensor
    item: Tensor
    category: Tensor
    profile: Tensor
    label: Tensor
    history_item: Tensor
    history_category: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.item.numel()

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which a copy to a GPU runs beside the computation."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in dataclasses.fields(self)))

    @staticmethod
    def from_padded(
        data: ClickData, item: IntArray, history: IntArray, lengths: IntArray, user: IntArray | None = None
    ) -> Batch:
        """A batch from padded histories [B, T] and ``lengths`` [B]; what lies beyond a length is ignored."""
        if history.ndim != 2 or history.shape[0] != len(item):
            raise DataError(f"history must have shape [{len(item)}, T], got {list(history.shape)}")
        if lengths.shape != (len(item),):
            raise DataError(f"lengths must have shape [{len(item)}], got {list(lengths.shape)}")
        if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > history.shape[1]):
            raise DataError(
                f"lengths must lie in [0, T = {history.shape[1]}], got {int(lengths.min())} .. {int(lengths.max())}: "
                "clip them or pad history further"
            )
        values = history[np.arange(history.shape[1]) < lengths[:, None]]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        user = np.zeros(len(item), dtype=np.int64) if user is None else user
        return make_batch(data, user, item, np.zeros(len(item), dtype=np.float32), values, offsets)


def make_batch(
    data: ClickData, user: IntArray, item: IntArray, label: np.ndarray, values: IntArray, offsets: IntArray
) -> Batch:
    """A checked batch from explicit arrays: item ids in range, offsets monotone, labels without NaN."""
    check_jagged(data.name, np.asarray(offsets), len(values))
    if len(offsets) != len(item) + 1:
        raise DataError(f"offsets must have {len(item) + 1} entries for {len(item)} samples, got {len(offsets)}")
    for what, ids, limit in (("item", item, data.num_items), ("history", values, data.num_items)):
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= limit):
            raise DataError(
                f"{what} ids must lie in [0, num_items = {limit}), got {int(ids.min())} .. {int(ids.max())}"
            )
    if len(user) and int(user.max()) >= data.num_users:
        raise DataError(f"user ids must be below num_users = {data.num_users}, got {int(user.max())}")
    if np.isnan(label).any():
        raise DataError("label holds NaN: remove those rows")
    return _assemble(data, user, item, label, values, offsets)


def _assemble(
    data: ClickData, user: IntArray, item: IntArray, label: np.ndarray, values: IntArray, offsets: IntArray
) -> Batch:
    def ids(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))

    return Batch(
        user=ids(user),
        item=ids(item),
        category=ids(data.item_category[item]),
        profile=ids(data.profile[user]),
        label=torch.from_numpy(np.ascontiguousarray(label, dtype=np.float32)),
        history_item=ids(values),
        history_category=ids(data.item_category[values]),
        offsets=ids(offsets),
    )


def gather_batch(data: ClickData, samples: Samples) -> Batch:
    """The batch of ``samples``: their slices of the log, back to back."""
    lengths = (samples.stop - samples.start).astype(np.int64)
    offsets = np.zeros(len(samples) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # Position of each value in the log: the sample's start plus its place within the sample.
    where = np.arange(offsets[-1]) + np.repeat(samples.start - offsets[:-1], lengths)
    return _assemble(data, samples.user, samples.item, samples.label, data.log_item[where], offsets)


def batch_bounds(num_samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Cuts of ``range(num_samples)``. A last batch of one sample joins its neighbour: it has no batch statistics."""
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2 (batch statistics need two rows), got {batch_size}")
    if num_samples == 0:
        return []
    starts = list(range(0, num_samples, batch_size))
    if len(starts) > 1 and num_samples - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_samples], strict=True))


def epoch_order(num_samples: int, seed: int, epoch: int) -> IntArray:
    """The order of an epoch: a function of (seed, epoch) alone, so that a resumed run sees the same batches."""
    return np.random.default_rng([seed, epoch, 0xE0]).permutation(num_samples)


def train_batches(data: ClickData, batch_size: int, seed: int, epoch: int, first: int = 0) -> Iterator[Batch]:
    """The batches of one training epoch in random order, from batch ``first`` on."""
    order = epoch_order(len(data.train), seed, epoch)
    for begin, end in batch_bounds(len(data.train), batch_size)[first:]:
        yield gather_batch(data, data.train.take(order[begin:end]))


def eval_batches(data: ClickData, samples: Samples, batch_size: int) -> Iterator[Batch]:
    """All ``samples`` in order."""
    for begin in range(0, len(samples), batch_size):
        yield gather_batch(data, samples.take(slice(begin, begin + batch_size)))


def prefetched(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """The same batches, made ahead of time and pinned by one thread: for a GPU, which computes without the CPU's help.

    numpy gathers outside the interpreter lock, so the thread does run beside the one that launches kernels. An error in
    ``batches`` is raised here; leaving early ends the thread.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(value: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(value, timeout=0.1)
                return

    def work() -> None:
        try:
            for batch in batches:
                put(batch.pin_memory() if torch.cuda.is_available() else batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # handed to the reader: a thread of its own has nobody to tell
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
