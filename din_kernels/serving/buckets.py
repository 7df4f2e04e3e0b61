"""Static shapes for CUDA graphs: requests are padded to the next bucket, and each bucket is captured once.

A graph replays fixed launches on fixed addresses: about ten microseconds for work whose launches alone would take a
hundred. So inputs are copied into buffers that stay where they are, in the smallest bucket that holds them. Lengths are
data in those buffers, not shapes: the kernels read only behaviours that exist.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .requests import Limits, Request


class Bucket(NamedTuple):
    """Visitors B, behaviours of each T, candidates of each C."""

    visitors: int
    behaviours: int
    candidates: int


def _power_of_two(number: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << max(0, number - 1).bit_length()))


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Powers of two up to the largest request, which need not be one: padding costs less than twice the work, and the
    number of graphs stays logarithmic in every dimension."""

    max_visitors: int
    max_behaviours: int
    max_candidates: int
    least_behaviours: int = 16
    least_candidates: int = 16

    def bucket_of(self, requests: Sequence[Request]) -> Bucket:
        if not 1 <= len(requests) <= self.max_visitors:
            raise ValueError(f"between 1 and {self.max_visitors} requests, got {len(requests)}")
        longest = max(r.history_item.numel() for r in requests)
        widest = max(r.item.numel() for r in requests)
        if longest > self.max_behaviours or widest > self.max_candidates:
            raise ValueError(f"no bucket for {longest} behaviours and {widest} candidates")
        return self.bucket(len(requests), longest, widest)

    def bucket(self, visitors: int, behaviours: int, candidates: int) -> Bucket:
        return Bucket(
            _power_of_two(visitors, 1, self.max_visitors),
            _power_of_two(behaviours, self.least_behaviours, max(1, self.max_behaviours)),
            _power_of_two(candidates, self.least_candidates, self.max_candidates),
        )


class Inputs(NamedTuple):
    """int64: history [2, B, T] (items, categories), lengths [B], profile [B, F], candidates [2, B, C]. Padding holds id 0."""

    history: Tensor
    lengths: Tensor
    profile: Tensor
    candidates: Tensor

    @staticmethod
    def zeros(bucket: Bucket, fields: int, device: torch.device, *, pinned: bool = False) -> Inputs:
        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device, pin_memory=pinned)

        b, t, c = bucket
        return Inputs(new(2, b, t), new(b), new(b, fields), new(2, b, c))

    def fill(self, requests: Sequence[Request]) -> None:
        """Write the requests in place. What an earlier, longer request left behind is valid ids, so it is left there: nothing
        past a length is read but for its address."""
        self.lengths.zero_()
        for b, request in enumerate(requests):
            length, count = request.history_item.numel(), request.item.numel()
            self.history[0, b, :length] = request.history_item
            self.history[1, b, :length] = request.history_category
            self.lengths[b] = length
            self.profile[b] = request.profile
            self.candidates[0, b, :count] = request.item
            self.candidates[1, b, :count] = request.category


class Captured:
    """One bucket: staging memory on the host, input and output buffers on the device, and the graph between them.

    On a CPU there is nothing to capture, and replaying calls the function; so its use of buffers can be tested anywhere.
    """

    def __init__(self, bucket: Bucket, fields: int, device: torch.device, run: Callable[[Inputs], Tensor]) -> None:
        gpu = device.type == "cuda"
        self.staging = Inputs.zeros(bucket, fields, torch.device("cpu"), pinned=gpu)
        self.inputs = Inputs.zeros(bucket, fields, device) if gpu else self.staging
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        if gpu:
            self._capture(device)

    def _capture(self, device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and lets libraries allocate their workspaces, which capture forbids
                self._run(self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # The stream names the device, whatever the current one is; what other threads do to theirs does not matter.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._output = self._run(self.inputs)

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        """Scores [B, C] on the CPU; rows and columns past the requests' own hold nothing of meaning."""
        self.staging.fill(requests)
        if self._graph is None:
            return self._run(self.inputs)
        for device_buffer, host_buffer in zip(self.inputs, self.staging, strict=True):
            device_buffer.copy_(host_buffer, non_blocking=True)
        self._graph.replay()
        return self._output.cpu()  # waits for the replay, so the staging memory may be written again


class Graphs:
    """All buckets, captured when first met (or by ``warm_up``). One request set at a time: the buffers are shared."""

    def __init__(self, ladder: Ladder, limits: Limits, device: torch.device, run: Callable[[Inputs], Tensor]) -> None:
        self.ladder, self.device = ladder, device
        self._fields = len(limits.profile)
        self._run = run
        self._captured: dict[Bucket, Captured] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._captured)

    def _of(self, bucket: Bucket) -> Captured:
        if bucket not in self._captured:
            self._captured[bucket] = Captured(bucket, self._fields, self.device, self._run)
        return self._captured[bucket]

    def warm_up(self, buckets: Sequence[Bucket]) -> None:
        with self._lock:
            for bucket in buckets:
                self._of(bucket)

    def __call__(self, requests: Sequence[Request]) -> list[Tensor]:
        """Scores [C_i] of each request, on the CPU."""
        results: list[Tensor] = []
        for first in range(0, len(requests), self.ladder.max_visitors):
            part = requests[first : first + self.ladder.max_visitors]
            with self._lock:
                scores = self._of(self.ladder.bucket_of(part))(part)
                results += [scores[b, : r.item.numel()].clone() for b, r in enumerate(part)]
        return results
