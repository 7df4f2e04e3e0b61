"""Packed kernels, backward: every gradient against float64 autograd, and what is special about tiles and batches."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings

from din_kernels.ops.local_activation import (
    packed,
    packed_backward,
    packed_collect,
    tiled_backward,
    triton_impl,
    universal,
    universal_backward,
)
from din_kernels.ops.local_activation.problem import UnitGradients
from din_kernels.testing import hostile_gradients
from tests.support.memory_monitor import memory_monitor

from ._cases import Case, Spec, check_gradients, make_case
from ._variants import record_variants
from .test_packed_forward import BORDERS, packed_specs
from .test_universal_forward import SETTINGS

pytest.importorskip("triton")


def without_softmax(spec: Spec) -> Spec:
    """``_cases`` sends a gradient through the weights, which with softmax is told apart in test_packed_sums."""
    return dataclasses.replace(spec, softmax=False, candidates=1)


def run_backward(case: Case, *, grad_pooled: torch.Tensor | None = None) -> UnitGradients:
    saved = universal.forward(case.config, case.tensors, return_weights=False)
    grad_pooled = case.grad_pooled if grad_pooled is None else grad_pooled
    grad_weights = None if case.config.softmax else case.grad_weights
    path = packed_backward if case.tensors.keys.shape[0] else triton_impl
    return path.backward(case.config, case.tensors, saved, grad_pooled, grad_weights, case.inv_count)


def one_tile_a_batch(monkeypatch: pytest.MonkeyPatch, path: ModuleType) -> list[list[tuple[int, int]]]:
    """From now on; returns what will be asked for."""
    seen: list[list[tuple[int, int]]] = []

    def batches(tiles: int, row_bytes: int, programs: int) -> list[tuple[int, int]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed_collect, "BETWEEN_BYTES", 1)
            seen.append(packed_collect.batches.__wrapped__(tiles, row_bytes, programs))
        return seen[-1]

    monkeypatch.setattr(path, "batches", batches)
    return seen


def flat(gradients: UnitGradients) -> list[torch.Tensor]:
    both = [gradients.query, gradients.keys, *gradients.weights, *gradients.biases, *gradients.alphas]
    return [g for g in both if g is not None]


@settings(SETTINGS, max_examples=30)
@given(packed_specs(max_batch=4))
def test_gradients(device, poison_scratch, spec):
    case = make_case(without_softmax(spec), device)
    if case.tensors.query.shape[0]:
        check_gradients(case, run_backward(case))


SHAPES = [
    Spec(lengths=(70, 0, 3), dim=64, hidden=(36,)),
    Spec(lengths=(7, 0, 60), dim=64, hidden=(80, 40)),
    Spec(lengths=(9, 20), dim=128, hidden=(80, 40), dtype=torch.bfloat16),
    Spec(lengths=(9, 60), dim=36, hidden=(36,), activation="prelu", dtype=torch.float16, layout="padded"),
    Spec(lengths=(40,), dim=96, hidden=(64, 16), activation="relu", dtype=torch.bfloat16),
    Spec(lengths=(40, 20), dim=64, hidden=(36,), activation="dice", training=True, layout="padded"),
    Spec(lengths=(30, 6), dim=20, hidden=(20, 40), activation="dice", training=True, dtype=torch.bfloat16),
    Spec(lengths=(7, 0, 60), dim=36, hidden=(80, 40), activation="prelu"),
    Spec(lengths=(7, 0, 60), dim=18, hidden=(80, 40), activation="dice"),
    Spec(lengths=(7, 0, 60), dim=64, hidden=(64, 64), activation="dice", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("spec", SHAPES, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_common_shapes(device, poison_scratch, spec):
    case = make_case(spec, device)
    check_gradients(case, run_backward(case))


@pytest.mark.parametrize("activation", ["sigmoid", "prelu"])
def test_older_gpus(device, poison_scratch, monkeypatch, activation):
    """Biases by copies into the accumulators instead of products."""
    monkeypatch.setattr(packed, "capability_of", lambda device: 80)
    case = make_case(Spec((9, 60), 20, (20, 40), activation=activation, dtype=torch.bfloat16), device)
    check_gradients(case, run_backward(case))


@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_softmax(device, poison_scratch, activation):
    """Without a gradient of the weights; the same as the universal kernels give, which are checked elsewhere."""
    spec = Spec((7, 0, 90, 1), 16, (20,), activation=activation, softmax=True, scale=2.0, training=activation == "dice")
    case = make_case(spec, device)
    saved = universal.forward(case.config, case.tensors, return_weights=False)
    arguments = (case.config, case.tensors, saved, case.grad_pooled, None, case.inv_count)
    for one, other in zip(
        *(flat(path.backward(*arguments)) for path in (packed_backward, universal_backward)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("lengths", [v for v in BORDERS.values() if 0 < sum(v) < 1000])
def test_borders(device, poison_scratch, lengths):
    case = make_case(Spec(lengths, 8, (9, 5), activation="prelu"), device)
    check_gradients(case, run_backward(case))


def test_batches_of_tiles(device, poison_scratch, monkeypatch):
    """More rows than one batch holds: the sums of all batches are one sum, lists may cross from one to the next."""
    case = make_case(Spec((3, 200, 0, 40, 130), 8, (9, 20)), device)
    whole = run_backward(case)
    check_gradients(case, whole)
    seen = one_tile_a_batch(monkeypatch, packed_backward)
    batched = run_backward(case)
    check_gradients(case, batched)
    assert torch.equal(whole.keys, batched.keys)
    assert len(seen[0]) == packed.make_tables(case.config, case.tensors).tiles > 5


SPREAD = [
    Spec(lengths=(3, 0, 70, 1), dim=5, hidden=(9,), activation="prelu"),
    Spec(lengths=(40, 2), dim=36, hidden=(36, 6), layout="padded", index_dtype=torch.int32),
    Spec(lengths=(1, 135), dim=16, hidden=(8,), activation="dice", training=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("spec", SPREAD, ids=lambda s: f"{s.layout}-{s.activation}")
def test_memory(spec):
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    case = make_case(spec)
    expected = flat(run_backward(case))
    for order in (None, "reverse", 3):
        with memory_monitor(order=order) as monitor:
            found = flat(run_backward(case))
        assert {"backward_scores", "backward_inputs", "first_layer_sums"} <= set(monitor.kernels())
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


def test_hostile_gradient_strides(device):
    case = make_case(Spec(lengths=(7, 20), dim=8), device)
    for gradient in hostile_gradients(case.grad_pooled.shape, device=device):
        strided = run_backward(case, grad_pooled=gradient)
        plain = run_backward(case, grad_pooled=gradient.clone(memory_format=torch.contiguous_format))
        for one, other in zip(flat(strided), flat(plain), strict=True):
            assert torch.equal(one, other)


def test_dispatch(device, monkeypatch):
    """The product interaction, one candidate, 16 bits: here; a narrow layer of the outer one: the tiled kernel; the rest
    is the universal kernels' work."""
    taken = []
    monkeypatch.setattr(packed_backward, "backward", lambda *a: taken.append("packed"))
    monkeypatch.setattr(universal_backward, "backward", lambda *a: taken.append("universal"))
    monkeypatch.setattr(tiled_backward, "backward", lambda *a: taken.append("tiled"))
    served = Spec(dtype=torch.bfloat16, dim=64, hidden=(36,))
    for spec, through_weights, path in [
        (served, True, "packed"),
        (dataclasses.replace(served, softmax=True), False, "packed"),
        (dataclasses.replace(served, softmax=True), True, "packed"),
        (dataclasses.replace(served, candidates=2), False, "universal"),
        (dataclasses.replace(served, layout="mask"), False, "universal"),
        (dataclasses.replace(served, interaction="outer"), False, "tiled"),
        (dataclasses.replace(served, interaction="outer", softmax=True, layout="mask"), True, "tiled"),
        (dataclasses.replace(served, interaction="outer", dim=36, softmax=True), True, "universal"),
        (dataclasses.replace(served, interaction="outer", hidden=(36, 16)), False, "universal"),
        (dataclasses.replace(served, dtype=torch.float32, dim=96), False, "universal"),
        (dataclasses.replace(served, hidden=(80, 40), activation="dice"), True, "packed"),
        (dataclasses.replace(served, hidden=(64, 64), activation="prelu"), True, "packed"),
        (dataclasses.replace(served, hidden=(128,), activation="dice"), True, "universal"),
    ]:
        case = make_case(spec, device)
        saved = universal.forward(case.config, case.tensors, return_weights=False)
        grad_weights = case.grad_weights if through_weights else None
        triton_impl.backward(case.config, case.tensors, saved, case.grad_pooled, grad_weights, None)
        assert taken.pop() == path, spec
    # Two blocks of a layer with Dice and of the embedding are more than there are registers for.
    for hidden, dim, fits in (((80, 40), 64, True), ((80, 40), 96, False), ((64, 32), 96, True)):
        config = make_case(dataclasses.replace(served, hidden=hidden, dim=dim, activation="dice"), device).config
        for capability in (80, 90):
            assert packed_backward.fits(config, torch.bfloat16, capability) == fits


