"""Packed kernels that see all rows before a pass can: Dice's statistics, the two sums that batch statistics add to its
gradients, and softmax's δ. Each against float64, and what is special about tiles that cross lists."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from din_kernels.ops.local_activation import (
    packed,
    packed_backward,
    packed_sums,
    tiled,
    triton_impl,
    universal,
)
from din_kernels.ops.local_activation.problem import UnitGradients
from din_kernels.testing import assert_close
from tests.support.memory_monitor import OutOfBounds, memory_monitor

from ._cases import Case, Spec, check_gradients, check_statistics, make_case
from ._mutants import load_mutant
from .test_packed_forward import BORDERS, packed_specs
from .test_universal_forward import SETTINGS

pytest.importorskip("triton")


def trained(spec: Spec) -> Spec:
    return dataclasses.replace(spec, activation="dice", training=True, candidates=1)


def run_backward(case: Case) -> UnitGradients:
    """With a gradient of the weights, softmax or not."""
    saved = universal.forward(case.config, case.tensors, return_weights=True)
    path = packed_backward if case.tensors.keys.shape[0] else triton_impl
    return path.backward(case.config, case.tensors, saved, case.grad_pooled, case.grad_weights, case.inv_count)


def found_sums(case: Case, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What ``packed_backward`` takes for Dice's sums, [H1, H1, H2, H2] flat."""
    found = []
    taken = packed_sums.dice_sums

    def spy(*args):
        found.append(taken(*args).clone())
        return found[-1]

    monkeypatch.setattr(packed_backward, "dice_sums", spy)
    run_backward(case)
    (sums,) = found
    return sums


def wanted_sums(case: Case) -> Tensor:
    """The same in float64, of autograd: x̂ is a number of its own there, through which p alone depends on z."""
    config, tensors = case.config, case.tensors
    starts, ends = tensors.starts.tolist(), tensors.ends.tolist()
    rows = torch.cat([torch.arange(s, e) for s, e in zip(starts, ends, strict=True)])
    of_row = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(ends) - torch.tensor(starts))
    e, v = tensors.keys[rows].double(), tensors.query.double()[of_row]
    h = torch.cat([v, e, v - e, v * e], dim=1).requires_grad_()
    normalised = []
    for layer, weight in enumerate(tensors.weights[:-1]):
        bias, alpha = tensors.biases[layer], tensors.alphas[layer].double()
        z = torch.nn.functional.linear(h, weight.double(), None if bias is None else bias.double())
        x = (z - z.mean(0)) / z.var(0, unbiased=False).sqrt()  # eps is too little to show
        x.retain_grad()
        normalised.append(x)
        p = torch.sigmoid(x)
        h = z * (p + alpha * (1 - p))
    bias = tensors.biases[-1]
    score = torch.nn.functional.linear(h, tensors.weights[-1].double(), None if bias is None else bias.double())[:, 0]
    a = score
    if config.softmax:
        a = torch.cat(
            [torch.softmax(config.scale * s, 0) for s in score.split((tensors.ends - tensors.starts).tolist())]
        )
    loss = (a * ((e * case.grad_pooled.double()[of_row]).sum(1) + case.grad_weights.double()[rows])).sum()
    loss.backward()
    sums = [s for x in normalised for s in (x.grad.sum(0), (x.grad * x.detach()).sum(0))]
    return torch.cat(sums) * case.inv_count.double()


def check_sums(case: Case, found: Tensor) -> None:
    want = wanted_sums(case)
    spread = float(want.square().mean().sqrt())
    length = max(case.spec.dim, *case.spec.hidden, case.pairs)
    assert_close("sums", found, want, dtype=case.spec.dtype, length=length, stages=10, scale=max(spread, 0.05))


