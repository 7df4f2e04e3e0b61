"""Local activation: every workload forward and forward+backward, both interactions, dtypes, Dice inside, no padding, and
how cost grows with batch, length, width and network.

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

_BOTH, _TRAINING = activation.MEASURES, activation.MEASURES[1:]


@dataclasses.dataclass(frozen=True)
class Case:
    workload: ActivationWorkload
    measure: str
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    compiled: bool = True
    few: bool = False  # leave out peers and compiled baselines: sweeps
    suite: str = "local_activation"

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{self.suite}-{self.workload.name}-{self.measure}-{kind}"


def _outer(workload: ActivationWorkload, **changes: Any) -> ActivationWorkload:
    return workload.with_(name=f"{workload.name}-outer", interaction="outer", **changes)


def _dice(workload: ActivationWorkload) -> ActivationWorkload:
    return workload.with_(name=f"{workload.name}-dice", activation="dice")


def _unpadded(workload: ActivationWorkload) -> ActivationWorkload:
    """Every list as long as the average: the baselines waste nothing."""
    length = (workload.lengths.high + 1) // 2
    return workload.with_(name=f"{workload.name}-unpadded", lengths=Lengths("full", length, length), note="no padding")


def sweep(base: ActivationWorkload, *, wide: bool) -> list[ActivationWorkload]:
    """One size at a time around ``base``: batch, longest list, embedding width, first hidden layer."""
    more = 4 if wide else 2
    first, *rest = base.hidden
    grown: list[tuple[str, int, ActivationWorkload]] = []
    for factor in (1 / more, 1, more):
        batch, high = int(base.batch * factor), int(base.lengths.high * factor)
        dim, width = int(base.dim * factor), int(first * factor)
        grown += [
            ("N", batch, base.with_(batch=batch)),
            ("L", high, base.with_(lengths=Lengths("uniform", 1, high))),
            ("D", dim, base.with_(dim=dim)),
            ("H", width, base.with_(hidden=(width, *rest))),
        ]
    return [w.with_(name=f"{letter}={size}") for letter, size, w in grown]


def _smoke(workload: ActivationWorkload) -> ActivationWorkload:
    lengths = Lengths("full" if workload.candidates else "uniform", 4, 4)
    lengths = dataclasses.replace(lengths, low=4 if workload.candidates else 1)
    return workload.with_(
        batch=min(workload.batch, 5), lengths=lengths, dim=8, hidden=tuple(4 for _ in workload.hidden),
        candidates=min(workload.candidates, 3),
    )  # fmt: skip


def cases(options: Options) -> list[Case]:
    """Most important first: when the session's time is spent the rest is skipped."""
    gpu = options.device.type == "cuda"
    shapes = {name: w for name, w in (ACTIVATION if gpu else ACTIVATION_CPU).items() if not w.candidates}
    if options.smoke:
        some = [_smoke(w) for w in list(shapes.values())[:2]]
        return [
            Case(some[0], "forward"), Case(some[1], "forward+backward"), Case(_dice(some[1]), "forward+backward"),
            Case(_outer(some[1]), "forward+backward"),
            Case(some[0].with_(name="N=5"), "forward+backward", few=True, suite="sweep"),
        ]  # fmt: skip
    if gpu:
        names = ("S1", "S2", "S4") if options.quick else tuple(shapes)
        dtypes = (
            [(torch.bfloat16, False)]
            if options.quick
            else [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)]
        )
        main = "S1"
        found = [Case(shapes[n], m, d, t) for d, t in dtypes for n in names for m in _BOTH]
        extra = [_outer(shapes["S1"]), _dice(shapes["S1"]), _unpadded(shapes["S1"])]
        if not options.quick:
            extra += [_outer(shapes["S2"]), _dice(_outer(shapes["S1"])), _unpadded(shapes["S2"])]
        found += [Case(w, m, torch.bfloat16) for w in extra for m in _BOTH]
        dtype = torch.bfloat16
    else:
        names = ("cpu-target", "cpu-S1") if options.quick else tuple(shapes)
        main = "cpu-S1"
        found = [Case(shapes[n], m) for n in names for m in (_TRAINING if options.quick else _BOTH)]
        outer = _outer(shapes["cpu-S1"])
        found.insert(2, Case(outer, "forward+backward"))
        if not options.quick:
            found += [
                Case(outer, "forward"),
                Case(_dice(shapes["cpu-S1"]), "forward+backward"),
                Case(_unpadded(shapes["cpu-target"]), "forward+backward"),
            ]
        dtype = torch.float32
    if not options.quick:
        found += [Case(w, "forward+backward", dtype, few=True, suite="sweep") for w in sweep(shapes[main], wide=gpu)]
    return found


def test_local_activation(arena: Arena, benchmark: Any, case: Case) -> None:
    activation.run(
        arena, benchmark, case.workload, case.measure, case.dtype, tf32=case.tf32, suite=case.suite,
        compiled=case.compiled and not case.few, few=case.few,
    )  # fmt: skip
