"""The torch backend in float64 equals the reference and loops over single behaviours to 1e-10: values, every gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.local_activation._calls import (
    CallSpec,
    Walking,
    assert_same,
    by_loops,
    call_specs,
    make_data,
    make_units,
    of_reference,
    of_unit,
    walkings,
)

relaxed = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def conditioned(spec: CallSpec) -> float:
    """How much rounding Dice may amplify: batch statistics over a handful of rows can have tiny variances, and with
    ε = 1e-8 x̂ multiplies them by up to 1e4, squared in the gradient."""
    return 1e-10 if spec.activation != "dice" or not spec.training else 1e-8


@settings(max_examples=250, **relaxed)
@given(spec=call_specs(), walking=walkings())
def test_equals_the_reference(spec, walking):
    unit, reference = make_units(spec)
    data = make_data(spec)
    with walking.active():
        found = of_unit(unit, spec, data)
    assert_same(found, of_reference(reference, spec, data), atol=conditioned(spec), rtol=conditioned(spec))


@settings(max_examples=40, **relaxed)
@given(spec=call_specs(max_batch=3, max_length=4, long=8), walking=walkings())
def test_equals_loops_over_single_behaviours(spec, walking):
    spec = dataclasses.replace(spec, dim=min(spec.dim, 6), hidden=tuple(min(h, 5) for h in spec.hidden[:3]))
    unit, reference = make_units(spec)
    data = make_data(spec)
    with walking.active():
        found = of_unit(unit, spec, data)
    assert_same(found, by_loops(reference, spec, data), atol=conditioned(spec), rtol=conditioned(spec))


BASE = CallSpec((5, 0, 9, 1), 12, (10, 6), "dice", "product", training=True)


@pytest.mark.parametrize("interaction", ["outer", "product"])
@pytest.mark.parametrize("activation", ["dice", "prelu", "sigmoid", "relu"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("candidates", [0, 3])
def test_every_combination(interaction, activation, softmax, candidates):
    spec = dataclasses.replace(
        BASE, interaction=interaction, activation=activation, softmax=softmax, candidates=candidates, scale=0.7
    )
    unit, reference = make_units(spec)
    data = make_data(spec)
    assert_same(of_unit(unit, spec, data), of_reference(reference, spec, data))


@pytest.mark.parametrize("layout", ["offsets", "lengths", "mask", "full"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (0, 1, 0), (1,)])
@pytest.mark.parametrize("interaction", ["outer", "product"])
@pytest.mark.parametrize("softmax", [False, True])
def test_batches_with_next_to_nothing_in_them(layout, lengths, interaction, softmax):
    if layout == "full" and len(set(lengths)) > 1:
        pytest.skip("lists of different lengths need a layout that says so")
    for training in (False, True):
        if layout == "full" and lengths == (1,) and training:
            continue  # the reference, like nn.BatchNorm1d, refuses to train on one row when there is no mask
        spec = dataclasses.replace(
            BASE, layout=layout, lengths=lengths, interaction=interaction, softmax=softmax, training=training
        )
        unit, reference = make_units(spec)
        data = make_data(spec)
        assert_same(of_unit(unit, spec, data), of_reference(reference, spec, data))


def test_cut_lists_are_told_from_whole_ones():
    """Two lists of two pieces beside two empty ones: four equal pieces for four lists."""
    spec = dataclasses.replace(BASE, lengths=(0, 6, 6, 0), interaction="outer")
    unit, reference = make_units(spec)
    data = make_data(spec)
    with Walking(piece_rows=3).active():
        found = of_unit(unit, spec, data)
    assert_same(found, of_reference(reference, spec, data), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("interaction", ["outer", "product"])
@pytest.mark.parametrize("held_bytes", [64 << 20, 0])
def test_one_long_list_among_short_ones(interaction, held_bytes):
    """Lists longer than a piece are cut, and chunks end in the middle of lists."""
    spec = dataclasses.replace(BASE, lengths=(3, 1300, 0, 5, 700), interaction=interaction, softmax=True)
    unit, reference = make_units(spec)
    data = make_data(spec)
    with Walking(held_bytes=held_bytes, chunk_pairs=300).active():
        found = of_unit(unit, spec, data)
    assert_same(found, of_reference(reference, spec, data), atol=1e-9, rtol=1e-9)


def test_results_do_not_depend_on_the_run_or_on_what_memory_held(poison_scratch):
    spec = dataclasses.replace(BASE, layout="mask", softmax=True, candidates=2)
    data = make_data(spec)
    first = of_unit(make_units(spec)[0], spec, data)
    second = of_unit(make_units(spec)[0], spec, data)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.isnan(value).any(), name