SPREAD = [
    Spec((7, 0, 90, 1), 16, (20,), softmax=True, scale=2.0),
    Spec((7, 0, 60), 36, (36,), layout="padded", bias=False),
    Spec((130, 3, 0, 2), 40, (9, 5), softmax=True, wide_rows=True),
    Spec((40, 20), 20, (40, 36), layout="padded", softmax=True, scale=0.5),
    Spec((1, 30, 6), 64, (36,), dtype=torch.bfloat16, index_dtype=torch.int32),
    Spec((30, 66), 128, (20, 40), dtype=torch.bfloat16, softmax=True),
    Spec((30, 0, 66), 20, (80, 40), softmax=True),
    Spec((30, 66), 64, (80, 40), dtype=torch.bfloat16),
    Spec((30, 6), 16, (64, 64), softmax=True),
]


@pytest.mark.parametrize("spec", SPREAD, ids=lambda s: f"{s.dim}-{'x'.join(map(str, s.hidden))}-{s.softmax}")
def test_sums(device, poison_scratch, monkeypatch, spec):
    case = make_case(trained(spec), device)
    check_sums(case, found_sums(case, monkeypatch))


@settings(SETTINGS, max_examples=12)
@given(packed_specs(max_batch=3))
def test_gradients(device, poison_scratch, spec):
    """Through pooled and weights, softmax or not, with batch statistics."""
    case = make_case(trained(spec), device)
    if case.tensors.query.shape[0]:
        check_gradients(case, run_backward(case))


@settings(SETTINGS, max_examples=6)
@given(packed_specs(max_batch=3))
def test_gradients_of_softmax_weights(device, poison_scratch, spec):
    """δ of whole lists, for every activation."""
    case = make_case(dataclasses.replace(spec, softmax=True, candidates=1), device)
    if case.tensors.query.shape[0]:
        check_gradients(case, run_backward(case))


@settings(SETTINGS, max_examples=20)
@given(packed_specs())
def test_statistics(device, poison_scratch, spec):
    case = make_case(dataclasses.replace(spec, activation="dice", training=True), device)
    if packed.describes(case.config, case.tensors):
        for layer in range(len(spec.hidden)):
            check_statistics(case, layer, packed_sums.statistics(case.config, case.tensors, layer))


@pytest.mark.parametrize("lengths", [v for v in BORDERS.values() if 1 < sum(v) < 1000])
@pytest.mark.parametrize("softmax", [False, True])
def test_borders(device, poison_scratch, lengths, softmax):
    case = make_case(trained(Spec(lengths, 8, (9,), softmax=softmax)), device)
    check_gradients(case, run_backward(case))
    check_statistics(case, 0, packed_sums.statistics(case.config, case.tensors, 0))


def test_statistics_far_from_zero(device):
    """Mean hundreds of times the deviation, by what the query brings: Σz² − (Σz)²/n would have lost the variance."""
    case = make_case(trained(Spec((353,), 8, (16,))), device)
    weight = case.tensors.weights[0].clone()
    weight[:, 16:] = 0  # of query − key and query ∘ key
    tensors = case.tensors._replace(query=300 * case.tensors.query, weights=[weight, *case.tensors.weights[1:]])
    rows = torch.cat([tensors.query.expand(353, 8), tensors.keys], dim=1).double()
    z = rows @ weight[:, :16].double().t() + tensors.biases[0].double()
    var, mean = torch.var_mean(z, 0, correction=0)
    assert float((mean.abs() / var.sqrt()).max()) > 300
    _, found_mean, found_m2 = packed_sums.statistics(case.config, tensors, 0)
    torch.testing.assert_close(found_mean.double(), mean, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(found_m2.double() / 353, var, rtol=2e-3, atol=2e-3)


def test_memory():
    """In bounds, no race between programs or within one, no atomics; any order of programs gives the same bits."""
    case = make_case(trained(Spec((3, 0, 70, 1), 5, (9, 5), softmax=True, dtype=torch.bfloat16)))

    def run() -> list[Tensor]:
        saved = universal.forward(case.config, case.tensors, return_weights=True)
        call = packed.Packed(case.config, case.tensors)
        delta = packed_sums.softmax_delta(call, saved, case.grad_pooled, case.grad_weights)
        gradients = run_backward(case)
        return [*packed_sums.statistics(case.config, case.tensors, 1), delta, gradients.query, gradients.keys]

    expected = run()
    for order in (None, "reverse"):
        with memory_monitor(order=order) as monitor:
            found = run()
        assert {"statistics_packed", "backward_sums", "weighted_gradients_packed"} <= set(monitor.kernels())
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


def test_dispatch(device, monkeypatch):
    """Statistics go as the forward does."""
    taken = []
    served = trained(Spec((3, 9), 16, (36,), dtype=torch.bfloat16))
    for module in (packed_sums, tiled, universal):
        path = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "moments_of_programs", lambda *a, path=path: taken.append(path))
    for spec, layer, path in [
        (served, 0, "packed_sums"),
        (dataclasses.replace(served, lengths=(10, 500)), 0, "tiled"),
        (dataclasses.replace(served, layout="mask"), 0, "tiled"),
        (dataclasses.replace(served, dtype=torch.float32), 0, "universal"),
        (dataclasses.replace(served, hidden=(36, 16)), 1, "packed_sums"),
        (dataclasses.replace(served, hidden=(200,)), 0, "universal"),
    ]:
        case = make_case(spec, device)
        triton_impl.Calls(case.config, case.tensors).moments_of_programs(layer)
        assert taken.pop() == path, spec


