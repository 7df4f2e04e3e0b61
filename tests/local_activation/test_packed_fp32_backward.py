"""Packed backward kernels of fp32: every gradient against float64 autograd, and how accurate they are on tensor cores.

The interpreter multiplies in full fp32; ``tensor_cores`` makes it cut operands off as they do.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from din_kernels.ops.local_activation import (
    packed_collect,
    packed_fp32_backward,
    tiled_backward,
    torch_impl,
    triton_impl,
    universal,
    universal_backward,
)
from din_kernels.ops.local_activation.problem import UnitConfig, UnitGradients
from din_kernels.testing import hostile_gradients
from tests.support.memory_monitor import memory_monitor

from ._cases import Case, Spec, check_gradients, make_case
from ._mutants import load_mutant
from ._variants import variant
from .test_packed_backward import flat, one_tile_a_batch, without_softmax
from .test_packed_forward import packed_specs
from .test_universal_forward import SETTINGS

pytest.importorskip("triton")


def run_backward(case: Case, *, grad_pooled: Tensor | None = None) -> UnitGradients:
    saved = universal.forward(case.config, case.tensors, return_weights=False)
    grad_pooled = case.grad_pooled if grad_pooled is None else grad_pooled
    grad_weights = None if case.config.softmax else case.grad_weights
    path = packed_fp32_backward if case.tensors.keys.shape[0] else triton_impl
    return path.backward(case.config, case.tensors, saved, grad_pooled, grad_weights, case.inv_count)


@settings(SETTINGS, max_examples=20)
@given(packed_specs(max_batch=4), st.sampled_from(("ieee", "ieee", "tf32")), st.booleans())
def test_gradients(device, poison_scratch, spec, precision, training):
    spec = dataclasses.replace(without_softmax(spec), dtype=torch.float32, precision=precision, training=training)
    case = make_case(spec, device)
    if case.tensors.query.shape[0]:
        check_gradients(case, run_backward(case))


SHAPES = [
    Spec(lengths=(70, 0, 3), dim=64, hidden=(36,)),
    Spec(lengths=(9, 60), dim=36, hidden=(36,), activation="dice", training=True, layout="padded"),
    Spec(lengths=(9, 60), dim=64, hidden=(64, 16), activation="dice", training=True),
    Spec(lengths=(30, 6, 0), dim=20, hidden=(30, 17), activation="prelu", wide_rows=True, bias=False),
    Spec(lengths=(40,), dim=64, hidden=(48,), activation="relu", precision="tf32"),
]


@pytest.mark.parametrize("spec", SHAPES, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_common_shapes(device, poison_scratch, spec):
    """Blocks wider than the layers they hold, which is none of memory's business."""
    case = make_case(spec, device)
    check_gradients(case, run_backward(case))


