"""The queue of ``Scorer.submit``: merging, limits, deadlines, faults, shutdown, and many threads at once."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future

import pytest
import torch
from torch import Tensor

from din_kernels.serving import Closed, DeadlineExceeded, Overloaded, Scorer
from din_kernels.serving.batching import Batcher
from din_kernels.serving.requests import Limits, Request

from ._models import make_model, make_request
from .soak import soak

LIMITS = Limits(97, 11, (3, 5), 100, 300)
PATIENCE = 20.0  # seconds until a test that hangs fails


def request(candidates: int = 2, seed: int = 0) -> Request:
    return LIMITS.check(*make_request(3, candidates, seed=seed))


class Gate:
    """A stand-in for the scorer: notes its batches and can be held."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[int] = []
        self.open, self.entered = threading.Event(), threading.Event()
        self.poison: Request | None = None
        if not held:
            self.open.set()

    def __call__(self, requests: Sequence[Request]) -> list[Tensor]:
        self.batches.append(len(requests))
        self.entered.set()
        assert self.open.wait(PATIENCE)
        if self.poison is not None and any(r is self.poison for r in requests):
            raise ArithmeticError("poisoned")
        return [r.item.double() for r in requests]


def test_requests_within_the_window_are_merged() -> None:
    gate = Gate()
    batcher = Batcher(gate, window=PATIENCE, max_requests=5)
    requests = [request(seed=i) for i in range(5)]
    futures = [batcher.submit(r) for r in requests]
    for r, future in zip(requests, futures, strict=True):
        assert torch.equal(future.result(PATIENCE), r.item.double())
    assert gate.batches == [5]
    batcher.close()


def test_a_lone_request_waits_no_longer_than_the_window() -> None:
    gate = Gate()
    batcher = Batcher(gate, window=0.2)
    began = time.monotonic()
    batcher.submit(request()).result(PATIENCE)
    assert 0.19 <= time.monotonic() - began < PATIENCE / 2
    batcher.close()


def test_batches_end_at_max_candidates_and_keep_their_order() -> None:
    gate = Gate(held=True)
    batcher = Batcher(gate, window=0.0, max_requests=64, max_candidates=10)
    first = batcher.submit(request(1))
    assert gate.entered.wait(PATIENCE)
    futures = [batcher.submit(request(c)) for c in (6, 4, 1, 50, 1)]  # one larger than the limit goes alone
    gate.open.set()
    for future in (first, *futures):
        future.result(PATIENCE)
    assert gate.batches == [1, 2, 1, 1, 1]
    batcher.close()


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    gate = Gate(held=True)
    batcher = Batcher(gate, window=0.0, capacity=3)
    first = batcher.submit(request())
    assert gate.entered.wait(PATIENCE)
    waiting = [batcher.submit(request()) for _ in range(3)]
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        batcher.submit(request())
    assert batcher.counters.overloaded == 1
    gate.open.set()
    for future in (first, *waiting):
        future.result(PATIENCE)
    batcher.submit(request()).result(PATIENCE)
    batcher.close()
    assert (batcher.counters.submitted, batcher.counters.done) == (5, 5)


def test_late_requests_are_dropped_without_being_scored() -> None:
    gate = Gate(held=True)
    batcher = Batcher(gate, window=0.0)
    first = batcher.submit(request())
    assert gate.entered.wait(PATIENCE)
    late, in_time = batcher.submit(request(), timeout=0.01), batcher.submit(request(), timeout=PATIENCE)
    time.sleep(0.03)
    gate.open.set()
    with pytest.raises(DeadlineExceeded, match="in the queue"):
        late.result(PATIENCE)
    first.result(PATIENCE), in_time.result(PATIENCE)
    batcher.close()
    assert gate.batches == [1, 1]
    assert (batcher.counters.expired, batcher.counters.done) == (1, 2)


def test_a_request_that_fails_fails_alone() -> None:
    gate = Gate()
    batcher = Batcher(gate, window=PATIENCE, max_requests=3)
    requests = [request(seed=i) for i in range(3)]
    gate.poison = requests[1]
    futures = [batcher.submit(r) for r in requests]
    with pytest.raises(ArithmeticError, match="poisoned"):
        futures[1].result(PATIENCE)
    for i in (0, 2):
        assert torch.equal(futures[i].result(PATIENCE), requests[i].item.double())
    batcher.close()
    assert (batcher.counters.failed, batcher.counters.done) == (1, 2)


