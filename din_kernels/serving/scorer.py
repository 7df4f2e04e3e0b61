"""``Scorer``: a trained DIN, ready to rank candidates."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .batching import Batcher, Counters
from .buckets import Bucket, Graphs, Ladder
from .errors import Closed
from .network import VisitorNetwork
from .padded import PaddedNetwork
from .parts import DinParts
from .requests import Candidates, Limits, Request, Visitor


class Scorer:
    """Scores candidates for visitors with a trained Deep Interest Network, as the model does in ``eval()``.

    Args:
        model: a ``reference.models.DIN``, fused or unfused, or ``DinParts`` of any other. Its embedding tables are used where
            they are; everything else is copied and packed now: after more training, build a new scorer.
        max_behaviours, max_candidates: the largest request; larger ones are refused.
        backend: None (automatic: Triton on a GPU, torch on a CPU), "triton" or "torch".
        dtype: of the unit's arithmetic inputs on the Triton backend, e.g. ``torch.bfloat16``; None: that of the tables. The
            torch backend on a CPU always computes in float32 (float64 for a float64 model).
        max_visitors: most visitors of a batch, and of a shape bucket on the GPU.
        window, capacity, timeout: of ``submit``: seconds a request may wait for company, requests that may wait at all, and
            seconds after which a waiting request is dropped (None: never).

    On a CPU with the torch backend a visitor's behaviours enter the first layer once for all candidates, and calls from many
    threads run side by side. With Triton, requests are padded to shape buckets with static buffers; on a GPU each bucket is
    captured as a CUDA graph when first met (``warm_up`` does it beforehand), and calls take turns.
    """

    def __init__(
        self,
        model: Any,
        max_behaviours: int,
        max_candidates: int,
        *,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        max_visitors: int = 64,
        window: float = 0.0005,
        capacity: int = 1024,
        timeout: float | None = None,
    ) -> None:
        if max_behaviours < 0 or max_candidates < 1 or max_visitors < 1:
            raise ValueError("max_candidates and max_visitors must be at least 1, max_behaviours not negative")
        parts = DinParts.of(model)
        self.device = parts.item.device
        self.backend = _backend.resolve(backend, self.device)
        self.limits = Limits(
            parts.item.shape[0], parts.category.shape[0], tuple(table.shape[0] for table in parts.profile),
            max_behaviours, max_candidates,
        )  # fmt: skip
        self.network: VisitorNetwork | None = None
        self.graphs: Graphs | None = None
        if self.backend == "torch":
            self.network = VisitorNetwork(parts).eval()
        else:
            padded = PaddedNetwork(parts, backend=self.backend, dtype=dtype).eval()
            ladder = Ladder(max_visitors, max_behaviours, max_candidates)
            self.graphs = Graphs(ladder, self.limits, self.device, padded)
        self._queue_options = {"window": window, "max_requests": max_visitors, "capacity": capacity}
        self._timeout = timeout
        self._batcher: Batcher | None = None
        self._closed = False
        self._starting = threading.Lock()

    # ---- at once -----------------------------------------------------------------------------------------------

    def score(self, visitor: Visitor, candidates: Candidates) -> Tensor:
        """Logits [C] on the CPU, in the order of the candidates; ``torch.sigmoid`` makes them probabilities.

        Raises ``TypeError``, ``ValueError`` or ``IndexError`` for a request the model cannot score.
        """
        return self.score_requests([self.limits.check(visitor, candidates)])[0]

    def score_many(self, pairs: Sequence[tuple[Visitor, Candidates]]) -> list[Tensor]:
        """Logits [C_i] for each (visitor, candidates), in one call."""
        return self.score_requests([self.limits.check(visitor, candidates) for visitor, candidates in pairs])

    def score_requests(self, requests: Sequence[Request]) -> list[Tensor]:
        """``score_many`` for requests that ``limits.check`` has made."""
        if not requests:
            return []
        # The switch belongs to the calling thread, whichever that is.
        with torch.inference_mode():
            if self.graphs is not None:
                return self.graphs(requests)
            assert self.network is not None
            network = self.network
            features = [network.features(*(t.to(self.device) for t in request)) for request in requests]
            sizes = [len(f) for f in features]
            scores = network.head(features[0] if len(features) == 1 else torch.cat(features)).cpu()
            return [scores] if len(sizes) == 1 else [part.clone() for part in scores.split(sizes)]

    def warm_up(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Capture shape buckets now rather than when first met; by default every bucket of one visitor."""
        if self.graphs is None:
            return
        if buckets is None:
            ladder, found = self.graphs.ladder, set()
            sizes_t = [1 << i for i in range(self.limits.max_behaviours.bit_length() + 1)]
            sizes_c = [1 << i for i in range(self.limits.max_candidates.bit_length() + 1)]
            for t in sizes_t:
                for c in sizes_c:
                    found.add(ladder.bucket(1, min(t, self.limits.max_behaviours), min(c, self.limits.max_candidates)))
            buckets = sorted(found)
        with torch.inference_mode():
            self.graphs.warm_up(buckets)

    # ---- through the queue ---------------------------------------------------------------------------------------

    def submit(self, visitor: Visitor, candidates: Candidates, timeout: float | None = None) -> Future[Tensor]:
        """Logits [C] in the future; requests that arrive within ``window`` are scored together.

        A request the model cannot score raises here and now, and troubles no other. Raises ``Overloaded`` when ``capacity``
        requests wait, ``Closed`` after ``close``. The future raises ``DeadlineExceeded`` when the request waited longer than
        ``timeout`` seconds (default: the scorer's). ``future.cancel()`` works until scoring begins.
        """
        request = self.limits.check(visitor, candidates)
        return self._queue().submit(request, self._timeout if timeout is None else timeout)

    def _queue(self) -> Batcher:
        if self._batcher is None:
            with self._starting:
                if self._closed:
                    raise Closed("the scorer is shut down")
                if self._batcher is None:
                    self._batcher = Batcher(self.score_requests, **self._queue_options)  # type: ignore[arg-type]
        return self._batcher

    @property
    def counters(self) -> Counters:
        """What ``submit`` has done so far."""
        return Counters() if self._batcher is None else self._batcher.counters

    def waiting(self) -> int:
        """Requests in the queue."""
        return 0 if self._batcher is None else self._batcher.waiting()

    def close(self, *, drain: bool = True) -> None:
        """End ``submit`` and its thread; requests that wait are scored first, or failed with ``Closed`` (``drain=False``)."""
        with self._starting:
            self._closed = True
        if self._batcher is not None:
            self._batcher.close(drain=drain)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)
