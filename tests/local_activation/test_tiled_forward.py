"""Tiled kernels, forward and statistics: values against the float64 reference, memory, order, and what is special here:
chunks of long lists, masks, candidates, and NaN that stays where it is."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from din_kernels.ops.local_activation import tiled, triton_impl
from din_kernels.testing import jagged_lengths, widths
from tests.support.memory_monitor import OutOfBounds, Race, memory_monitor

from ._cases import Case, Spec, check_outputs, check_statistics, make_case
from ._mutants import load_mutant
from .test_universal_forward import SETTINGS

pytest.importorskip("triton")


@st.composite
def tiled_specs(draw, activations=("dice", "prelu", "sigmoid", "relu"), max_batch: int = 4) -> Spec:
    """What the tiled kernels can be asked for. ``fits`` is about registers, so float32 is welcome here."""
    activation = draw(st.sampled_from(activations))
    return Spec(
        lengths=tuple(draw(jagged_lengths(max_batch, 20, tile=64, long=150))),
        dim=draw(widths(40)),
        hidden=tuple(draw(st.lists(widths(48), min_size=1, max_size=2))),
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
    if not case.tensors.query.shape[0] or not case.tensors.keys.shape[0]:
        assert not tiled.serves(case.config, case.tensors, attention=return_weights)
        return triton_impl.forward(case.config, case.tensors, return_weights=return_weights)
    return tiled.forward(case.config, case.tensors, return_weights=return_weights)


def run_all(case: Case) -> list[torch.Tensor]:
    results = [t for t in run_forward(case) if t is not None]
    if case.config.uses_dice:
        for layer in range(len(case.config.hidden_units)):
            results += tiled.statistics(case.config, case.tensors, layer)
    return results


FORMS = st.sampled_from((tiled.LONG, dataclasses.replace(tiled.LONG, tall=True), tiled.SHORT))


@settings(SETTINGS, max_examples=50)
@given(tiled_specs(), FORMS)
def test_outputs(device, poison_scratch, monkeypatch, spec, form):
    monkeypatch.setattr(tiled, "form_of", lambda config, tensors: form)
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))


@settings(SETTINGS, max_examples=20)
@given(tiled_specs(activations=("dice",)), FORMS)
def test_statistics(device, poison_scratch, monkeypatch, spec, form):
    monkeypatch.setattr(tiled, "form_of", lambda config, tensors: form)
    case = make_case(dataclasses.replace(spec, training=True), device)
    if case.tensors.query.shape[0] and case.tensors.keys.shape[0]:
        for layer in range(len(spec.hidden)):
            check_statistics(case, layer, tiled.statistics(case.config, case.tensors, layer))


OUTER = Spec(lengths=(70, 0, 3), dim=64, hidden=(36,), interaction="outer", activation="dice")
SHAPES = [
    OUTER,
    dataclasses.replace(OUTER, hidden=(80, 40), softmax=True, training=True),
    Spec(lengths=(9, 60), dim=128, hidden=(80, 40), activation="dice", training=True, dtype=torch.bfloat16),
    Spec(lengths=(9, 60), dim=128, hidden=(80, 40), interaction="outer", dtype=torch.bfloat16, candidates=2),
    Spec(lengths=(9, 60), dim=36, hidden=(36,), interaction="outer", activation="prelu", dtype=torch.float16),
    Spec(lengths=(40,), dim=96, hidden=(64, 16), activation="relu", softmax=True, dtype=torch.bfloat16, layout="mask"),
    Spec(lengths=(40, 5), dim=18, hidden=(128,), interaction="outer", activation="dice", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "spec", SHAPES, ids=lambda s: f"{s.interaction}-{s.dim}-{'x'.join(map(str, s.hidden))}-{s.activation}"
)
def test_common_shapes(device, poison_scratch, monkeypatch, spec, capability):
    """Widths in two blocks, the embedding too; vectors of the activation kept and read back; either sum of a tile."""
    monkeypatch.setattr(tiled, "capability_of", lambda device: capability)
    case = make_case(spec, device)
    check_outputs(case, run_forward(case))
    if spec.training:
        for layer in range(len(spec.hidden)):
            check_statistics(case, layer, tiled.statistics(case.config, case.tensors, layer))


LENGTHS = {
    "all empty": (0,) * 5,
    "empty lists around a full tile": (0, 0, 64, 0, 128, 0),
    "a tile and a row": (65, 1),
    "one long list among short ones": (3, 0, 1500, 0, 5),
    "one behaviour": (1,),
}


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(device, poison_scratch, monkeypatch, lengths, softmax):
    monkeypatch.setattr(tiled, "form_of", lambda config, tensors: tiled.SHORT if softmax else tiled.LONG)
    interaction = "outer" if len(lengths) > 2 else "product"
    layout = "padded" if not any(lengths) else "jagged"
    spec = Spec(lengths, 8, (9,), interaction, softmax=softmax, scale=2.0, layout=layout, activation="dice")
    case = make_case(dataclasses.replace(spec, training=True), device)
    check_outputs(case, run_forward(case))
    check_statistics(case, 0, tiled.statistics(case.config, case.tensors, 0))


def test_chunks(device, poison_scratch, monkeypatch):
    """Items of several tiles and lists of several items, with candidates that share them."""
    monkeypatch.setattr(tiled, "num_programs", lambda device, per_processor: 2)
    spec = Spec((3, 900, 0, 130), 8, (9,), "outer", "dice", softmax=True, candidates=2, scale=3.0, training=True)
    case = make_case(spec, device)
    call = tiled.Tiled(case.config, case.tensors, layers=1)
    assert call.items.rows == 512
    assert call.items.slots > case.tensors.query.shape[0]
    check_outputs(case, run_forward(case))
    check_statistics(case, 0, tiled.statistics(case.config, case.tensors, 0))


def test_statistics_of_what_hardly_varies(device):
    """Means a thousand times the spread: Σz² − (Σz)²/n in fp32 would be off by more than the variance itself."""
    spec = Spec((200, 3, 150), 8, (16,), "product", "dice", training=True)
    case = make_case(spec, device)
    weight = torch.zeros_like(case.tensors.weights[0])
    weight[:, 8:16] = 1e-3 * torch.randn(16, 8, device=device)
    bias = torch.full_like(case.tensors.biases[0], 30.0)
    tensors = case.tensors._replace(weights=[weight, *case.tensors.weights[1:]], biases=[bias, case.tensors.biases[1]])
    z = tensors.keys.double() @ weight[:, 8:16].double().t() + 30.0
    _, mean, m2 = tiled.statistics(case.config, tensors, 0)
    torch.testing.assert_close(mean.double(), z.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double(), z.var(0, unbiased=False) * z.shape[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("softmax", [False, True])
def test_nan_stays_in_its_list(device, softmax):
    """Of a list whose behaviours hold NaN the others, and the statistics of nobody else's rows, know nothing."""
    spec = Spec((5, 9, 70), 8, (9, 6), "outer", "sigmoid", softmax=softmax)
    case = make_case(spec, device)
    good = run_forward(case)
    case.tensors.keys[7] = math.nan
    bad = run_forward(case)
    assert bool(torch.isnan(bad.pooled[1]).all())
    for q in (0, 2):
        assert torch.equal(bad.pooled[q], good.pooled[q])


