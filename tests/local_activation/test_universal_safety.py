"""Universal kernels: memory they touch, order of execution, repeatability, compiled variants, odd inputs."""

from __future__ import annotations

import pytest
import torch

from din_kernels.ops.local_activation import universal, universal_backward
from tests.support.memory_monitor import OutOfBounds, Race, memory_monitor

from ._cases import Case, Spec, check_gradients, check_outputs, make_case
from ._variants import record_variants

pytest.importorskip("triton")

SPREAD = [
    Spec(lengths=(3, 0, 70), dim=5, hidden=(9,), softmax=True, activation="prelu", interaction="outer"),
    Spec(lengths=(40, 2), dim=18, hidden=(17, 6), layout="mask", candidates=2, index_dtype=torch.int32),
    Spec(lengths=(1, 35), dim=16, hidden=(8, 20, 3), layout="padded", activation="dice", training=True, softmax=True),
    Spec(lengths=(33,), dim=7, hidden=(5, 6, 7), wide_rows=True, dtype=torch.bfloat16),
]


def names(spec: Spec) -> str:
    return f"{spec.layout}-{spec.activation}-{len(spec.hidden)}"


def run_all(case: Case) -> list[torch.Tensor]:
    """Statistics, forward and backward of ``case``: every result, flat."""
    results: list[torch.Tensor] = []
    if case.config.uses_dice:
        for layer in range(len(case.config.hidden_units)):
            results += universal.statistics(case.config, case.tensors, layer)
    saved = universal.forward(case.config, case.tensors, return_weights=True)
    grads = universal_backward.backward(
        case.config, case.tensors, saved, case.grad_pooled, case.grad_weights, case.inv_count
    )
    flat = [*saved, grads.query, grads.keys, *grads.weights, *grads.biases, *grads.alphas]
    return results + [t for t in flat if t is not None]


@pytest.mark.parametrize("spec", SPREAD, ids=names)
def test_memory(spec):
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    case = make_case(spec)
    expected = run_all(case)
    for order in (None, "reverse", 3):
        with memory_monitor(order=order) as monitor:
            found = run_all(case)
        assert {"forward_items", "backward_items"} <= set(monitor.kernels())
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


def test_monitor_sees_a_bad_table(monkeypatch):
    """An item that reaches beyond its list is caught, and so are two items with the same rows."""
    case = make_case(SPREAD[0])
    good = universal.make_items

    def too_long(config, tensors, rows):
        tensors.ends[-1] += 1
        return good(config, tensors, rows)

    monkeypatch.setattr(universal, "make_items", too_long)
    with memory_monitor(), pytest.raises(OutOfBounds, match="keys"):
        run_all(make_case(SPREAD[0]))

    def doubled(config, tensors, rows):
        items = good(config, tensors, rows)
        return items._replace(chunk_list=torch.zeros_like(items.chunk_list))

    monkeypatch.setattr(universal, "make_items", doubled)
    with memory_monitor(), pytest.raises(Race):
        run_all(case)


@pytest.mark.parametrize("spec", SPREAD[:3], ids=names)
def test_repeats_are_bit_equal(device, poison_scratch, spec):
    case = make_case(spec, device)
    for one, other in zip(run_all(case), run_all(case), strict=True):
        assert torch.equal(one, other)


EMPTY = [
    Spec(lengths=(), layout="jagged"),
    Spec(lengths=(0, 0, 0), layout="jagged", softmax=True, activation="dice", training=True),
    Spec(lengths=(0, 0), layout="mask", softmax=True, candidates=2, hidden=(4, 5)),
    Spec(lengths=(1,), activation="dice", training=True),
]


@pytest.mark.parametrize("spec", EMPTY, ids=lambda s: f"{len(s.lengths)}-{s.layout}")
def test_nothing_to_do(device, poison_scratch, spec):
    case = make_case(spec, device)
    saved = universal.forward(case.config, case.tensors, return_weights=True)
    check_outputs(case, saved)
    grads = universal_backward.backward(
        case.config, case.tensors, saved, case.grad_pooled, case.grad_weights, case.inv_count
    )
    check_gradients(case, grads)


def test_rows_of_a_huge_stride(device):
    """Offsets beyond 2³¹ elements: rows of a view so wide that only a few exist (the memory is never touched)."""
    spec = Spec(lengths=(3,), dim=4, hidden=(4,))
    case = make_case(spec, device)
    stride = 1 << 30
    try:
        storage = torch.empty(3 * stride, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("no 6 GiB of address space")
    keys = storage.as_strided((3, 4), (stride, 1))
    keys.copy_(case.tensors.keys)
    tensors = case.tensors._replace(
        keys=keys,
        query=case.tensors.query.bfloat16(),
        weights=[w.bfloat16() for w in case.tensors.weights],
        biases=[b.bfloat16() for b in case.tensors.biases],
    )
    wide = universal.forward(case.config, tensors, return_weights=True)
    plain = universal.forward(case.config, tensors._replace(keys=keys.contiguous()), return_weights=True)
    assert torch.equal(wide.pooled, plain.pooled)
    assert torch.equal(wide.weights, plain.weights)


def test_lengths_never_recompile(monkeypatch):
    """What a launch hands over as compile-time or specialised must not depend on rows, samples, lengths or
    candidates."""
    from din_kernels.ops.local_activation import kernels_statistics as small
    from din_kernels.ops.local_activation import kernels_universal_backward as down
    from din_kernels.ops.local_activation import kernels_universal_forward as up

    kernels = {
        up: ("forward_items", "statistics_items", "combine_items", "normalise_weights"),
        down: ("backward_items", "add_slots", "weighted_gradients"),
        small: ("finish_moments",),
    }
    seen = record_variants(monkeypatch, kernels, FREE)
    for lengths, scale in (((1,), 1.0), ((5, 0, 17), 0.5), ((16,) * 4, 1.0), ((150, 2), 2.0)):
        run_all(make_case(Spec(lengths, 8, (16,), softmax=True, activation="dice", scale=scale, training=True)))
    gather_and_main = {"backward_items": 2}
    for name, keys in seen.items():
        assert len(keys) == gather_and_main.get(name, 1), (name, keys)


# Names that every kernel marks ``do_not_specialize`` (the interpreter does not keep the marks).
FREE = {
    "item_rows", "num_lists", "candidates", "num_rows", "groups", "width", "weight_row", "weight_candidate",
    "weight_list", "num_parts",
}  # fmt: skip


def test_the_names_left_free_are_marked():
    """FREE above is what the sources say."""
    import inspect
    import re
    from pathlib import Path

    for module in ("kernels_universal_forward", "kernels_universal_backward"):
        path = Path(inspect.getfile(universal)).with_name(f"{module}.py")
        source = path.read_text()
        marks = re.findall(r"do_not_specialize=\[(.*?)\]", source, re.S)
        kernels = re.findall(r"@triton\.jit\(do_not_specialize.*?\ndef (\w+)\((.*?)\):", source, re.S)
        assert len(marks) == len(kernels) > 0
        for mark, (name, arguments) in zip(marks, kernels, strict=True):
            runtime = {a.strip() for a in arguments.split(",") if ":" not in a}
            assert set(re.findall(r'"(\w+)"', mark)) == FREE & runtime, name
