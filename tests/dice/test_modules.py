"""The modules: interchangeable with the reference and with BatchNorm-based Dice of other packages, and argument errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import reference.units
from din_kernels import functional
from din_kernels.modules import Dice, LinearDice
from din_kernels.modules.dice import from_batch_norm_state

from ._cases import make_case


@pytest.mark.parametrize("affine", [False, True])
def test_state_dict_both_ways(affine, device):
    ours = Dice(6, affine=affine, backend="torch").to(device)
    theirs = reference.units.Dice(6, affine=affine).to(device)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-1, 1)
    for _ in range(3):
        theirs(torch.randn(20, 6, device=device))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = reference.units.Dice(6, affine=affine).to(device)
    back.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(4, 5, 6, device=device)
    for training in (False, True):
        for module in (ours, theirs, back):
            module.train(training)
        torch.testing.assert_close(ours(x), theirs(x))


class PeerDice(nn.Module):
    """Dice as most packages write it: a BatchNorm1d inside."""

    def __init__(self, width: int, affine: bool, alpha_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, eps=1e-8, affine=affine)
        self.alpha = nn.Parameter(torch.randn(alpha_shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = torch.sigmoid(self.bn(x))
        return self.alpha.reshape(-1) * (1 - p) * x + p * x


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("alpha_shape", [(5,), (5, 1), (1,)])
def test_checkpoints_of_peers(alpha_shape, affine, backend, device):
    peer = PeerDice(5, affine, alpha_shape).to(device)
    for _ in range(2):
        peer(torch.randn(30, 5, device=device) + 1)
    ours = Dice(5, affine=affine, backend=backend).to(device)
    ours.load_state_dict(from_batch_norm_state(peer.state_dict()), strict=True)
    for training in (False, True):
        peer.train(training), ours.train(training)
        x = torch.randn(12, 5, device=device)
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_var, peer.bn.running_var)
    assert int(ours.num_batches_tracked) == 3


def test_checkpoints_of_peers_with_a_prefix():
    peer = nn.ModuleDict({"act": PeerDice(3, False, (3,))})
    found = from_batch_norm_state(peer.state_dict(), prefix="act.")
    assert set(found) == {"alpha", "running_mean", "running_var", "num_batches_tracked"}
    with pytest.raises(KeyError, match=r"no 'alpha' at 'nowhere\.'"):
        from_batch_norm_state(peer.state_dict(), prefix="nowhere.")


@pytest.mark.parametrize("shape", [(4, 1), (1,)])
def test_alpha_of_another_shape(shape, device):
    module = Dice(4, backend="torch").to(device)
    module.alpha = nn.Parameter(torch.rand(shape, device=device))
    module(torch.randn(6, 4, device=device)).sum().backward()
    assert module.alpha.grad.shape == shape
    module.alpha.requires_grad_(False)
    x = torch.randn(6, 4, device=device, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None


def test_copies_and_dtypes():
    module = Dice(3, momentum=None, affine=True)
    module(torch.randn(5, 3))
    again = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (again, torch.load(buffer, weights_only=False)):
        assert other.momentum is None
        for (name, a), b in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    half = copy.deepcopy(module).bfloat16()
    y = half(torch.randn(5, 3, dtype=torch.bfloat16))
    assert y.dtype == half.running_mean.dtype == torch.bfloat16
    assert half.num_batches_tracked.dtype == torch.int64
    assert repr(module) == "Dice(3, eps=1e-08, momentum=None, affine=True, backend=None)"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_linear_dice(affine, bias, backend, device):
    """The pair in one module: values, gradients, running statistics, and the same numbers without gradients."""
    pair = nn.Sequential(nn.Linear(7, 9, bias=bias), Dice(9, affine=affine, backend="torch")).to(device)
    with torch.no_grad():
        for p in pair.parameters():
            p.add_(torch.rand_like(p) * 0.3)
    fused = LinearDice(7, 9, bias=bias, affine=affine, backend=backend).to(device)
    renamed = {name.replace("0.", "linear.").replace("1.", "dice."): v for name, v in pair.state_dict().items()}
    fused.load_state_dict(renamed, strict=True)
    for training in (True, False):
        pair.train(training), fused.train(training)
        x = torch.randn(4, 8, 7, device=device)
        torch.testing.assert_close(fused(x), pair(x), rtol=1e-5, atol=1e-5)
        fused(x).square().sum().backward()
        pair(x).square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(fused(x), pair(x), rtol=1e-5, atol=1e-5)
    for p, (name, q) in zip(pair.parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)
    for p, (name, q) in zip(pair.buffers(), fused.named_buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=name)


def test_overwrite(device):
    """y lies in the memory of x where that was allowed and nothing needs x any more."""
    module = Dice(6, backend="torch").to(device).eval()
    for x, expected in (
        (torch.randn(4, 5, 6, device=device), True),
        (torch.randn(6, 4, device=device).t(), False),
        (torch.randn(4, 6, device=device, dtype=torch.bfloat16), True),
    ):
        want = module(x)
        with torch.no_grad():
            y = module(x.clone(memory_format=torch.preserve_format), overwrite=False)
            torch.testing.assert_close(y, want)
            kept = x.clone(memory_format=torch.preserve_format)
            y = module(kept, overwrite=True)
        torch.testing.assert_close(y, want)
        assert (y.data_ptr() == kept.data_ptr()) == expected
        recorded = module(x, overwrite=True)  # gradients for alpha need x
        assert recorded.data_ptr() != x.data_ptr()


def test_overwriting_what_a_graph_holds_on_to_is_noticed(device):
    for backend in ("torch", "triton"):
        module = Dice(4, backend=backend).to(device).eval()
        w = torch.randn(6, 4, device=device, requires_grad=True)
        x = w * 1
        loss = (x * x).sum()
        with torch.no_grad():
            module(x, overwrite=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("rows", [10, 3000])
def test_numbers_of_other_types(rows, device):
    """1 and True are 1.0, 0 is 0.0."""
    for backend in ("torch", "triton"):
        found = []
        for eps, momentum in ((0.0, 1.0), (0, 1), (0, True)):
            module = Dice(40, eps=eps, momentum=momentum, backend=backend).to(device)
            x = torch.linspace(-1, 1, rows * 40, device=device).view(rows, 40)
            found.append((module(x), module.running_mean, module.running_var))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


ERRORS = [
    ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x must have dtype"),
    ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor"),
    ({"x": torch.tensor(1.0)}, ValueError, "at least one channel"),
    ({"alpha": torch.zeros(2)}, ValueError, r"alpha must have shape \[C\]"),
    ({"alpha": torch.zeros(1, 1, 3)}, ValueError, r"alpha must have shape \[C\]"),
    ({"running_mean": torch.zeros(4)}, ValueError, r"running_mean must have shape \[3\]"),
    ({"running_mean": None, "running_var": None, "training": False}, ValueError, "needed when training=False"),
    ({"running_mean": None}, ValueError, "together, or neither"),
    ({"running_var": torch.ones(3, 2)[:, 0]}, ValueError, "running_var must be contiguous"),
    ({"weight": torch.zeros(3)}, ValueError, "together, or neither"),
    ({"weight": torch.zeros(2), "bias": torch.zeros(3)}, ValueError, r"weight must have shape \[3\]"),
    ({"weight": torch.zeros(3), "bias": torch.zeros(3, dtype=torch.int32)}, TypeError, "bias must have dtype"),
    ({"weight": torch.zeros(3, device="meta"), "bias": torch.zeros(3)}, ValueError, "weight must be on cpu"),
    ({"weight": torch.zeros(3), "bias": torch.zeros(3, device="meta")}, ValueError, "bias must be on cpu"),
    ({"weight": [1.0] * 3, "bias": [0.0] * 3}, TypeError, "weight must be a torch.Tensor"),
    ({"weight": torch.zeros(3), "bias": [0.0] * 3}, TypeError, "bias must be a torch.Tensor"),
    ({"alpha": 0.25}, TypeError, "alpha must be a torch.Tensor"),
    ({"shift": torch.zeros(2)}, ValueError, r"shift must have shape \[3\]"),
    ({"shift": torch.zeros(3, dtype=torch.int32)}, TypeError, "shift must have dtype"),
    ({"shift": torch.zeros(3, device="meta")}, ValueError, "shift must be on cpu"),
    ({"running_var": torch.ones(3, device="meta")}, ValueError, "running_var must be on cpu"),
    ({"num_batches_tracked": torch.tensor(0, device="meta")}, ValueError, "num_batches_tracked must be on cpu"),
    ({"momentum": -0.1}, ValueError, "momentum must be None or between 0 and 1"),
    ({"mask": torch.zeros(4)}, TypeError, "mask must have dtype bool"),
    ({"mask": torch.zeros(5, dtype=torch.bool)}, ValueError, r"mask must have shape \[4\]"),
    ({"momentum": 1.5}, ValueError, "momentum must be None or between 0 and 1"),
    ({"momentum": None, "num_batches_tracked": None}, ValueError, "needs num_batches_tracked"),
    ({"num_batches_tracked": torch.tensor(0.0)}, TypeError, "num_batches_tracked must have dtype int64"),
    ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ({"eps": torch.tensor(1e-8)}, TypeError, "eps must be a number"),
    ({"momentum": torch.tensor(0.1)}, TypeError, "momentum must be a number"),
    ({"backend": "cuda"}, ValueError, "backend must be None, 'triton' or 'torch'"),
    ({"alpha": torch.zeros(3, device="meta")}, ValueError, "alpha must be on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda v: str(v)[:30])
def test_errors(change, error, message):
    """Nothing has changed when an argument is refused."""
    mean, var, tracked = torch.zeros(3), torch.ones(3), torch.tensor(0)
    arguments = {
        "x": torch.randn(4, 3), "alpha": torch.zeros(3), "running_mean": mean, "running_var": var,
        "num_batches_tracked": tracked, "training": True, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        functional.dice(**arguments)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert int(tracked) == 0
    if "num_batches_tracked" in change or message.endswith("must be contiguous"):  # of use in training only
        return
    with torch.no_grad(), pytest.raises(error, match=message):  # the short way of evaluation
        functional.dice(**{**arguments, "num_batches_tracked": None, "training": False})


def test_module_errors():
    with pytest.raises(ValueError, match="at least 1"):
        Dice(0)
    with pytest.raises(ValueError, match="backend must be"):
        Dice(3, backend="gpu")
    with pytest.raises(ValueError, match=r"alpha must have shape"):
        Dice(3)(torch.zeros(4, 5))


@pytest.mark.parametrize("training", [False, True])
def test_parameters_of_another_precision(training, device):
    """bfloat16 activations with float32 parameters, the other way round, and bfloat16 throughout."""
    for backend in ("torch", "triton"):
        for dtype, kept in (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
        ):
            case = make_case((20, 4), dtype=dtype, parameter_dtype=kept, affine=True, training=training, device=device)
            case.check(backend)
