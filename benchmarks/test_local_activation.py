"""Local activation: every workload forward and forward+backward, both interactions, dtypes, Dice inside, no padding.

A CPU races the small twins of the workloads in float32; a GPU the workloads themselves in bfloat16, float32 (IEEE products)
and tf32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import activation
from .arena import Arena, Options
from .workloads import ACTIVATION, ACTIVATION_CPU, ActivationWorkload, Lengths

_BOTH = activation.MEASURES


@dataclasses.dataclass(frozen=True)
class Case:
    workload: ActivationWorkload
    measure: str
    dtype: torch.dtype = torch.float32
    tf32: bool = False

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{self.workload.name}-{self.measure}-{kind}"


def _outer(workload: ActivationWorkload, **changes: Any) -> ActivationWorkload:
    return workload.with_(name=f"{workload.name}-outer", interaction="outer", **changes)


def _dice(workload: ActivationWorkload) -> ActivationWorkload:
    return workload.with_(name=f"{workload.name}-dice", activation="dice")


def _unpadded(workload: ActivationWorkload) -> ActivationWorkload:
    """Every list as long as the average: the baselines waste nothing."""
    length = (workload.lengths.high + 1) // 2
    return workload.with_(name=f"{workload.name}-unpadded", lengths=Lengths("full", length, length), note="no padding")


def tiny(workload: ActivationWorkload) -> ActivationWorkload:
    lengths = Lengths("full" if workload.candidates else "uniform", 4, 4)
    lengths = dataclasses.replace(lengths, low=4 if workload.candidates else 1)
    return workload.with_(
        batch=min(workload.batch, 5), lengths=lengths, dim=8, hidden=tuple(4 for _ in workload.hidden),
        candidates=min(workload.candidates, 3),
    )  # fmt: skip


def cases(options: Options) -> list[Case]:
    """Most important first: when the suite's time is spent the rest is skipped."""
    gpu = options.device.type == "cuda"
    shapes = {name: w for name, w in (ACTIVATION if gpu else ACTIVATION_CPU).items() if not w.candidates}
    if options.smoke:
        first, second = [tiny(w) for w in list(shapes.values())[:2]]
        varied = (second, _dice(second), _outer(second))
        return [Case(first, "forward"), *(Case(w, "forward+backward") for w in varied)]
    if not gpu:
        target, short = shapes["cpu-target"], shapes["cpu-S1"]
        outer = _outer(short, batch=64)  # eager materialises D² columns
        if options.quick:
            return [Case(target, "forward+backward"), Case(outer, "forward+backward")]
        extra = [outer, _unpadded(target), _dice(short)]
        others = [w for w in shapes.values() if w is not target]
        found = [Case(w, "forward+backward") for w in (target, *extra, *others)]
        return found + [Case(w, "forward") for w in (*shapes.values(), outer)]
    names = ("S1", "S2", "S4") if options.quick else tuple(shapes)
    extra = [_outer(shapes["S1"]), _dice(shapes["S1"]), _unpadded(shapes["S1"])]
    if not options.quick:
        extra += [_outer(shapes["S2"]), _dice(_outer(shapes["S1"])), _unpadded(shapes["S2"])]
    workloads = [*(shapes[name] for name in names), *extra]
    found = [Case(w, m, torch.bfloat16) for m in reversed(_BOTH) for w in workloads]
    if not options.quick:
        for tf32 in (True, False):
            found += [Case(shapes[name], m, torch.float32, tf32) for name in names for m in reversed(_BOTH)]
    return found


def test_local_activation(arena: Arena, benchmark: Any, case: Case) -> None:
    activation.run(arena, benchmark, case.workload, case.measure, case.dtype, tf32=case.tf32)
