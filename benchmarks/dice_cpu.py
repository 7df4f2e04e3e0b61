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

SHAPES = ((32, 16), (256, 80), (1600, 64), (1024, 200), (4096, 200), (65536, 64))


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


def evaluate(module: torch.nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{'rows':>6} {'channels':>8} {'training step':>22} {'evaluation, backward':>22} {'evaluation':>22}")
    for rows, width in SHAPES:
        torch.manual_seed(0)
        pair = [din_kernels.Dice(width, backend="torch"), units.Dice(width)]
        x, grad = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
        repeats = max(5, min(200, 20_000_000 // (rows * width)))
        cells = []
        for training, backward in ((True, True), (False, True), (False, False)):
            calls = [partial(step, m, x, grad) if backward else partial(evaluate, m, x) for m in pair]
            for module in pair:
                module.train(training)
            ours, theirs = fastest(calls, repeats)
            cells.append(f"{ours * 1e6:9.0f} us {theirs / ours:6.2f}x")
        print(f"{rows:>6} {width:>8} {cells[0]:>22} {cells[1]:>22} {cells[2]:>22}", flush=True)


if __name__ == "__main__":
    main()
