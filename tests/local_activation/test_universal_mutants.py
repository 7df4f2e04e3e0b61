"""Each check of the universal kernels catches the kind of mistake it is there for: kernels broken on purpose."""

from __future__ import annotations

from functools import partial

import pytest

from din_kernels.ops.local_activation import universal, universal_backward
from tests.support.memory_monitor import OutOfBounds, Race, memory_monitor

from ._cases import Spec, check_gradients, check_outputs, check_statistics, make_case
from ._mutants import load_mutant

pytest.importorskip("triton")

KERNELS = ("kernels_common", "kernels_universal_forward", "kernels_universal_backward")


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """break(module, old, new): the kernels with ``old`` replaced in that module."""
    return partial(load_mutant, monkeypatch, tmp_path, KERNELS)


def run(spec: Spec, *, backward: bool = True) -> None:
    case = make_case(spec)
    if spec.activation == "dice":
        check_statistics(case, 0, universal.statistics(case.config, case.tensors, 0))
    saved = universal.forward(case.config, case.tensors, return_weights=True)
    check_outputs(case, saved)
    if backward:
        check_gradients(
            case,
            universal_backward.backward(
                case.config, case.tensors, saved, case.grad_pooled, case.grad_weights, case.inv_count
            ),
        )


SMALL = Spec(lengths=(3, 0, 40), dim=6, hidden=(5, 4), softmax=True, activation="dice", training=True)

WRONG_NUMBERS = [
    ("kernels_common", "p + alpha * (1 - p)", "p + alpha * p", "pooled"),
    ("kernels_universal_forward", "delta * delta * cross", "0.0", "m2"),
    ("kernels_universal_backward", "+ rstd * dx", "", "grad"),
    ("kernels_universal_backward", "ds - tl.load(delta + q)", "ds", "grad"),
    ("kernels_universal_backward", "gradient * v[None, :]", "gradient", "grad weights"),
    ("kernels_universal_backward", "dz = tl.where(live[:, None], dz, 0.0)", "dz = dz", "grad"),
]


@pytest.mark.parametrize(("module", "old", "new", "where"), WRONG_NUMBERS, ids=lambda v: str(v)[:24])
def test_wrong_numbers(broken, module, old, new, where):
    broken(module, old, new)
    with pytest.raises(AssertionError, match=where):
        run(SMALL)


def test_started_from_nothing(broken, poison_scratch):
    """Adding to scratch that nobody has written yet shows as NaN, because scratch is poisoned."""
    broken("kernels_universal_backward", "mask=inside & started", "mask=inside")
    with pytest.raises(AssertionError, match="nan"):
        run(SMALL)


def test_missing_barrier(broken):
    broken("kernels_common", "tl.debug_barrier()", "pass")
    with memory_monitor(), pytest.raises(Race):
        run(SMALL)


def test_one_row_too_many(broken):
    broken("kernels_universal_forward", "live = rows < end\n", "live = rows <= end\n")
    with memory_monitor(), pytest.raises(OutOfBounds):
        run(SMALL, backward=False)


def test_two_programs_at_one_slot(broken):
    broken("kernels_common", "tl.where(number == 0, s * candidates + candidate, extra)", "s * candidates + candidate")
    with memory_monitor(), pytest.raises(Race):
        run(Spec(lengths=(100, 3), dim=4, hidden=(4,)), backward=False)


def test_unbroken(broken):
    """The machinery itself breaks nothing."""
    broken("kernels_common", "SIGMOID", "SIGMOID")
    with memory_monitor():
        run(SMALL)
