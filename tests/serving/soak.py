"""Many requests from many threads through one queue: ``python -m tests.serving.soak --requests 100000``.

Every answer is compared with the same request scored alone, and the process' memory with what it was after a tenth.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import threading
import time
from pathlib import Path

import torch

from din_kernels.serving import Counters, Overloaded, Scorer

from ._models import make_model, make_request


@dataclasses.dataclass
class Found:
    answered: int
    mismatched: int
    overloaded: int
    seconds: float
    resident_early: int
    resident_late: int
    counters: Counters


def resident_bytes() -> int:
    """Memory of this process now (where /proc tells), else its peak."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def soak(requests: int, threads: int, *, distinct: int = 64, in_flight: int = 16) -> Found:
    """Each thread keeps ``in_flight`` requests going, backs off when refused, and checks all it gets."""
    model = make_model()
    pairs = [make_request(i % 23, 1 + i % 17, seed=i) for i in range(distinct)]
    lock = threading.Lock()
    found = Found(0, 0, 0, 0.0, 0, 0, Counters())
    with Scorer(model, 64, 32, backend="torch", capacity=threads * in_flight // 2) as scorer:
        expected = [scorer.score(*pair) for pair in pairs]

        def client(first: int) -> None:
            answered = mismatched = overloaded = 0
            pending = []
            for i in range(first, requests, threads):
                while True:
                    try:
                        pending.append((i % distinct, scorer.submit(*pairs[i % distinct])))
                        break
                    except Overloaded:
                        overloaded += 1
                        time.sleep(0.0005)
                if len(pending) == in_flight or i + threads >= requests:
                    for which, future in pending:
                        scores = future.result(60)
                        answered += 1
                        same = scores.shape == expected[which].shape and torch.allclose(
                            scores, expected[which], rtol=1e-5, atol=1e-6
                        )
                        mismatched += not same
                    pending.clear()
                with lock:
                    if found.resident_early == 0 and scorer.counters.done >= requests // 10:
                        found.resident_early = resident_bytes()
            with lock:
                found.answered += answered
                found.mismatched += mismatched
                found.overloaded += overloaded

        began = time.monotonic()
        clients = [threading.Thread(target=client, args=(t,)) for t in range(threads)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        found.seconds = time.monotonic() - began
    found.resident_late = resident_bytes()
    found.counters = scorer.counters
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(options.requests, options.threads)
    print(
        f"{found.answered} answered of {options.requests}, {found.mismatched} wrong, {found.overloaded} refusals retried, "
        f"{found.counters.batches} batches, {found.seconds:.1f} s; resident memory "
        f"{found.resident_early >> 20} MiB after a tenth, {found.resident_late >> 20} MiB at the end"
    )
    lost = found.answered != options.requests or found.counters.done != options.requests
    grown = found.resident_late - found.resident_early > 64 << 20
    return int(lost or found.mismatched > 0 or grown)


if __name__ == "__main__":
    sys.exit(main())
