"""Universal kernels, forward and statistics: values against the float64 reference over the whole option space."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from din_kernels.ops.local_activation import universal
from din_kernels.testing import jagged_lengths, widths

from ._cases import Case, Spec, check_outputs, check_statistics, make_case

pytest.importorskip("triton")

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes here, and the examples are small as they are
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def specs(draw, activations=("dice", "prelu", "sigmoid", "relu"), max_batch: int = 4) -> Spec:
    activation = draw(st.sampled_from(activations))
    return Spec(
        lengths=tuple(draw(jagged_lengths(max_batch, 20, tile=32, long=110))),
        dim=draw(widths(40)),
        hidden=tuple(draw(st.lists(widths(48), min_size=1, max_size=3))),
        interaction=draw(st.sampled_from(("product", "outer"))),
        activation=activation,
        layout=draw(st.sampled_from(("jagged", "padded", "mask"))),
        candidates=draw(st.sampled_from((1, 1, 3))),
        softmax=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 0.25))),
        bias=draw(st.booleans()),
        training=activation == "dice" and draw(st.booleans()),
        per_channel=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))),
        index_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        seed=draw(st.integers(0, 99)),
        wide_rows=draw(st.booleans()),
    )


def run_forward(case: Case, *, return_weights: bool = True):
    return universal.forward(case.config, case.tensors, return_weights=return_weights)


@SETTINGS
@given(specs())
def test_outputs(device, poison_scratch, spec):
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))


@settings(SETTINGS, max_examples=10)
@given(specs(activations=("dice",)))
def test_statistics(device, poison_scratch, spec):
    case = make_case(dataclasses.replace(spec, training=True), device)
    for layer in range(len(spec.hidden)):
        check_statistics(case, layer, universal.statistics(case.config, case.tensors, layer))


WIDE = [
    Spec(lengths=(33,), dim=256, hidden=(256, 130, 256), activation="dice", training=True, softmax=True),
    Spec(lengths=(70, 1), dim=128, hidden=(200, 80), activation="prelu", dtype=torch.bfloat16),
    Spec(lengths=(5,), dim=100, hidden=(80, 40), interaction="outer", activation="sigmoid", softmax=True),
    Spec(lengths=(5, 66), dim=256, hidden=(36,), activation="relu", dtype=torch.float16),
]


@pytest.mark.parametrize("spec", WIDE, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_wide(device, poison_scratch, spec):
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))
    if spec.activation == "dice":
        for layer in range(len(spec.hidden)):
            check_statistics(case, layer, universal.statistics(case.config, case.tensors, layer))


@pytest.mark.parametrize("softmax", [False, True])
def test_one_long_list_among_short_ones(device, poison_scratch, softmax, monkeypatch):
    """Cut into many items, with items of several tiles, and empty lists on both sides of it."""
    spec = Spec(lengths=(4, 0, 900, 0, 2), dim=12, hidden=(10,), softmax=softmax, scale=3.0)
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))
    monkeypatch.setattr(universal, "num_programs", lambda device, per_processor: 2)
    check_outputs(case, run_forward(case))


def test_large_scores_do_not_overflow(device):
    case = make_case(Spec(lengths=(50, 130), dim=8, hidden=(8,), softmax=True, scale=200.0, activation="relu"), device)
    outputs = run_forward(case)
    assert bool(torch.isfinite(outputs.pooled).all())
    # Scores of several hundred: their rounding error enters the exponent, so only the shape of the result is checked.
    sums = torch.stack([part.sum() for part in outputs.weights.double().split([50, 130])])
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)


def test_weights_are_optional_and_change_nothing(device):
    case = make_case(Spec(lengths=(7, 40), softmax=True, candidates=2), device)
    with_weights, without = run_forward(case), run_forward(case, return_weights=False)
    assert without.weights is None
    assert torch.equal(with_weights.pooled, without.pooled)


def test_a_wrong_kernel_is_caught(device, monkeypatch):
    """The comparison fails when the activation's code is mistaken, or one bias is lost."""
    case = make_case(Spec(lengths=(7, 40), dim=16, hidden=(16, 16), activation="relu"), device)
    check_outputs(case, run_forward(case))
    monkeypatch.setitem(universal.ACTIVATION_CODES, "relu", universal.ACTIVATION_CODES["sigmoid"])
    with pytest.raises(AssertionError, match="pooled"):
        check_outputs(case, run_forward(case))
    monkeypatch.undo()
    case.tensors.biases[1] = None
    with pytest.raises(AssertionError, match="pooled"):
        check_outputs(case, run_forward(case))
