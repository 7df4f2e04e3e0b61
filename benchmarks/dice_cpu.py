"""How much faster the torch backend of Dice is than the unfused reference on a CPU.

    python -m benchmarks.dice_cpu [--threads 1] [--only 'masked*']

The two run in turns in one process and the fastest of each is compared: other work on the machine disturbs both alike.
Ratios below 1 are losses. Besides plain calls there are the ones that leave the shortest path: a mask, a shared slope, an
affine normalisation, three dimensions, transposed and 16-bit inputs, and gradients of the input or the slope alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import din_kernels
from reference import units

SHAPES = (
    (32, 16), (256, 80), (512, 80), (1024, 36), (1600, 64), (1024, 200), (4096, 200), (65536, 64),
)  # fmt: skip
COLUMNS = ("training step", "forward", "backward", "evaluation step", "forward", "backward", "without gradients")


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a call differs from ``Dice(C)(x)`` with gradients of x and of the slope."""

    mask: bool = False
    affine: bool = False
    shared: bool = False  # slope of shape [1]
    of_input: bool = True  # whether a gradient of x is wanted
    of_slope: bool = True
    layout: str = "plain"  # or "transposed", "3-D"
    dtype: torch.dtype = torch.float32
    kept: torch.dtype | None = None  # dtype of the module, if another

    def module(self, build: Callable[..., nn.Module], width: int) -> nn.Module:
        module = build(width, affine=self.affine)
        module.alpha = nn.Parameter(torch.full((1 if self.shared else width,), 0.25), requires_grad=self.of_slope)
        return module.to(self.kept or self.dtype)

    def tensor(self, rows: int, width: int) -> Tensor:
        if self.layout == "transposed":
            return torch.randn(width, rows, dtype=self.dtype).T
        return torch.randn((4, rows // 4, width) if self.layout == "3-D" else (rows, width), dtype=self.dtype)

    def arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, torch.rand(x.shape[:-1]) < 0.7) if self.mask else (x,)


VARIANTS = {
    "plain": Variant(),
    "masked": Variant(mask=True),
    "affine": Variant(affine=True),
    "masked affine": Variant(mask=True, affine=True),
    "shared slope": Variant(shared=True),
    "gradient of x": Variant(of_slope=False),
    "gradient of slope": Variant(of_input=False),
    "3-D": Variant(layout="3-D"),
    "transposed": Variant(layout="transposed"),
    "autocast": Variant(dtype=torch.bfloat16, kept=torch.float32),
    "bfloat16": Variant(dtype=torch.bfloat16),
    "float64": Variant(dtype=torch.float64),
}


def fastest(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of the fastest run of each call, run in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def step(module: nn.Module, arguments: Sequence[Tensor], grad: Tensor) -> None:
    arguments[0].grad = None
    module(*arguments).backward(grad)


def backward(y: Tensor, grad: Tensor) -> None:
    y.backward(grad, retain_graph=True)


def compared(pair: Sequence[nn.Module], arguments: Sequence[Tensor], grad: Tensor, repeats: int) -> list[list[float]]:
    """Seconds of each of the pair for each of COLUMNS."""
    found = []
    for training in (True, False):
        for module in pair:
            module.train(training)
        grads = [grad.to(m(*arguments).dtype) for m in pair]  # the reference answers in the dtype of its statistics
        found.append(fastest([partial(step, m, arguments, g) for m, g in zip(pair, grads, strict=True)], repeats))
        found.append(fastest([partial(m, *arguments) for m in pair], repeats))
        backwards = [partial(backward, m(*arguments), g) for m, g in zip(pair, grads, strict=True)]
        found.append(fastest(backwards, repeats))  # gradients pile up in both
    with torch.no_grad():
        found.append(fastest([partial(m, arguments[0].detach(), *arguments[1:]) for m in pair], repeats))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="plain", help="which of the variants, a pattern: " + ", ".join(VARIANTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, variant in VARIANTS.items():
        if not fnmatch.fnmatch(name, options.only):
            continue
        print(f"{name:>15}", *(f"{column:>20}" for column in COLUMNS))
        for rows, width in SHAPES:
            torch.manual_seed(0)
            x, grad = variant.tensor(rows, width), variant.tensor(rows, width)
            pair = [
                variant.module(partial(din_kernels.Dice, backend="torch"), width),
                variant.module(units.Dice, width),
            ]
            arguments = variant.arguments(x.requires_grad_(variant.of_input))
            repeats = max(5, min(500, 20_000_000 // (rows * width)))
            cells = [f"{a * 1e6:9.1f} us {b / a:6.2f}x" for a, b in compared(pair, arguments, grad, repeats)]
            print(f"{rows:>7} x {width:>5}", *(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
