"""How the cost of the unit's training grows with batch (N), longest list (L), embedding width (D) and first hidden layer (H),
each varied alone around one shape. Without compiled baselines and peers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import activation
from .arena import Arena, Options
from .test_local_activation import tiny
from .workloads import ACTIVATION, ACTIVATION_CPU, ActivationWorkload, Lengths


@dataclasses.dataclass(frozen=True)
class Case:
    workload: ActivationWorkload
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.workload.name


def sweep(base: ActivationWorkload, factor: int) -> list[ActivationWorkload]:
    """``base`` as it is, then with one size at a time divided and multiplied by ``factor``."""
    first, *rest = base.hidden
    grown = [base.with_(name="base")]
    for scale in (1 / factor, factor):
        batch, longest = int(base.batch * scale), int(base.lengths.high * scale)
        dim, width = int(base.dim * scale), int(first * scale)
        grown += [
            base.with_(name=f"N={batch}", batch=batch),
            base.with_(name=f"L={longest}", lengths=Lengths("uniform", 1, longest)),
            base.with_(name=f"D={dim}", dim=dim),
            base.with_(name=f"H={width}", hidden=(width, *rest)),
        ]
    return grown


def cases(options: Options) -> list[Case]:
    if options.smoke:
        return [Case(tiny(ACTIVATION_CPU["cpu-S1"]).with_(name="N=5"), torch.float32)]
    if options.quick:
        return []
    if options.device.type == "cuda":
        return [Case(w, torch.bfloat16) for w in sweep(ACTIVATION["S1"], 4)]
    return [Case(w, torch.float32) for w in sweep(ACTIVATION_CPU["cpu-S1"], 2)]


def test_sweep(arena: Arena, benchmark: Any, case: Case) -> None:
    activation.run(
        arena, benchmark, case.workload, "forward+backward", case.dtype, suite="sweep", compiled=False, with_peers=False
    )  # fmt: skip
