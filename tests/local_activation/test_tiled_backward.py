"""Tiled kernels, backward: every gradient against float64 autograd, memory, order, repeatability."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from din_kernels.ops.local_activation import tiled_backward, universal, universal_backward
from din_kernels.ops.local_activation.problem import UnitGradients
from din_kernels.testing import hostile_gradients
from tests.support.memory_monitor import memory_monitor

from ._cases import Case, Spec, check_gradients, make_case
from .test_packed_backward import flat
from .test_universal_forward import SETTINGS, specs

pytest.importorskip("triton")


def run_backward(case: Case, *, through_weights: bool = True, grad_pooled: torch.Tensor | None = None) -> UnitGradients:
    saved = universal.forward(case.config, case.tensors, return_weights=through_weights)
    return tiled_backward.backward(
        case.config, case.tensors, saved, case.grad_pooled if grad_pooled is None else grad_pooled,
        case.grad_weights if through_weights else None, case.inv_count,
    )  # fmt: skip


@settings(SETTINGS, max_examples=16)
@given(specs(max_batch=3))
def test_gradients(device, poison_scratch, spec):
    case = make_case(dataclasses.replace(spec, hidden=spec.hidden[:2], candidates=1), device)
    if case.tensors.query.shape[0] and case.tensors.keys.shape[0]:
        check_gradients(case, run_backward(case))


SHAPES = [
    Spec(lengths=(70, 0, 3), dim=64, hidden=(36,), interaction="outer", activation="dice", training=True),
    Spec(lengths=(7, 66), dim=36, hidden=(80, 40), dtype=torch.bfloat16, softmax=True),
    Spec(lengths=(9,), dim=128, hidden=(36,), interaction="outer", activation="prelu", layout="mask"),
    Spec(lengths=(1,), dim=18, hidden=(20, 9), interaction="outer", activation="relu", layout="padded"),
    Spec(lengths=(2, 1500, 0, 1), dim=8, hidden=(9,), interaction="outer", softmax=True, scale=0.5),
    Spec(lengths=(2, 700, 0, 1), dim=8, hidden=(9, 5), activation="dice", training=True),
]


@pytest.mark.parametrize("spec", SHAPES, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_shapes(device, poison_scratch, spec):
    case = make_case(spec, device)
    check_gradients(case, run_backward(case))


def test_dice_sums(device):
    """The same as the universal kernels give."""
    case = make_case(Spec((40, 3), 16, (20, 5), activation="dice", training=True, softmax=True), device)
    saved = universal.forward(case.config, case.tensors, return_weights=True)
    arguments = (case.config, case.tensors, saved, case.grad_pooled, case.grad_weights, case.inv_count)
    tiled, universal_ = (module.Backward(*arguments) for module in (tiled_backward, universal_backward))
    tiled.gather_all(), universal_.gather_all()
    torch.testing.assert_close(tiled.sums, universal_.sums, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("interaction", ["outer", "product"])
def test_memory(interaction):
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    case = make_case(
        Spec((3, 0, 200, 1), 10, (9, 5), interaction=interaction, activation="dice", training=True, softmax=True)
    )
    expected = flat(run_backward(case))
    for order in (None, "reverse"):
        with memory_monitor(order=order) as monitor:
            found = flat(run_backward(case))
        assert "backward_tiled" in monitor.kernels()
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


def test_hostile_gradient_strides(device):
    case = make_case(Spec(lengths=(7, 20), dim=8, interaction="outer"), device)
    for gradient in hostile_gradients(case.grad_pooled.shape, device=device):
        strided = run_backward(case, grad_pooled=gradient)
        plain = run_backward(case, grad_pooled=gradient.clone(memory_format=torch.contiguous_format))
        for one, other in zip(flat(strided), flat(plain), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_lost_step_is_caught(device, monkeypatch, poison_scratch, lost):
    """The comparison fails when a launch is left out."""
    from din_kernels.ops.local_activation import kernels_tiled_backward as kernels

    kernel = kernels.backward_tiled

    class Without:
        arg_names = kernel.arg_names

        def __getitem__(self, grid):
            step = self.arg_names.index("STEP")
            return lambda *args, **options: None if args[step] == lost else kernel[grid](*args, **options)

    case = make_case(Spec(lengths=(7, 30), dim=16, hidden=(16, 16)), device)
    check_gradients(case, run_backward(case))
    monkeypatch.setattr(kernels, "backward_tiled", Without())
    with pytest.raises(AssertionError, match="grad"):
        check_gradients(case, run_backward(case))