def test_cancelled_requests_are_not_scored() -> None:
    gate = Gate(held=True)
    batcher = Batcher(gate, window=0.0)
    first = batcher.submit(request())
    assert gate.entered.wait(PATIENCE)
    second = batcher.submit(request())
    assert second.cancel()
    gate.open.set()
    first.result(PATIENCE)
    batcher.close()
    with pytest.raises(CancelledError):
        second.result(PATIENCE)
    assert gate.batches == [1]
    assert batcher.counters.cancelled == 1


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown_answers_everyone(drain: bool) -> None:
    gate = Gate(held=True)
    batcher = Batcher(gate, window=0.0)
    first = batcher.submit(request())
    assert gate.entered.wait(PATIENCE)
    waiting = [batcher.submit(request()) for _ in range(4)]
    closing = threading.Thread(target=batcher.close, kwargs={"drain": drain})
    closing.start()
    while not batcher._closing:
        time.sleep(0.001)
    gate.open.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert not batcher._thread.is_alive()
    first.result(0)
    for future in waiting:
        if drain:
            future.result(0)
        else:
            with pytest.raises(Closed):
                future.result(0)
    with pytest.raises(Closed):
        batcher.submit(request())
    batcher.close()  # again


def test_a_window_does_not_delay_shutdown() -> None:
    batcher = Batcher(Gate(), window=PATIENCE)
    future = batcher.submit(request())
    batcher.close()
    assert future.done()


def test_arguments() -> None:
    for wrong in ({"window": -1.0}, {"capacity": 0}, {"max_requests": 0}, {"max_candidates": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Batcher(Gate(), **wrong)  # type: ignore[arg-type]


# ---- through the scorer ----------------------------------------------------------------------------------------


def test_submitted_requests_get_the_scores_of_score() -> None:
    with Scorer(make_model(), 64, 32, backend="torch", window=0.05) as scorer:
        pairs = [make_request(3 + i % 9, 1 + i % 13, seed=i) for i in range(20)]
        futures: list[Future[Tensor]] = [scorer.submit(*pair) for pair in pairs]
        for pair, future in zip(pairs, futures, strict=True):
            # The MLP's product is over all candidates of the batch: the same numbers but for the order of sums.
            torch.testing.assert_close(future.result(PATIENCE), scorer.score(*pair), rtol=1e-5, atol=1e-6)
        assert scorer.counters.batches < len(pairs)


def test_bad_requests_are_refused_before_the_queue() -> None:
    with Scorer(make_model(), 64, 32, backend="torch") as scorer:
        visitor, candidates = make_request(3, 2)
        with pytest.raises(IndexError, match="history_item"):
            scorer.submit(visitor._replace(history_item=[1, 2, 10**6]), candidates)
        assert scorer.submit(visitor, candidates).result(PATIENCE).shape == (2,)
        assert scorer.counters.submitted == 1


def test_closed_scorers_refuse_but_still_score() -> None:
    scorer = Scorer(make_model(), 64, 32, backend="torch")
    scorer.close()
    with pytest.raises(Closed):
        scorer.submit(*make_request(3, 2))
    assert scorer.score(*make_request(3, 2)).shape == (2,)


def test_soak() -> None:
    """The small twin of ``python -m tests.serving.soak``: no request lost, none mixed up, none kept."""
    found = soak(requests=3000, threads=8)
    assert found.answered == 3000
    assert found.mismatched == 0
    assert found.counters.submitted == found.counters.done == 3000
    assert found.counters.batches < 3000


def test_answered_requests_are_forgotten() -> None:
    gate = Gate()
    batcher = Batcher(gate, window=0.0)
    future = batcher.submit(request())
    future.result(PATIENCE)
    seen = weakref.ref(future)
    del future
    batcher.submit(request()).result(PATIENCE)  # the thread lets go of a batch when it takes the next
    gc.collect()
    assert seen() is None
    batcher.close()