SHARED = ("kernels_packed_common", "kernels_packed_forward", "kernels_packed_backward", "kernels_packed_dice")
OWN = ("kernels_packed_statistics", "kernels_packed_sums")
WRONG_NUMBERS = [
    ("(p - p * p)", "p", "grad"),
    ("term * turn", "term", "grad"),
    ("factor * (1.0 - load_vector(alpha, n, H, True))", "factor", "grad"),
    ("tl.store(score_gradients + slot, ds)", "tl.store(score_gradients + slot, 0.5 * ds)", "grad"),
    ("ds = ds - tl.load(delta + q, mask=live, other=0.0)", "ds = ds", "grad"),
    ("terms[None, :], 0.0), axis=1)", "terms[None, :], 0.0), axis=1) * 0.0", "grad"),
    ("tl.where(segment >= begins, 1, 0), its_sums", "0 * segment, its_sums", "grad"),
    ("share, count * share", "share, share", "m2"),
    ("total = count + live", "total = count + 1.0", None),
    ("z0, z1 = halves(z)", "z1, z0 = halves(z)", "m"),
]


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """break(old, new, module): the packed kernels with ``old`` replaced in ``module``."""

    def replace(old: str, new: str, module: str) -> None:
        load_mutant(monkeypatch, tmp_path, (*SHARED, *OWN), module, old, new)

    return replace


def run_mutant() -> None:
    case = make_case(trained(Spec((7, 0, 150), 6, (20, 5), softmax=True, scale=3.0)))
    for layer in range(2):
        check_statistics(case, layer, packed_sums.statistics(case.config, case.tensors, layer))
    check_gradients(case, run_backward(case))


@pytest.mark.parametrize(("old", "new", "where"), WRONG_NUMBERS, ids=lambda v: str(v)[:24])
def test_wrong_numbers(broken, monkeypatch, poison_scratch, old, new, where):
    monkeypatch.setattr(packed_sums, "num_programs", lambda device, per_processor: 2)  # several tiles each
    broken(old, new, OWN["grad" in str(where)])
    with pytest.raises(AssertionError, match=where):
        run_mutant()


@pytest.mark.parametrize("module", OWN)
def test_one_slot_too_many(broken, module):
    broken("live = q >= 0\n", "live = q >= -1\n", module)
    with memory_monitor(), pytest.raises(OutOfBounds):
        run_mutant()


def test_unbroken(broken):
    """The machinery itself breaks nothing."""
    broken("live = q >= 0", "live = q >= 0", "kernels_packed_sums")
    with memory_monitor():
        run_mutant()