def test_masked_list_with_a_bad_query(device):
    """The query of a sample without a single real behaviour may be anything."""
    spec = Spec((0, 4), 8, (9, 5), "outer", "dice", layout="mask", training=True)
    case = make_case(spec, device)
    case.tensors.query[0] = math.nan
    for layer in range(2):
        check_statistics(case, layer, tiled.statistics(case.config, case.tensors, layer))
    check_outputs(case, run_forward(case))


def test_large_scores_do_not_overflow(device):
    case = make_case(Spec((50, 130), 8, (8,), softmax=True, scale=200.0, activation="relu"), device)
    outputs = run_forward(case)
    assert bool(torch.isfinite(outputs.pooled).all())
    sums = torch.stack([part.sum() for part in outputs.weights.double().split([50, 130])])
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)


SPREAD = [
    Spec(lengths=(3, 0, 70), dim=5, hidden=(9,), interaction="outer", softmax=True, activation="prelu"),
    Spec(lengths=(40, 2), dim=36, hidden=(36, 6), layout="mask", candidates=2, index_dtype=torch.int32),
    Spec(lengths=(1, 135), dim=16, hidden=(80, 40), layout="padded", activation="dice", softmax=True, wide_rows=True,
         interaction="outer", dtype=torch.bfloat16, training=True),
]  # fmt: skip


