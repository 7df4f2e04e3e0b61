"""Universal kernels, backward: every gradient against float64 autograd over the whole option space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from din_kernels.ops.local_activation import universal, universal_backward
from din_kernels.ops.local_activation.problem import UnitGradients
from din_kernels.testing import hostile_gradients

from ._cases import Case, Spec, check_gradients, make_case
from .test_universal_forward import SETTINGS, specs

pytest.importorskip("triton")


def run_backward(case: Case, *, through_weights: bool = True, grad_pooled: torch.Tensor | None = None) -> UnitGradients:
    saved = universal.forward(case.config, case.tensors, return_weights=through_weights)
    return universal_backward.backward(
        case.config, case.tensors, saved, case.grad_pooled if grad_pooled is None else grad_pooled,
        case.grad_weights if through_weights else None, case.inv_count,
    )  # fmt: skip


@settings(SETTINGS, max_examples=14)
@given(specs(max_batch=3))
def test_gradients(device, poison_scratch, spec):
    case = make_case(spec, device)
    check_gradients(case, run_backward(case))


WIDE = [
    Spec(lengths=(33,), dim=256, hidden=(130, 256), activation="prelu", softmax=True),
    Spec(lengths=(5, 1), dim=128, hidden=(200, 80), activation="dice", training=True, dtype=torch.bfloat16),
    Spec(lengths=(9,), dim=80, hidden=(80, 40), interaction="outer", activation="sigmoid", softmax=True),
]


@pytest.mark.parametrize("spec", WIDE, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_wide(device, poison_scratch, spec):
    case = make_case(spec, device)
    check_gradients(case, run_backward(case))


@pytest.mark.parametrize("interaction", ["product", "outer"])
def test_one_long_list_among_short_ones(device, poison_scratch, monkeypatch, interaction):
    """Slots of many items, and items of several tiles (with fewer programs)."""
    spec = Spec(lengths=(4, 0, 500, 0, 2), dim=6, hidden=(5,), softmax=True, interaction=interaction)
    case = make_case(spec, device)
    check_gradients(case, run_backward(case))
    monkeypatch.setattr(universal, "num_programs", lambda device, per_processor: 1)
    monkeypatch.setattr(universal_backward, "num_programs", lambda device, per_processor: 1)
    check_gradients(case, run_backward(case))


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_candidates_in_groups(device, poison_scratch, monkeypatch, groups):
    """Candidates of one list, all in one program or dealt out; the last group may be short or empty."""
    monkeypatch.setattr(universal_backward, "num_programs", lambda device, per_processor: groups)
    case = make_case(Spec(lengths=(9,), dim=6, hidden=(5,), candidates=7, softmax=True, layout="padded"), device)
    check_gradients(case, run_backward(case))
    monkeypatch.setattr(universal_backward, "num_programs", lambda device, per_processor: groups + 2)
    check_gradients(case, run_backward(case))


def test_gradient_through_pooled_alone(device):
    """Without a gradient of the weights, the result is what linearity says: that with a zero one."""
    case = make_case(Spec(lengths=(7, 20), softmax=True, activation="prelu"), device)
    case.grad_weights = torch.zeros_like(case.grad_weights)
    for one, other in zip(run_backward(case), run_backward(case, through_weights=False), strict=True):
        for a, b in zip(*(x if isinstance(x, list) else [x] for x in (one, other)), strict=True):
            torch.testing.assert_close(a, b)


def test_hostile_gradient_strides(device):
    case = make_case(Spec(lengths=(7, 20), dim=8, softmax=True), device)
    for gradient in hostile_gradients(case.grad_pooled.shape, device=device):
        strided = run_backward(case, through_weights=False, grad_pooled=gradient)
        copied = gradient.clone(memory_format=torch.contiguous_format)
        plain = run_backward(case, through_weights=False, grad_pooled=copied)
        assert torch.equal(strided.keys, plain.keys)
        assert torch.equal(strided.weights[0], plain.weights[0])


def test_fewer_programs_where_sums_are_large(device, monkeypatch):
    monkeypatch.setattr(universal_backward, "PRIVATE_BYTES", 0)
    case = make_case(Spec(lengths=(7, 0, 20, 3), dim=8), device)
    monkeypatch.setattr(universal_backward, "num_programs", lambda device, per_processor: per_processor)
    check_gradients(case, run_backward(case))


def test_a_wrong_kernel_is_caught(device, monkeypatch):
    """The comparison fails when Dice's sums are left out, and when candidates do not add up."""
    case = make_case(Spec(lengths=(7, 20), dim=8, activation="dice", training=True), device)
    check_gradients(case, run_backward(case))
    case.inv_count = torch.zeros_like(case.inv_count)
    with pytest.raises(AssertionError, match="grad"):
        check_gradients(case, run_backward(case))
    case = make_case(Spec(lengths=(7, 20), dim=8, candidates=2), device)
    gradients = run_backward(case)
    check_gradients(case, gradients)
    case.grad_pooled[1::2] = 0  # as if the second candidate had not been added
    with pytest.raises(AssertionError, match="grad keys"):
        check_gradients(case, gradients._replace(keys=run_backward(case).keys))
