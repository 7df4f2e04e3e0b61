"""Requests that arrive close to one another are scored together: a bounded queue and one thread.

A request waits until the first of the queue has waited ``window`` seconds, or until the queue holds ``max_requests`` requests
or ``max_candidates`` candidates. While a batch is being scored the next ones gather, so under load batches fill without any
waiting; with one visitor at a time ``window`` is what merging costs, and 0 switches it off.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from .errors import Closed, DeadlineExceeded, Overloaded
from .requests import Request

logger = logging.getLogger("din_kernels")


@dataclasses.dataclass
class Counters:
    """What has happened so far. submitted = done + failed + expired + cancelled + (still queued or being scored);
    overloaded requests were never submitted."""

    submitted: int = 0
    done: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    overloaded: int = 0
    batches: int = 0


@dataclasses.dataclass(eq=False)
class _Waiting:
    request: Request
    future: Future[Tensor]
    arrived: float
    deadline: float | None


class Batcher:
    """score       from requests to their scores, in order
    window        longest wait for company, seconds
    max_requests, max_candidates   a batch holds at most so many (one request may hold more candidates than that)
    capacity      requests that may wait; one more is refused with ``Overloaded``
    """

    def __init__(
        self,
        score: Callable[[Sequence[Request]], Sequence[Tensor]],
        *,
        window: float = 0.0005,
        max_requests: int = 64,
        max_candidates: int = 8192,
        capacity: int = 1024,
    ) -> None:
        if window < 0 or min(max_requests, max_candidates, capacity) < 1:
            raise ValueError(
                "window must not be negative; max_requests, max_candidates and capacity must be at least 1"
            )
        self.window, self.max_requests, self.max_candidates, self.capacity = (
            window,
            max_requests,
            max_candidates,
            capacity,
        )
        self._score = score
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._candidates = 0  # in the queue
        self._changed = threading.Condition()
        self._closing = False
        self.counters = Counters()
        self._thread = threading.Thread(target=self._serve, name="din_kernels-scorer", daemon=True)
        self._thread.start()

    def submit(self, request: Request, timeout: float | None = None) -> Future[Tensor]:
        """The future scores. ``timeout``: seconds after which the request is dropped instead of scored. Raises ``Overloaded``
        or ``Closed`` at once."""
        now = time.monotonic()
        waiting = _Waiting(request, Future(), now, None if timeout is None else now + timeout)
        with self._changed:
            if self._closing:
                raise Closed("the scorer is shut down")
            if len(self._queue) >= self.capacity:
                self.counters.overloaded += 1
                raise Overloaded(
                    f"{len(self._queue)} requests are waiting, as many as may (capacity): try again later, or elsewhere"
                )
            self._queue.append(waiting)
            self._candidates += request.item.numel()
            self.counters.submitted += 1
            # The thread waits for a first request, or for a full batch; those between need not wake it.
            if len(self._queue) == 1 or self._full():
                self._changed.notify_all()
        return waiting.future

    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests; score those that wait (``drain``) or fail them with ``Closed``. Returns when the thread has
        ended. May be called again, from any thread but the scorer's own."""
        with self._changed:
            self._closing = True
            dropped = [] if drain else list(self._queue)
            if not drain:
                self._queue.clear()
                self._candidates = 0
            self._changed.notify_all()
        for waiting in dropped:
            self._fail(waiting, Closed("the scorer was shut down before this request was scored"), "failed")
        self._thread.join()

    def _full(self) -> bool:
        return len(self._queue) >= self.max_requests or self._candidates >= self.max_candidates

    def _take(self) -> list[_Waiting] | None:
        """The next batch; None when there will be none."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return None
            until = self._queue[0].arrived + self.window
            while not self._full() and not self._closing and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            batch: list[_Waiting] = []
            taken = 0
            while self._queue and len(batch) < self.max_requests:
                size = self._queue[0].request.item.numel()
                if batch and taken + size > self.max_candidates:
                    break
                batch.append(self._queue.popleft())
                taken += size
            self._candidates -= taken
            return batch

    def _serve(self) -> None:
        while (batch := self._take()) is not None:
            self._answer(batch)

    def _answer(self, batch: list[_Waiting]) -> None:
        now = time.monotonic()
        alive = []
        for waiting in batch:
            if waiting.deadline is not None and now > waiting.deadline:
                late = (now - waiting.deadline) * 1e3
                self._fail(
                    waiting,
                    DeadlineExceeded(f"{late:.1f} ms late after {(now - waiting.arrived) * 1e3:.1f} ms in the queue"),
                    "expired",
                )
            elif waiting.future.set_running_or_notify_cancel():
                alive.append(waiting)
            else:
                self._count("cancelled")
        if not alive:
            return
        try:
            scores = self._score([waiting.request for waiting in alive])
        except Exception as error:
            if len(alive) == 1:
                alive[0].future.set_exception(error)
                self._count("failed")
                return
            # One of them is to blame, and the others must not suffer for it.
            logger.warning("scoring %d requests together failed (%s): one by one", len(alive), error)
            for waiting in alive:
                self._alone(waiting)
            return
        with self._changed:
            self.counters.done += len(alive)
            self.counters.batches += 1
        for waiting, score in zip(alive, scores, strict=True):
            waiting.future.set_result(score)

    def _alone(self, waiting: _Waiting) -> None:
        try:
            (score,) = self._score([waiting.request])
        except Exception as error:
            self._count("failed")
            waiting.future.set_exception(error)
        else:
            with self._changed:
                self.counters.done += 1
                self.counters.batches += 1
            waiting.future.set_result(score)

    def _count(self, what: str) -> None:
        with self._changed:
            setattr(self.counters, what, getattr(self.counters, what) + 1)

    def _fail(self, waiting: _Waiting, error: Exception, what: str) -> None:
        if waiting.future.set_running_or_notify_cancel():
            self._count(what)
            waiting.future.set_exception(error)
        else:
            self._count("cancelled")
