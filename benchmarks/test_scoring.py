"""Candidate scoring: one user's list against C candidates, the serving case (the paper allows 10 ms a request).

On a GPU each record also has the time of a CUDA graph's replay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import activation
from .arena import Arena, Options
from .test_local_activation import tiny
from .workloads import ACTIVATION, ACTIVATION_CPU, ActivationWorkload


@dataclasses.dataclass(frozen=True)
class Case:
    workload: ActivationWorkload
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.workload.name}-{str(self.dtype).removeprefix('torch.')}"


def cases(options: Options) -> list[Case]:
    gpu = options.device.type == "cuda"
    shapes = [w for w in (ACTIVATION if gpu else ACTIVATION_CPU).values() if w.candidates]
    dtypes = (
        [torch.bfloat16, torch.float32] if gpu and not options.quick else [torch.bfloat16 if gpu else torch.float32]
    )
    return [Case(tiny(w) if options.smoke else w, dtype) for w in shapes for dtype in dtypes]


def test_scoring(arena: Arena, benchmark: Any, case: Case) -> None:
    activation.run(arena, benchmark, case.workload, "forward", case.dtype, suite="scoring")
