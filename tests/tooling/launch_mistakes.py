"""Launches that a GPU would refuse, each told by ``fake_launch``: prints one JSON object, mistake -> what was raised.

In a process of its own, without ``TRITON_INTERPRET``."""

from __future__ import annotations

import json

import numpy as np
import torch

from tests.support.fake_launch import gpu
from tests.tooling import kernels_toy


def main() -> None:
    def launch(kernel, *args, grid=(1,), **options):
        kernel[grid](*args, BLOCK=16, **options)

    def memory(device="cuda"):
        return torch.empty(64, device=device)

    scale = kernels_toy.scale_rows
    mistakes = {
        "nothing": lambda: launch(scale, memory(), memory(), 64),
        "memory of the CPU": lambda: launch(scale, memory("cpu"), memory(), 64),
        "no program": lambda: launch(scale, memory(), memory(), 64, grid=(0,)),
        "too many programs along y": lambda: launch(scale, memory(), memory(), 64, grid=(1, 65536)),
        "an option nobody knows": lambda: launch(scale, memory(), memory(), 64, num_wraps=4),
        "a number of NumPy's": lambda: launch(scale, memory(), memory(), np.int64(64)),
        "a name of the launcher's": lambda: launch(kernels_toy.named_like_the_launchers_own, memory(), memory()),
        "a name of two types": lambda: launch(kernels_toy.changes_its_mind, memory(), memory(), 64),
        "a value read back": lambda: int(memory()[0]),
        "a branch on a value": lambda: bool((memory() > 0).any()),
        "a size that values decide": lambda: memory().nonzero(),
        "tensors of two devices": lambda: memory() + memory("cpu"),
    }
    told = {}
    for name, make in mistakes.items():
        with gpu():
            try:
                make()
                told[name] = "accepted"
            except Exception as error:
                told[name] = type(error).__name__
    print(json.dumps(told))


if __name__ == "__main__":
    main()
