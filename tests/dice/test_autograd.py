"""What PyTorch expects of a differentiable operator: gradcheck, opcheck, compile, export, autocast, double backward."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from din_kernels import functional
from din_kernels.modules import Dice
from din_kernels.ops import DiceFunction
from din_kernels.ops.dice import function, torch_small

from ._cases import Case, make_case

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(affine, masked, training):
    case = make_case((7, 3), dtype=torch.float64, masked=masked, affine=affine, training=training)

    def call(x, alpha, *rest):
        weight, bias = rest or (None, None)
        mean, var = case.running_mean.clone(), case.running_var.clone()
        return functional.dice(
            x, alpha, mean, var, weight=weight, bias=bias, mask=case.mask, training=training, backend="torch"
        )

    leaves = [tensor.requires_grad_() for tensor in case.leaves().values()]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(backend, device):
    x = torch.randn(5, 3, device=device, requires_grad=True)
    module = Dice(3, backend=backend).to(device)
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# Paths of the torch backend: (most elements of small inputs, elements up to which those start no threads).
PATHS = {"one thread": (1 << 18, 1 << 15), "all threads": (1 << 18, 0), "any size": (-1, 0)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_every_choice_of_gradients(affine, training, path, monkeypatch):
    """Whichever leaves want a gradient have the right one, and the others none; nothing of the size of x is kept but x."""
    for name, value in zip(("_MOST_ELEMENTS", "_SERIAL"), PATHS[path], strict=True):
        monkeypatch.setattr(torch_small, name, value)
    case = make_case((40, 7), affine=affine, training=training, dtype=torch.float64)
    y_want, want, mean, var, _ = case.expected()
    names = list(case.leaves())
    for chosen in itertools.product([False, True], repeat=len(names)):
        if not any(chosen):
            continue
        wanted = dict(zip(names, chosen, strict=True))
        leaves = {name: t.detach().clone().requires_grad_(wanted[name]) for name, t in case.leaves().items()}
        running = case.running_mean.clone(), case.running_var.clone()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = functional.dice(
                leaves["x"], leaves["alpha"], *running, weight=leaves.get("weight"), bias=leaves.get("bias"),
                training=training, backend="torch",
            )  # fmt: skip
        assert [t.data_ptr() for t in saved if t.numel() >= 40] == [leaves["x"].data_ptr()]
        y.backward(case.grad)
        torch.testing.assert_close(y.detach(), y_want)
        torch.testing.assert_close(running, (mean, var))
        for name, leaf in leaves.items():
            if wanted[name]:
                torch.testing.assert_close(leaf.grad, want[name], msg=f"{name} of {wanted}")
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("path", PATHS)
def test_double_backward_of_torch_raises(path, monkeypatch):
    for name, value in zip(("_MOST_ELEMENTS", "_SERIAL"), PATHS[path], strict=True):
        monkeypatch.setattr(torch_small, name, value)
    for training in (False, True):
        x = torch.randn(5, 3, requires_grad=True)
        module = Dice(3, backend="torch").train(training)
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["alpha", "x", "weight"])
def test_some_gradients_only(frozen, backend, device):
    case = make_case((6, 4), affine=True, device=device)
    want = case.expected()[1]
    leaves = {name: tensor.detach().requires_grad_(name != frozen) for name, tensor in case.leaves().items()}
    y = functional.dice(**leaves, training=True, backend=backend)
    y.backward(case.grad)
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad.double().cpu(), want[name], rtol=1e-3, atol=1e-3)


def test_function_class_is_the_operator(device):
    assert functional.dice.__module__.startswith("din_kernels.ops.dice")
    running = function.Running(None, None, None, 0.1, 1e-8)
    x = torch.randn(6, 3, device=device)
    alpha = torch.randn(3, device=device)
    y = DiceFunction.apply(x, alpha, None, None, None, running, True, None, "torch")
    torch.testing.assert_close(y, functional.dice(x, alpha, training=True, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    x, grad, c = torch.randn(9, 5, device=device), torch.randn(9, 5, device=device), torch.randn(5, device=device)
    mask = torch.rand(9, device=device) < 0.6
    three = torch.rand(2, 3, 5, device=device) + 1
    calls = [
        (function.moments_op, (x, mask, backend)),
        (function.evaluate_op, (x, None, c, c, c, c, c.abs(), 1e-8, backend)),
        (function.sums_op, (grad, x, three[0], c, None, None, backend)),
        (function.backward_op, (grad, x, None, mask, three[0], None, c, c, c, True, backend)),
        (function.backward_op, (grad, x, None, None, three[0], three, c, None, None, True, backend)),
        (function.backward_op, (grad, x, None, None, three[0], None, c, None, None, False, backend)),
        (function.backward_op, (grad, x, c, mask, three[0], None, c, c, c, True, backend)),
        (function.evaluate_op, (x, c, c, c, c, c, c.abs(), 1e-8, backend)),
    ]
    count = torch.tensor(2, device=device)
    for gathered, step in ((None, None), (three, torch.tensor(0.5, device=device))):
        state = (c.clone(), c.abs(), count.clone(), step, 0.1, 1e-8, backend)
        calls.append((function.forward_op, (x, None, mask, gathered, c, c, c, *state)))
    calls.append((function.forward_op, (x, c, None, None, c, None, None, None, None, None, None, 0.1, 1e-8, backend)))
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend, device):
    """One graph, forward and backward, for any number of rows; running statistics move as without compilation."""

    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), Dice(4, backend=backend), nn.Linear(4, 1)).to(device)

    plain, model = build(), build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        plain.train(training), model.train(training)
        for rows in (6, 9, 40):
            x = torch.randn(rows, 3, device=device)
            got, want = compiled(x), plain(x)
            torch.testing.assert_close(got, want)
            got.square().sum().backward(), want.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert int(model[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    "options", [{}, {"affine": True, "masked": True, "momentum": None}, {"shift": True, "momentum": 0.3}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_torch(options, dtype, device):
    """Without kernels the compiler gets Dice as operations that it fuses, none of ours; values, gradients and statistics."""
    seen = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    shift = torch.randn(5, device=device) if options.get("shift") else None

    def call(case: Case) -> Any:
        return functional.dice(
            case.x, case.alpha, case.running_mean, case.running_var, weight=case.weight, bias=case.bias, mask=case.mask,
            shift=shift, num_batches_tracked=case.tracked, training=case.training, momentum=case.momentum, backend="torch",
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    for training in (True, False):
        found = []
        for called in (call, compiled):
            case = make_case(
                (7, 3, 5), training=training, dtype=dtype, device=device,
                **{name: value for name, value in options.items() if name != "shift"},
            )  # fmt: skip
            leaves = [t.requires_grad_() for t in case.leaves().values()]
            y = called(case)
            found.append(
                (y, *torch.autograd.grad(y, leaves, case.grad), case.running_mean, case.running_var, case.tracked)
            )
        torch.testing.assert_close(found[1], found[0])
    assert seen
    assert not any("din_kernels" in target for target in seen)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compile_nothing(masked, dynamic, device):
    """Without rows there is nothing to learn, compiled as in eager mode; later batches have some."""
    torch.compiler.reset()
    module = Dice(5, momentum=None, backend="torch").to(device)
    call = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (0, 7, 0):
        x = torch.randn(rows, 5, device=device)
        mask = torch.ones(rows, dtype=torch.bool, device=device) if masked else None
        twin = copy.deepcopy(module)
        torch.testing.assert_close(call(x, mask), twin(x, mask))
        torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("momentum", [None, 1, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_sizes_that_are_symbols(backend, momentum, device):
    torch.compiler.reset()
    module = Dice(5, momentum=momentum, backend=backend).to(device)
    twin = copy.deepcopy(module)
    call = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 12):
        x = torch.randn(rows, 5, device=device)
        torch.testing.assert_close(call(x), twin(x))
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))


def test_transforms_leave_nothing_behind():
    """What is kept from one call to the next is no transform's tensor."""
    x, alpha, mean, var = torch.randn(6, 4), torch.zeros(4), torch.zeros(4), torch.ones(4)

    def call(x):
        return functional.dice(x, alpha, mean, var, eps=0.375, backend="torch")

    def train(x):
        return functional.dice(x, alpha, training=True, eps=0.1875, backend="torch")

    torch.testing.assert_close(torch.func.functionalize(call)(x), call(x))
    with pytest.raises(RuntimeError, match="functionalizing"):  # torch refuses operators that change an argument
        torch.func.functionalize(train)(x)
    assert train(x).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend, device):
    module = Dice(4, backend=backend).to(device).eval()
    with torch.no_grad():
        module.running_mean.uniform_(-1, 1)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (torch.randn(6, 4, device=device),), dynamic_shapes=({0: rows},))
    assert any("din_kernels" in str(node.target) for node in program.graph.nodes)  # not what torch_traced says instead
    x = torch.randn(17, 4, device=device)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, device):
    """The layer before hands over bfloat16; parameters and statistics are float32; the result is bfloat16."""
    model = nn.Sequential(nn.Linear(3, 4), Dice(4, backend=backend)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = model(torch.randn(6, 3, device=device))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[1].alpha.grad.dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_and_accumulation(backend, device):
    """Two calls of one module in one graph keep their own statistics."""
    module = Dice(4, backend=backend).to(device)
    first, second = (torch.randn(n, 4, device=device, requires_grad=True) for n in (5, 1100))
    total = module(first).square().sum() + module(second).square().sum()
    got = torch.autograd.grad(total, (first, second))
    for x, dx in zip((first, second), got, strict=True):
        (alone,) = torch.autograd.grad(module(x).square().sum(), x)
        assert torch.equal(alone, dx)
