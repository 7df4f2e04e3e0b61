"""A linear layer and its Dice as one: the bias inside Dice's passes, against the pair in float64 by definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from din_kernels import functional
from din_kernels.modules import Dice, LinearDice, linear_dice
from din_kernels.ops.dice import triton_impl
from din_kernels.testing import assert_close
from tests.support.memory_monitor import memory_monitor

from ._cases import by_definition, make_case


def shifted_case(rows: int, **options):
    """A case, and a shift that is large beside x's deviation, for a sign or a missing term to be seen."""
    case = make_case((rows, 9), **options)
    generator = torch.Generator().manual_seed(11)
    shift = 3 * torch.randn(9, generator=generator, dtype=torch.float64).to(case.alpha.device, case.alpha.dtype)
    return case, shift


def check(case, shift: Tensor, backend: str) -> None:
    """Values, all gradients and running statistics of ``dice(x, shift=shift)`` against ``dice(x + shift)`` in float64."""
    wide = copy.deepcopy(case)
    leaves = {name: t.detach().double().requires_grad_() for name, t in {**wide.leaves(), "shift": shift}.items()}
    want, mean, var, _ = by_definition(
        leaves["x"] + leaves["shift"], leaves["alpha"], case.running_mean.double(), case.running_var.double(),
        leaves.get("weight"), leaves.get("bias"), case.mask, case.training, case.eps,
    )  # fmt: skip
    want_grads = dict(zip(leaves, torch.autograd.grad(want, list(leaves.values()), case.grad.double()), strict=True))
    running = case.running_mean.double(), case.running_var.double()
    if mean is not None and var is not None:
        running = tuple((0.9 * a + 0.1 * b).detach() for a, b in zip(running, (mean, var), strict=True))
    leaves = {name: t.detach().requires_grad_() for name, t in {**case.leaves(), "shift": shift}.items()}
    y = functional.dice(
        leaves["x"], leaves["alpha"], case.running_mean, case.running_var, weight=leaves.get("weight"),
        bias=leaves.get("bias"), shift=leaves["shift"], mask=case.mask, num_batches_tracked=case.tracked,
        training=case.training, eps=case.eps, backend=backend,
    )  # fmt: skip
    rows = case.x.shape[0]
    assert_close("y", y.detach(), want.detach(), length=rows, stages=3)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), case.grad), strict=True))
    assert_close("dx", grads["x"], want_grads["x"], length=rows, stages=6, scale=4.0)
    for name in grads.keys() - {"x"}:
        assert_close(f"d{name}", grads[name], want_grads[name], length=rows, stages=6, scale=4.0 * rows**0.5)
    assert_close("running_mean", case.running_mean, running[0], length=rows, stages=2)
    assert_close("running_var", case.running_var, running[1], length=rows, stages=2)
    assert int(case.tracked) == 3 + (mean is not None)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)], ids=str
)
@pytest.mark.parametrize("rows", [40, 1300])
@pytest.mark.parametrize(
    "options",
    [{}, {"masked": True, "affine": True}, {"training": False}, {"training": False, "affine": True}],
    ids=["plain", "masked-affine", "evaluation", "evaluation-affine"],
)
def test_shift(options, rows, backend, dtype, device, launches, poison_scratch):
    check(*shifted_case(rows, dtype=dtype, device=device, **options), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_shift_in_16_bits(backend, dtype, device, poison_scratch):
    """x + shift is formed in float32, not rounded: a shift of ±3 beside values of 1 would cost two bits."""
    check(*shifted_case(300, dtype=dtype, device=device), backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [40, 1300])
def test_shift_where_running_statistics_serve(rows, backend, device, launches):
    """A mask of one row: no gradient goes through statistics, and the shift's own gradient has another form."""
    case, shift = shifted_case(rows, device=device)
    case.mask = torch.zeros(rows, dtype=torch.bool, device=device)
    case.mask[rows // 2] = True
    check(case, shift, backend)


@pytest.mark.parametrize("rows", [40, 1300])
def test_shift_memory(rows, launches):
    """In bounds, no races; the shift costs no pass over the rows: as many launches, and bytes but for a vector, as without."""
    moved = []
    for with_shift in (False, True):
        case, shift = shifted_case(rows)
        leaf = shift.requires_grad_() if with_shift else None
        with memory_monitor() as monitor:
            y = functional.dice(case.x.requires_grad_(), case.alpha, training=True, shift=leaf, backend="triton")
            y.backward(case.grad)
        moved.append((monitor.kernels(), monitor.bytes_moved()))
    assert moved[0][0] == moved[1][0]
    parts = triton_impl._planned(case.x).numbers["num_parts"]
    assert 0 < moved[1][1] - moved[0][1] < 4 * 9 * 4 * (parts + 1) ** 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_evaluation_in_place(backend, device):
    """Without gradients y lies in the memory that the GEMM wrote."""
    case, shift = shifted_case(50, training=False, device=device)
    x = case.x.clone()
    state = (case.alpha, case.running_mean, case.running_var)
    want = functional.dice(case.x + shift, *state, backend="torch")
    y = functional.dice(x, *state, shift=shift, overwrite=True, backend=backend)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    kept = case.x.clone()
    functional.dice(kept, *state, shift=shift, backend=backend)
    assert torch.equal(kept, case.x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [30, 1100])
def test_linear_dice_is_the_pair(rows, backend, device):
    """Keys of the state_dict, values and gradients of the module, and of two modules that are kept apart."""
    torch.manual_seed(2)
    fused = LinearDice(7, 9, affine=True, backend=backend).to(device)
    assert list(fused.state_dict()) == [
        "linear.weight", "linear.bias", "dice.alpha", "dice.weight", "dice.bias", "dice.running_mean", "dice.running_var",
        "dice.num_batches_tracked",
    ]  # fmt: skip
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(torch.randn_like(p))
    linear, activation = copy.deepcopy(fused.linear), copy.deepcopy(fused.dice)
    pair = nn.Sequential(copy.deepcopy(linear), Dice(9, affine=True, backend="torch")).to(device, torch.float64)
    pair[1].load_state_dict(fused.dice.state_dict())
    x, grad = torch.randn(rows, 7, device=device), torch.randn(rows, 9, device=device)
    for training in (True, False):
        for module in (fused, activation, pair):
            module.train(training)
        results = []
        for call, own in (
            (fused, list(fused.parameters())),
            (lambda v: linear_dice(v, linear, activation), [*linear.parameters(), *activation.parameters()]),
            (lambda v: pair(v.double()), list(pair.parameters())),
        ):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *own], grad.to(y.dtype))])
        for one, two, exact in zip(*results, strict=True):
            assert torch.equal(one, two)
            torch.testing.assert_close(one.double(), exact.double(), rtol=1e-4, atol=2e-6 * rows)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hooks_see_what_lies_between(backend, device):
    """A hook of the linear layer gets its output, bias included, and nobody writes over it."""
    module = LinearDice(7, 9, backend=backend).to(device).eval()
    x, seen = torch.randn(20, 7, device=device), []
    with torch.no_grad():
        want = module(x)
        module.linear.register_forward_hook(lambda _module, _given, result: seen.append(result))
        torch.testing.assert_close(module(x), want)
        torch.testing.assert_close(seen[0], nn.functional.linear(x, module.linear.weight, module.linear.bias))


def test_errors():
    with pytest.raises(ValueError, match=r"shift must have shape \[3\]"):
        functional.dice(torch.zeros(4, 3), torch.zeros(3), training=True, shift=torch.zeros(4))
    with pytest.raises(ValueError, match="shift and process_group"):
        functional.dice(torch.zeros(4, 3), torch.zeros(3), training=True, shift=torch.zeros(3), process_group=object())


def test_compile_fullgraph(device):
    module = LinearDice(3, 4, backend="triton").to(device)
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (6, 11):
        x = torch.randn(rows, 3, device=device)
        got, want = compiled(x), plain(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward(), want.square().sum().backward()
    torch.testing.assert_close(module.linear.bias.grad, plain.linear.bias.grad)