@pytest.mark.parametrize("spec", SPREAD, ids=lambda s: f"{s.layout}-{s.activation}")
def test_memory(monkeypatch, spec):
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    form = {"prelu": tiled.Form(tall=True), "sigmoid": tiled.SHORT, "dice": tiled.LONG}[spec.activation]
    monkeypatch.setattr(tiled, "form_of", lambda config, tensors: form)
    case = make_case(spec)
    expected = run_all(case)
    for order in (None, "reverse", 3):
        with memory_monitor(order=order) as monitor:
            found = run_all(case)
        assert "forward_tiled" in monitor.kernels()
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("spec", SPREAD, ids=lambda s: f"{s.layout}-{s.activation}")
def test_repeats_are_bit_equal(device, poison_scratch, spec):
    case = make_case(spec, device)
    for one, other in zip(run_all(case), run_all(case), strict=True):
        assert torch.equal(one, other)


def test_what_is_read():
    """Keys are read once, without their padding, and a query row's matrix once."""
    spec = Spec(lengths=(30, 0, 100, 7), dim=16, hidden=(16,), layout="padded", interaction="outer")
    case = make_case(spec)
    with memory_monitor() as monitor:
        run_forward(case, return_weights=False)
    keys, first = (monitor.traffic("forward_tiled", name).loads for name in ("keys", "first"))
    assert keys.unique == keys.per_program == sum(spec.lengths) * spec.dim * 4
    assert first.unique == len(spec.lengths) * 16 * 16 * 4


def test_widths_of_the_matrix(device):
    """A of the outer interaction comes in the dtype of the keys, scaled for sigmoid; mixed dtypes widen first."""
    for activation, scale in (("relu", 1.0), ("sigmoid", -math.log2(math.e))):
        case = make_case(Spec((4, 3), 6, (5,), "outer", activation, dtype=torch.bfloat16), device)
        weight, v = case.tensors.weights[0].double(), case.tensors.query.double()
        matrix = weight[:, :6] + torch.einsum("hab,qb->qha", weight[:, 6:42].view(5, 6, 6), v)
        for tensors in (
            case.tensors,
            case.tensors._replace(weights=[w.float() for w in case.tensors.weights]),
        ):
            first = tiled.scaled_first_layer(case.config, tensors)
            assert first.matrix.dtype == torch.bfloat16
            torch.testing.assert_close(first.matrix.double(), matrix * scale, rtol=2**-8, atol=2**-7)


def test_forms(device):
    """Short lists of narrow layers get short tiles, as far as shapes tell."""
    for spec, want in (
        (Spec((100, 90), 8, (36,), "outer", dtype=torch.bfloat16), tiled.SHORT),
        (Spec((200, 90), 8, (36,), "outer", dtype=torch.bfloat16), tiled.LONG),
        (Spec((200, 90), 8, (36,), "outer", dtype=torch.bfloat16, layout="padded"), tiled.SHORT),
        (Spec((200, 90), 8, (36,), "outer", dtype=torch.bfloat16, layout="mask"), tiled.LONG),
        (Spec((100, 90), 8, (36, 16), "outer", dtype=torch.bfloat16), tiled.LONG),
        (Spec((100, 90), 8, (36,), "outer", precision="tf32"), tiled.LONG),
    ):
        case = make_case(spec, device)
        assert dataclasses.replace(tiled.form_of(case.config, case.tensors), tall=False) == want, spec


def test_preferred_lengths(device):
    """Of the product interaction short lists belong to the packed kernels."""
    case = make_case(Spec((3, 3), 8, (8,)), device)
    for rows, padded, want in ((160, 0, True), (159, 0, False), (640, 320, True), (600, 300, False)):
        tensors = case.tensors._replace(keys=torch.zeros(2 * rows, 8, device=device))
        config = dataclasses.replace(case.config, padded_length=padded)
        assert tiled.prefers(config, tensors) == want


