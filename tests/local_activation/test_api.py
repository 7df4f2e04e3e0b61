"""What a caller can get wrong, and what is said about it; layouts, dtypes, strides; which backend serves."""

from __future__ import annotations

import logging

import pytest
import torch

import din_kernels
from din_kernels import BackendUnavailable, _backend
from din_kernels.functional import RunningStatistics, local_activation
from din_kernels.ops.local_activation.limits import why_unsupported
from din_kernels.testing import assert_close, hostile_gradients
from reference.units import LocalActivationUnit as Reference

B, T, D = 3, 4, 5


def arguments(**changes):
    """A valid padded product call as a dict, with changes; None removes an entry."""
    made = {
        "query": torch.randn(B, D),
        "keys": torch.randn(B, T, D),
        "weights": [torch.randn(6, 4 * D), torch.randn(1, 6)],
        "biases": [torch.randn(6), torch.randn(1)],
        "lengths": torch.tensor([4, 0, 2]),
        "interaction": "product",
        "activation": "sigmoid",
        "backend": "torch",
    }
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}


JAGGED = {"keys": torch.randn(6, D), "lengths": None}
RUNNING = [RunningStatistics(torch.zeros(6), torch.ones(6))]

BAD = {
    "query of one dimension": ({"query": torch.randn(D)}, ValueError, r"query must have 2 or 3 dimension"),
    "query not a tensor": ({"query": [[1.0]]}, TypeError, r"query must be a torch.Tensor, got list"),
    "query of integers": ({"query": torch.ones(B, D, dtype=torch.long)}, TypeError, r"query must have dtype float32"),
    "no candidates": ({"query": torch.randn(B, 0, D)}, ValueError, r"at least one candidate, got C = 0"),
    "keys not a tensor": ({"keys": None, "lengths": None}, TypeError, r"keys"),
    "keys a list": ({"keys": [1]}, TypeError, r"keys must be a torch.Tensor, got list"),
    "keys of two dimensions, lengths": (
        {"keys": torch.randn(6, D)},
        ValueError,
        r"keys must have 3 dimension.*offsets",
    ),
    "keys too narrow": ({"keys": torch.randn(B, T, D - 1)}, ValueError, r"keys must have embedding_dim = 5 columns"),
    "keys of another dtype": (
        {"keys": torch.randn(B, T, D).double()},
        TypeError,
        r"keys must have dtype float32, got float64",
    ),
    "keys elsewhere": ({"keys": torch.randn(B, T, D, device="meta")}, ValueError, r"keys must be on cpu, got meta"),
    "keys of another batch": (
        {"keys": torch.randn(B + 1, T, D)},
        ValueError,
        r"keys \[B, T, D\] must have the batch of query, 3",
    ),
    "two layouts": ({"mask": torch.ones(B, T, dtype=torch.bool)}, ValueError, r"give one of .*, got lengths and mask"),
    "lengths too many": ({"lengths": torch.tensor([1, 1])}, ValueError, r"lengths must have shape \[3\]"),
    "lengths of floats": ({"lengths": torch.ones(B)}, TypeError, r"lengths must have dtype int32, int64, got float32"),
    "lengths a list": ({"lengths": [1, 2, 3]}, TypeError, r"lengths must be a torch.Tensor, got list"),
    "lengths beyond T": (
        {"lengths": torch.tensor([1, 5, 1])},
        ValueError,
        r"lengths must not exceed .* T = 4 .*got 5 at position 1",
    ),
    "lengths negative": (
        {"lengths": torch.tensor([1, 2, -1])},
        ValueError,
        r"lengths must not be negative, got -1 at position 2",
    ),
    "mask of floats": ({"lengths": None, "mask": torch.ones(B, T)}, TypeError, r"mask must have dtype bool.*float32"),
    "mask of another shape": (
        {"lengths": None, "mask": torch.ones(B, 2, dtype=torch.bool)},
        ValueError,
        r"mask must have shape \[3, 4\]",
    ),
    "offsets too few": ({**JAGGED, "offsets": torch.tensor([0, 2, 6])}, ValueError, r"offsets must have shape \[4\]"),
    "offsets of floats": (
        {**JAGGED, "offsets": torch.tensor([0.0, 1, 2, 6])},
        TypeError,
        r"offsets must have dtype int32, int64",
    ),
    "offsets not from 0": (
        {**JAGGED, "offsets": torch.tensor([1, 2, 3, 6])},
        ValueError,
        r"offsets\[0\] must be 0, got 1",
    ),
    "offsets falling": (
        {**JAGGED, "offsets": torch.tensor([0, 4, 3, 6])},
        ValueError,
        r"offsets\[1\] = 4 > offsets\[2\] = 3",
    ),
    "offsets not to N": (
        {**JAGGED, "offsets": torch.tensor([0, 2, 3, 5])},
        ValueError,
        r"offsets\[-1\] must equal .* 6, got 5",
    ),
    "offsets with padded keys": (
        {"lengths": None, "offsets": torch.tensor([0, 1, 2, 3])},
        ValueError,
        r"keys must have 2 dimension",
    ),
    "interaction": ({"interaction": "sum"}, ValueError, r"interaction must be one of outer, product, got 'sum'"),
    "activation": ({"activation": "tanh"}, ValueError, r"activation must be one of .*, got 'tanh'"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend must be None, 'triton' or 'torch', got 'cuda'"),
    "no hidden layer": (
        {"weights": [torch.randn(1, 4 * D)], "biases": [None]},
        ValueError,
        r"weights must hold at least one hidden layer",
    ),
    "biases missing": ({"biases": [None]}, ValueError, r"biases must have one entry .* 2, got 1"),
    "first weight of the other interaction": (
        {"interaction": "outer"},
        ValueError,
        r"weights\[0\] must have shape \[any, 35\]",
    ),
    "second weight": (
        {"weights": [torch.randn(6, 4 * D), torch.randn(1, 7)]},
        ValueError,
        r"weights\[1\] must have shape \[1, 6\]",
    ),
    "weight of another dtype": (
        {"weights": [torch.randn(6, 4 * D).double(), torch.randn(1, 6)]},
        TypeError,
        r"weights\[0\] must have dtype float32",
    ),
    "empty hidden layer": (
        {"weights": [torch.randn(0, 4 * D), torch.randn(1, 0)]},
        ValueError,
        r"weights\[0\] has no output columns",
    ),
    "bias": ({"biases": [torch.randn(5), None]}, ValueError, r"biases\[0\] must have shape \[6\]"),
    "alphas missing": (
        {"activation": "prelu"},
        ValueError,
        r"activation 'prelu' needs alphas, one tensor per hidden layer \(1\)",
    ),
    "alpha's width": (
        {"activation": "prelu", "alphas": [torch.ones(4)]},
        ValueError,
        r"alphas\[0\] must have 6 elements or one",
    ),
    "Dice's alpha": (
        {"activation": "dice", "alphas": [torch.ones(1)], "running": RUNNING},
        ValueError,
        r"alphas\[0\] must have 6 elements,",
    ),
    "alpha elsewhere": (
        {"activation": "prelu", "alphas": [torch.ones(1, device="meta")]},
        ValueError,
        r"alphas\[0\] must be on cpu",
    ),
    "running missing": (
        {"activation": "dice", "alphas": [torch.ones(6)]},
        ValueError,
        r"activation 'dice' needs running",
    ),
    "running mean": (
        {
            "activation": "dice",
            "alphas": [torch.ones(6)],
            "running": [RunningStatistics(torch.zeros(5), torch.ones(6))],
        },
        ValueError,
        r"running\[0\].mean must have shape \[6\]",
    ),
    "momentum": (
        {
            "activation": "dice",
            "alphas": [torch.ones(6)],
            "running": [RunningStatistics(torch.zeros(6), torch.ones(6), None, None)],
        },
        ValueError,
        r"running\[0\].momentum is None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        local_activation(**arguments(**changes))


def test_nested_keys_carry_their_own_lengths():
    nested = torch.nested.nested_tensor_from_jagged(torch.randn(6, D), torch.tensor([0, 2, 2, 6]))
    with pytest.raises(ValueError, match="carries its own lengths: leave out lengths"):
        local_activation(**arguments(keys=nested))
    strided = torch.nested.nested_tensor([torch.randn(2, D), torch.randn(1, D), torch.randn(3, D)])
    with pytest.raises(TypeError, match=r"layout=torch\.jagged"):
        local_activation(**arguments(keys=strided, lengths=None))
    weights = local_activation(**arguments(keys=nested, lengths=None), return_weights=True)[1]
    assert weights.is_nested
    assert [w.shape for w in weights.unbind()] == [(2,), (0,), (4,)]


def test_debug_mode_looks_at_values(monkeypatch):
    bad = arguments()
    bad["query"][1, 2] = float("nan")
    local_activation(**bad)
    monkeypatch.setenv("DIN_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="query holds NaN"):
        local_activation(**bad)
    good = arguments(keys=torch.full((B, T, D), float("nan")), lengths=torch.zeros(B, dtype=torch.long))
    assert torch.equal(local_activation(**good), torch.zeros(B, D))  # padding may hold anything, in debug mode too
    keys = torch.randn(B, T, D)
    keys[2, 1] = float("nan")  # a real behaviour
    with pytest.raises(ValueError, match="keys hold NaN in a real behaviour"):
        local_activation(**arguments(keys=keys))


@pytest.mark.parametrize("shape", ["padded", "jagged"])
@pytest.mark.parametrize("interaction", ["product", "outer"])
def test_gradients_and_inputs_of_any_strides(shape, interaction):
    torch.manual_seed(0)
    lengths = torch.tensor([4, 1, 3])
    unit = din_kernels.LocalActivationUnit(D, (6, 3), "sigmoid", interaction, softmax=True, backend="torch").double()
    query = torch.randn(D, B, dtype=torch.float64).t()
    keys = torch.randn(B, D, T, dtype=torch.float64).transpose(1, 2)
    how = {"lengths": lengths.repeat_interleave(2)[::2]}
    if shape == "jagged":
        keys = torch.randn(D, 8, dtype=torch.float64).t()
        how = {"offsets": torch.tensor([0, 9, 4, 9, 5, 9, 8, 9])[::2]}

    def gradients(query, keys, grad, how):
        leaves = [query.detach().requires_grad_(), keys.detach().requires_grad_(), *unit.parameters()]
        return torch.autograd.grad(unit(*leaves[:2], **how), leaves, grad)

    plain = {name: value.contiguous() for name, value in how.items()}
    for grad in hostile_gradients((B, D), dtype=torch.float64):
        expected = gradients(query.contiguous(), keys.contiguous(), grad.contiguous(), plain)
        for got, want in zip(gradients(query, keys, grad, how), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("interaction", ["product", "outer"])
@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_low_precision(dtype, interaction, activation):
    """Computed in float32 from rounded inputs, rounded once at the end."""
    torch.manual_seed(0)
    fused = din_kernels.LocalActivationUnit(16, (12, 5), activation, interaction, backend="torch").to(dtype)
    exact = Reference(16, (12, 5), activation, interaction)
    exact.load_state_dict(fused.state_dict())
    exact = exact.double()
    query, keys = torch.randn(4, 16, dtype=dtype), torch.randn(4, 9, 16, dtype=dtype)
    lengths = torch.tensor([9, 2, 0, 5])
    fused_leaves = [query.requires_grad_(), keys.requires_grad_(), *fused.parameters()]
    exact_leaves = [t.detach().double().requires_grad_() for t in (query, keys)] + list(exact.parameters())
    got, want = fused(query, keys, lengths=lengths), exact(*exact_leaves[:2], lengths=lengths)
    assert got.dtype == dtype
    assert_close("pooled", got, want, length=64, stages=4)
    grad = torch.randn(4, 16, dtype=dtype)
    for g, w in zip(torch.autograd.grad(got, fused_leaves, grad),
                    torch.autograd.grad(want, exact_leaves, grad.double()), strict=True):  # fmt: skip
        assert g.dtype == dtype
        assert_close("gradient", g, w, length=64, stages=8, scale=1.0)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("interaction", "hidden", "activation", "softmax"),
    [("product", (12,), "dice", True), ("product", (12, 5), "sigmoid", False), ("outer", (12,), "dice", False),
     ("outer", (12, 5), "prelu", True)],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_default_dtype_does_not_matter(backend, interaction, hidden, activation, softmax, dtype, default, device):
    torch.manual_seed(0)
    unit = din_kernels.LocalActivationUnit(16, hidden, activation, interaction, softmax, backend=backend).to(
        device, dtype
    )
    query, keys = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in ((4, 16), (4, 9, 16)))
    lengths = torch.tensor([9, 2, 0, 5], device=device)
    state = {name: value.clone() for name, value in unit.state_dict().items()}

    def results():
        unit.load_state_dict(state)
        pooled = unit(query, keys, lengths=lengths)
        return [pooled, *torch.autograd.grad(pooled.square().sum(), (query, keys, *unit.parameters()))]

    expected = results()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("activation", ["sigmoid", "prelu", "dice"])
def test_autocast_casts_inputs_and_keeps_statistics(activation):
    """Floating inputs are cast to autocast's dtype, so the result has it; parameters keep float32 gradients."""
    unit = din_kernels.LocalActivationUnit(8, (6,), activation, "product", backend="torch")
    query, keys = torch.randn(3, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = unit(query, keys)
        mixed = unit(query.bfloat16(), keys)  # what comes out of an autocast layer, beside what does not
    assert pooled.dtype == mixed.dtype == torch.bfloat16
    pooled.float().sum().backward()  # outside of autocast, as PyTorch advises
    for parameter in (query, keys, *unit.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
    outside = query.grad.clone()
    query.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        unit(query, keys).float().sum().backward()
    assert torch.equal(query.grad, outside)  # no product inside was taken in bfloat16 here either
    if activation == "dice":
        assert unit.activations[0].running_mean.dtype == torch.float32
        assert int(unit.activations[0].num_batches_tracked) == 3
    double = unit.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert double(query.double(), keys.double()).dtype == torch.float64  # autocast leaves float64 alone


@pytest.fixture
def fresh_log(caplog, monkeypatch):
    monkeypatch.setattr(_backend, "_said", set())
    caplog.set_level(logging.WARNING, logger="din_kernels")
    return caplog


TOO_MUCH = {
    "embedding": (257, (8,), torch.float32, r"embedding_dim 257 is outside"),
    "width": (8, (512,), torch.float32, r"hidden widths \(512,\) are outside"),
    "depth": (8, (8, 8, 8, 8), torch.float32, r"4 hidden layers are outside"),
    "dtype": (8, (8,), torch.float64, r"not float64"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_the_kernels_do_not_serve(case, fresh_log, monkeypatch):
    """Asked for by name it raises; chosen automatically the torch backend serves, and says so once."""
    pytest.importorskip("triton")
    dim, hidden, dtype, reason = TOO_MUCH[case]
    unit = din_kernels.LocalActivationUnit(dim, hidden, "sigmoid", "product", backend="triton").to(dtype)
    query, keys = torch.randn(2, dim, dtype=dtype), torch.randn(2, 3, dim, dtype=dtype)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailable, match=reason):
        unit(query, keys)
    assert not fresh_log.records
    unit.backend = None
    monkeypatch.setattr("din_kernels._backend.resolve", lambda backend, device: "triton")  # as on a GPU
    first = unit(query, keys)
    unit(query, keys)
    assert torch.equal(first, din_kernels.functional.local_activation(
        query, keys, [m.weight for m in unit.linears], [m.bias for m in unit.linears],
        interaction="product", activation="sigmoid", backend="torch"))  # fmt: skip
    assert [record.message for record in fresh_log.records] == [
        f"local_activation: {why_unsupported(dtype, dim, hidden)}; the unfused torch backend serves it"
    ]


def test_explicit_triton_without_a_gpu_or_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    pytest.importorskip("triton")
    with pytest.raises(BackendUnavailable, match="move them to a GPU, use backend='torch', or set TRITON_INTERPRET=1"):
        local_activation(**arguments(backend="triton"))
    monkeypatch.setenv("DIN_KERNELS_BACKEND", "triton")
    with pytest.raises(BackendUnavailable):
        local_activation(**arguments(backend=None))
    monkeypatch.setenv("DIN_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="DIN_KERNELS_BACKEND must be"):
        local_activation(**arguments(backend=None))
    monkeypatch.setenv("DIN_KERNELS_BACKEND", "torch")
    assert local_activation(**arguments(backend=None)).shape == (B, D)


def test_explicit_triton_without_triton(monkeypatch):
    monkeypatch.setattr("din_kernels._backend.has_triton", lambda: False)
    with pytest.raises(BackendUnavailable, match="triton package is not installed"):
        local_activation(**arguments(backend="triton"))
    assert local_activation(**arguments(backend=None)).shape == (B, D)


def test_lengths_as_a_column():
    """Several libraries keep lengths as [B, 1]."""
    column = arguments(lengths=torch.tensor([[4], [0], [2]]))
    assert local_activation(**column).shape == (B, D)


@pytest.mark.parametrize("interaction", ["product", "outer"])
def test_index_tensors_of_any_stride(device, interaction):
    """Kernels read memory element by element: a column of a table, or one number expanded, must not be read as its rows."""
    features = {"product": 4 * D, "outer": D * (D + 2)}[interaction]
    made = arguments(weights=[torch.randn(6, features), torch.randn(1, 6)], interaction=interaction, backend="triton")
    weights, biases = ([t.to(device) for t in made.pop(name)] for name in ("weights", "biases"))
    query, padded = made.pop("query").to(device), made.pop("keys").to(device)
    made.pop("lengths")

    def call(keys, **layout):
        return local_activation(query, keys, weights, biases, **made, **layout)

    def spread(index):
        return torch.stack([index, torch.full_like(index, 1)], 1)[:, 0]

    offsets, mask = torch.tensor([0, 4, 4, 6], device=device), torch.rand(B, T, device=device) < 0.5
    lengths, rows = torch.tensor([3], device=device).expand(B), torch.randn(6, D, device=device)
    assert torch.equal(call(rows, offsets=spread(offsets)), call(rows, offsets=offsets))
    assert torch.equal(call(padded, lengths=lengths), call(padded, lengths=lengths.clone()))
    assert torch.equal(call(padded, mask=mask.t().contiguous().t()), call(padded, mask=mask))
