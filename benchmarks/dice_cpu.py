"""How much faster the torch backend of Dice is than the unfused reference on a CPU.

    python -m benchmarks.dice_cpu [--threads 1]

The two run in turns in one process and the fastest of each is compared: other work on the machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import din_kernels
from reference import units

SHAPES = (
    (32, 16), (256, 80), (512, 80), (1024, 36), (1600, 64), (1024, 200), (4096, 200), (65536, 64),
)  # fmt: skip


COLUMNS = ("training step", "forward", "backward", "evaluation step", "forward", "backward", "without gradients")


def fastest(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of the fastest run of each call, run in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def step(module: torch.nn.Module, x: Tensor, grad: Tensor) -> None:
    x.grad = None
    module(x).backward(grad)


def backward(y: Tensor, grad: Tensor) -> None:
    y.backward(grad, retain_graph=True)


def compared(pair: Sequence[torch.nn.Module], x: Tensor, grad: Tensor, repeats: int) -> list[list[float]]:
    """Seconds of each of the pair for each of COLUMNS."""
    found = []
    for training in (True, False):
        for module in pair:
            module.train(training)
        found.append(fastest([partial(step, m, x, grad) for m in pair], repeats))
        found.append(fastest([partial(m, x) for m in pair], repeats))
        found.append(fastest([partial(backward, m(x), grad) for m in pair], repeats))  # gradients pile up, in both
    with torch.no_grad():
        found.append(fastest([partial(m, x.detach()) for m in pair], repeats))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{'rows':>6} {'channels':>8}", *(f"{name:>20}" for name in COLUMNS))
    for rows, width in SHAPES:
        torch.manual_seed(0)
        pair = [din_kernels.Dice(width, backend="torch"), units.Dice(width)]
        x, grad = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
        repeats = max(5, min(500, 20_000_000 // (rows * width)))
        cells = [f"{a * 1e6:9.1f} us {b / a:6.2f}x" for a, b in compared(pair, x, grad, repeats)]
        print(f"{rows:>6} {width:>8}", *(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