def test_dispatch(device, monkeypatch):
    """Who is called: also for long lists of the product interaction, and for Dice's statistics."""
    taken = []
    for path in ("packed", "tiled", "universal"):
        module = getattr(triton_impl, path)
        monkeypatch.setattr(module, "forward", lambda *a, path=path, **k: taken.append(path))
        if path == "packed":
            module = triton_impl.packed_sums
        monkeypatch.setattr(module, "moments_of_programs", lambda *a, path=path, **k: taken.append(path))
    outer = Spec(interaction="outer", activation="dice", dtype=torch.bfloat16)
    for spec, path in [
        (outer, "tiled"),
        (dataclasses.replace(outer, hidden=(80, 40), dim=128), "tiled"),
        (dataclasses.replace(outer, hidden=(80, 40), dim=128, layout="mask"), "universal"),
        (dataclasses.replace(outer, dtype=torch.float32), "universal"),
        (dataclasses.replace(outer, dtype=torch.float32, precision="tf32"), "tiled"),
        (dataclasses.replace(outer, hidden=(8, 8, 8)), "universal"),
        (dataclasses.replace(outer, interaction="product"), "packed"),
        (dataclasses.replace(outer, interaction="product", lengths=(10, 500)), "tiled"),
    ]:
        case = make_case(spec, device)
        triton_impl.forward(case.config, case.tensors, return_weights=False)
        assert taken.pop() == path, spec
        triton_impl.Calls(case.config, case.tensors).moments_of_programs(0)
        assert taken.pop() == path, spec


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """break(module, old, new): the tiled kernels with ``old`` replaced in that module."""
    return partial(load_mutant, monkeypatch, tmp_path, ("kernels_tiled_common", "kernels_tiled_forward"))


MUTANT_SPEC = Spec((7, 0, 300), 6, (40, 20), "outer", "dice", softmax=True, training=True)
WRONG_NUMBERS = [
    ("kernels_tiled_forward", "total_a = total_a * shrink", "total_a = total_a", "pooled"),
    ("kernels_tiled_forward", "delta * (delta * cross[:, None])", "delta * delta", "m2"),
    ("kernels_tiled_forward", "delta * (delta * count[:, None])", "0.0", "m2"),
    ("kernels_tiled_common", "A + origin + tl.arange(0, R", "origin + tl.arange(0, R", "mean"),
]


def run_mutant() -> None:
    case = make_case(MUTANT_SPEC)
    for layer in range(2):
        check_statistics(case, layer, tiled.statistics(case.config, case.tensors, layer))
    check_outputs(case, tiled.forward(case.config, case.tensors, return_weights=True))


@pytest.mark.parametrize(("module", "old", "new", "where"), WRONG_NUMBERS, ids=lambda v: str(v)[:24])
def test_wrong_numbers(broken, monkeypatch, module, old, new, where):
    monkeypatch.setattr(tiled, "num_programs", lambda device, per_processor: 1)  # items of several tiles
    broken(module, old, new)
    with pytest.raises(AssertionError, match=where):
        run_mutant()


def test_one_row_too_many(broken):
    broken("kernels_tiled_common", "live = row < rows\n", "live = row <= rows\n")
    with memory_monitor(), pytest.raises(OutOfBounds):
        run_mutant()


def test_missing_barrier(broken):
    """Of what the program has put down for itself to read back."""
    broken("kernels_tiled_forward", "tl.debug_barrier()", "pass")
    case = make_case(dataclasses.replace(MUTANT_SPEC, hidden=(64, 33)))
    with memory_monitor(), pytest.raises(Race):
        tiled.forward(case.config, case.tensors, return_weights=False)


def test_unbroken(broken, monkeypatch):
    """The machinery itself breaks nothing."""
    monkeypatch.setattr(tiled, "num_programs", lambda device, per_processor: 1)
    broken("kernels_tiled_common", "live = row", "live = row")
    with memory_monitor():
        run_mutant()