def test_a_wrong_kernel_is_caught(device, monkeypatch):
    """The comparison fails when a kernel is left out."""
    from din_kernels.ops.local_activation import kernels_packed_gradients as kernels

    case = make_case(Spec(lengths=(7, 100), dim=16, hidden=(16, 16)), device)
    check_gradients(case, run_backward(case))

    class Nothing:
        arg_names = kernels.second_layer_sums.arg_names

        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(kernels, "second_layer_sums", Nothing())
    with pytest.raises(AssertionError, match="grad weights"):
        check_gradients(case, run_backward(case))


def test_lengths_never_recompile(monkeypatch):
    """What launches hand over as compile-time or specialised must not depend on rows, lists or lengths: one variant of
    every kernel, whatever the batch."""
    from din_kernels.ops.local_activation import kernels_packed_backward as down
    from din_kernels.ops.local_activation import kernels_packed_forward as up
    from din_kernels.ops.local_activation import kernels_packed_fp32 as fp32
    from din_kernels.ops.local_activation import kernels_packed_gradients as after
    from din_kernels.ops.local_activation import kernels_packed_tables as tables

    kernels = {
        tables: ("make_tables", "fill_slots"),
        up: ("forward_packed", "normalise_packed"),
        fp32: ("forward_packed_fp32",),
        down: ("backward_scores",),
        after: ("backward_inputs", "first_layer_sums", "second_layer_sums"),
    }
    seen = record_variants(monkeypatch, kernels, FREE)
    for lengths, scale in (((1,), 1.0), ((5, 0, 17), 0.5), ((16,) * 4, 1.0), ((150, 2), 2.0)):
        case = make_case(Spec(lengths, 8, (16, 8), softmax=True, scale=scale))
        packed.forward(case.config, case.tensors, return_weights=True)
        short = make_case(Spec(lengths, 8, (16, 8), softmax=True, scale=scale, dtype=torch.bfloat16))
        packed.forward(short.config, short.tensors, return_weights=False)
        run_backward(case)
    for name, keys in seen.items():
        assert len(keys) == 1, (name, keys)


# Names that the kernels mark ``do_not_specialize`` (the interpreter does not keep the marks).
FREE = {
    "queries", "candidates", "first_tile", "end_tile", "weight_row", "weight_candidate", "weight_list",
}  # fmt: skip


def test_the_names_left_free_are_marked():
    """FREE above is what the sources say."""
    from din_kernels.ops.local_activation import kernels_packed_tables

    for module in (
        "kernels_packed_tables",
        "kernels_packed_forward",
        "kernels_packed_fp32",
        "kernels_packed_backward",
        "kernels_packed_gradients",
        "kernels_packed_statistics",
        "kernels_packed_sums",
    ):
        source = Path(inspect.getfile(kernels_packed_tables)).with_name(f"{module}.py").read_text()
        marks = re.findall(r"do_not_specialize=\[(.*?)\]", source, re.S)
        kernels = re.findall(r"@triton\.jit\(do_not_specialize.*?\ndef (\w+)\((.*?)\):", source, re.S)
        assert len(marks) == len(kernels) > 0
        for mark, (name, arguments) in zip(marks, kernels, strict=True):
            runtime = {a.strip() for a in arguments.split(",") if ":" not in a}
            assert set(re.findall(r'"(\w+)"', mark)) == FREE & runtime, name