@pytest.mark.parametrize("through_weights", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_softmax(device, poison_scratch, activation, through_weights):
    """The same as the universal kernels give, which are checked elsewhere."""
    spec = Spec((7, 0, 90, 1), 16, (20,), activation=activation, softmax=True, scale=2.0, training=activation == "dice")
    case = make_case(spec, device)
    saved = universal.forward(case.config, case.tensors, return_weights=True)
    arguments = (saved, case.grad_pooled, case.grad_weights if through_weights else None, case.inv_count)
    found, expected = (
        flat(path.backward(case.config, case.tensors, *arguments))
        for path in (packed_fp32_backward, universal_backward)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


def test_batches_of_tiles(device, poison_scratch, monkeypatch):
    """More rows than one batch holds: the sums of all batches are one sum, Dice's before it too; lists may cross from one
    to the next."""
    case = make_case(Spec((3, 200, 0, 40, 130), 8, (9, 20), activation="dice", training=True), device)
    whole = run_backward(case)
    check_gradients(case, whole)
    seen = one_tile_a_batch(monkeypatch, packed_fp32_backward)
    check_gradients(case, run_backward(case))
    assert len(seen[0]) > 5


def test_batches_give_programs_equal_work():
    assert packed_collect.batches(1000, 288, 264) == [(0, 1000)]
    assert packed_collect.batches(8540, 288, 264) == [(0, 4488), (4488, 8540)]
    assert packed_collect.batches(3, 128 << 20, 264) == [(0, 1), (1, 2), (2, 3)]
    for tiles, row_bytes in itertools.product((1, 263, 264, 265, 5000, 200_000), (128, 288, 416)):
        parts = packed_collect.batches(tiles, row_bytes, 264)
        firsts, ends = zip(*parts, strict=True)
        assert (firsts[0], *ends) == (*firsts, tiles)
        sizes = [end - first for first, end in parts]
        assert max(sizes) * row_bytes * packed_collect.TILE <= packed_collect.BETWEEN_BYTES
        assert len(sizes) == 1 or all(size % 264 == 0 for size in sizes[:-1])


SPREAD = [
    Spec(lengths=(3, 0, 70, 1), dim=5, hidden=(9,), activation="prelu"),
    Spec(lengths=(1, 135), dim=16, hidden=(8, 6), layout="padded", activation="dice", training=True),
]


@pytest.mark.parametrize("spec", SPREAD, ids=lambda s: f"{s.layout}-{s.activation}")
def test_memory(spec):
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    case = make_case(spec)
    expected = flat(run_backward(case))
    kernels = {"backward_first_layer_fp32", "backward_scores_fp32", "backward_inputs_fp32", "first_layer_sums_fp32"}
    for order in (None, "reverse", 3):
        with memory_monitor(order=order) as monitor:
            found = flat(run_backward(case))
        assert kernels <= set(monitor.kernels())
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
    """What ``fits`` says is what runs."""
    taken = []
    paths = {"packed": packed_fp32_backward, "universal": universal_backward, "tiled": tiled_backward}
    for name, path in paths.items():
        monkeypatch.setattr(path, "backward", lambda *a, name=name: taken.append(name))
    served = Spec(dim=64, hidden=(36,))
    for spec, path in [
        (served, "packed"),
        (dataclasses.replace(served, precision="tf32"), "packed"),
        (dataclasses.replace(served, hidden=(64, 16), activation="dice"), "packed"),
        (dataclasses.replace(served, softmax=True), "packed"),
        (dataclasses.replace(served, hidden=(80,)), "universal"),
        (dataclasses.replace(served, hidden=(64, 64), activation="dice"), "universal"),
        (dataclasses.replace(served, dim=128), "universal"),
        (dataclasses.replace(served, candidates=2), "universal"),
        (dataclasses.replace(served, layout="mask"), "universal"),
    ]:
        case = make_case(spec, device)
        saved = universal.forward(case.config, case.tensors, return_weights=False)
        triton_impl.backward(case.config, case.tensors, saved, case.grad_pooled, case.grad_weights, None)
        assert taken.pop() == path, spec
    config = UnitConfig("product", "sigmoid", 64, (36,))
    assert packed_fp32_backward.fits(config, 80)
    assert not packed_fp32_backward.fits(config, 75)
    for dim, on_80, on_90 in ((9, True, True), (18, True, True), (33, False, False), (50, False, True)):
        config = UnitConfig("product", "sigmoid", dim, (36,))
        assert (packed_fp32_backward.fits(config, 80), packed_fp32_backward.fits(config, 90)) == (on_80, on_90)


def test_lengths_never_recompile(monkeypatch):
    """What kernels mark ``do_not_specialize`` are all the integers that depend on rows, lists or lengths."""
    from din_kernels.ops.local_activation import kernels_packed_fp32_backward as kernels

    seen: dict[str, set] = {}
    launch = packed_fp32_backward.launch

    def record(kernel, grid, operands, **options):
        values = {name: operands[name] for name in kernel.arg_names}
        key = f"{kernel.fn.__name__} {values.get('GATHER', '')}"
        seen.setdefault(key, set()).add(variant(kernel.arg_names, (), values, FREE))
        launch(kernel, grid, operands, **options)

    monkeypatch.setattr(packed_fp32_backward, "launch", record)
    for lengths in ((1,), (5, 0, 17), (16,) * 4, (150, 2)):
        run_backward(make_case(Spec(lengths, 8, (16, 8), activation="dice", training=len(lengths) > 1)))
    assert len(seen) == 7
    for name, keys in seen.items():
        statistics = {dict(key).get("BATCH_STATISTICS") for key in keys}
        assert len(keys) == len(statistics), (name, keys)
    marks = re.findall(r"do_not_specialize=\[(.*?)\]", Path(inspect.getfile(kernels)).read_text())
    assert {frozenset(re.findall(r'"(\w+)"', mark)) for mark in marks} == {frozenset(FREE)}
    assert len(marks) == 5


FREE = ("queries", "first_tile", "end_tile")


KERNELS = ("kernels_packed_common", "kernels_packed_fp32", "kernels_packed_fp32_backward")
MUTANTS = [
    ("shared += dot(", "shared = dot(", "grad weights"),
    ("dx * turn * -LN_2", "dx * turn", "grad"),
    ("if tl.program_id(1) == 0:", "if tl.program_id(1) == 1:", "grad"),
    ("back * load_rows(query, q, d", "back * load_rows(grad_pooled, q, d", "grad keys"),
    ("tl.sum(pairs, axis=1)", "tl.sum(tl.where(tl.arange(0, 2)[None, :, None, None] == 0, pairs, 0.0), axis=1)", "grad"),
    ("vector += dz", "vector = dz", "grad biases"),
    ("mask=(n < W)[None, :])\n\n\n@triton.jit\ndef add_columns", "mask=(n < 2)[None, :])\n\n\n@triton.jit\ndef add_columns",
     "grad"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where"), MUTANTS, ids=lambda v: str(v)[:24])
def test_a_wrong_kernel_is_caught(monkeypatch, tmp_path, old, new, where):
    case = make_case(Spec(lengths=(7, 100, 300), dim=40, hidden=(12, 9), activation="dice", training=True))
    load_mutant(monkeypatch, tmp_path, KERNELS, KERNELS[0 if "pairs" in old else 2], old, new)
    with pytest.raises(AssertionError, match=where):
        check_gradients(case, run_backward(case))


# ---- accuracy on tensor cores -------------------------------------------------------------------------------


@pytest.fixture
def tensor_cores(monkeypatch):
    """The interpreter's products of tf32 take the 11 leading bits of each operand, as the hardware does."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    whole = InterpreterBuilder.create_dot

    def cut(x):
        return TensorHandle((x.data.view("int32") & -8192).view("float32"), x.dtype)

    def create_dot(self, a, b, d, input_precision, *others):
        if str(input_precision).endswith("TF32"):
            a, b = cut(a), cut(b)
        return whole(self, a, b, d, input_precision, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def errors(found: UnitGradients, expected: UnitGradients) -> dict[str, float]:
    """Relative error of each gradient of more than one number (of one it is chance), in the Frobenius norm."""
    named = {"query": (found.query, expected.query), "keys": (found.keys, expected.keys)}
    for name in ("weights", "biases", "alphas"):
        for i, pair in enumerate(zip(getattr(found, name), getattr(expected, name), strict=True)):
            if pair[0] is not None and pair[0].numel() > 1:
                named[f"{name}[{i}]"] = pair
    return {name: float((f.double() - e).norm() / e.norm()) for name, (f, e) in named.items()}


ACCURATE = [
    Spec(lengths=(100, 37, 130, 0, 9), dim=64, hidden=(36,), activation="sigmoid"),
    Spec(lengths=(100, 37, 130, 0, 9), dim=64, hidden=(36,), activation="dice", training=True),
    Spec(lengths=(100, 37, 130, 0, 9), dim=36, hidden=(64, 16), activation="prelu"),
]


@pytest.mark.parametrize("spec", ACCURATE, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}")
def test_as_accurate_as_ieee(tensor_cores, spec):
    """No worse than the same mathematics in fp32 but for a small factor, where tf32 is off a thousand times more."""
    case = make_case(spec)
    plain = torch_impl.forward(case.config, case.tensors, return_weights=True)
    arguments = (plain, case.grad_pooled, case.grad_weights, case.inv_count)
    of_torch = errors(torch_impl.backward(case.config, case.tensors, *arguments), case.gradients)
    of_split = errors(run_backward(case), case.gradients)
    short = dataclasses.replace(case, config=dataclasses.replace(case.config, precision="tf32"))
    of_tf32 = errors(run_backward(short), case.gradients)
    assert max(of_split.values()) <= 3 * max(of_torch.values()), (of_split, of_torch)
    for name in ("query", "keys", "weights[0]"):
        assert of_tf32[name] > 300 * of_split[name], (name, of_tf32[name], of_split[name])
