"""torch.compile, torch.export, operator checks, and what autograd may and may not do."""

from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import din_kernels
from din_kernels.functional import local_activation
from din_kernels.ops.local_activation import function

D = 6


def make_unit(activation="dice", interaction="product", training=True, **options):
    torch.manual_seed(0)
    unit = din_kernels.LocalActivationUnit(D, (5, 3), activation, interaction, backend="torch", **options)
    with torch.no_grad():
        for module in unit.activations:
            if isinstance(module, din_kernels.Dice):
                module.alpha.normal_()
    return unit.train(training)


def batch(rows, length, layout):
    """(query, keys, how) with lists of 0 … length behaviours."""
    lengths = torch.arange(rows) % (length + 1)
    query = torch.randn(rows, D)
    if layout == "padded":
        return query, torch.randn(rows, length, D), {"lengths": lengths}
    if layout == "mask":
        return query, torch.randn(rows, length, D), {"mask": torch.rand(rows, length) > 0.4}
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return query, torch.randn(int(offsets[-1]), D), {"offsets": offsets}


def gradients(unit, call, query, keys, how):
    leaves = [query.detach().requires_grad_(), keys.detach().requires_grad_(), *unit.parameters()]
    for tensor in (*leaves[:2], *how.values()):
        torch._dynamo.mark_dynamic(tensor, 0)
    if keys.dim() == 3:
        torch._dynamo.mark_dynamic(leaves[1], 1)
    pooled = call(*leaves[:2], **how)
    return [pooled, *torch.autograd.grad(pooled.square().sum(), leaves)]


@pytest.mark.parametrize("layout", ["padded", "jagged"])
@pytest.mark.parametrize(("activation", "training"), [("dice", True), ("dice", False), ("sigmoid", True)])
def test_compile_without_graph_breaks(layout, activation, training):
    """One graph, forward and backward; sizes marked dynamic are never compiled again."""
    torch.compiler.reset()
    eager = make_unit(activation, training=training)
    unit = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unit, fullgraph=True, backend=counter, dynamic=None)
    for rows, length in ((4, 5), (7, 3), (3, 9)):
        query, keys, how = batch(rows, length, layout)
        for got, want in zip(gradients(unit, compiled, query, keys, how),
                             gradients(eager, eager, query, keys, how), strict=True):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    for (name, got), want in zip(unit.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler on a CPU"
)
def test_compile_with_the_default_backend():
    """Inductor, with softmax, candidates and the weights returned."""
    torch.compiler.reset()
    unit = make_unit("prelu", "outer", softmax=True)
    compiled = torch.compile(unit, fullgraph=True)
    query, keys = torch.randn(3, 2, D), torch.randn(3, 4, D)
    mask = torch.rand(3, 4) > 0.3
    got, want = (call(query, keys, mask=mask, return_weights=True) for call in (compiled, unit))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("layout", ["padded", "jagged"])
@pytest.mark.parametrize("activation", ["dice", "sigmoid"])
def test_export_with_dynamic_batch_and_rows(layout, activation):
    unit = make_unit(activation, training=False)
    query, keys, how = batch(4, 5, layout)
    rows = torch.export.Dim("batch", min=2, max=10_000)
    sizes = {"query": {0: rows}}
    if layout == "padded":
        sizes["keys"] = {0: rows, 1: torch.export.Dim("longest", min=2, max=10_000)}
        sizes["lengths"] = {0: rows}
    else:
        sizes["keys"] = {0: torch.export.Dim("behaviours", min=2, max=1_000_000)}
        sizes["offsets"] = {0: rows + 1}
    exported = torch.export.export(unit, (), {"query": query, "keys": keys, **how}, dynamic_shapes=sizes)
    for shape in ((4, 5), (9, 3)):
        query, keys, how = batch(*shape, layout)
        torch.testing.assert_close(exported.module()(query=query, keys=keys, **how), unit(query, keys, **how))


def operator_arguments(activation, interaction, softmax, jagged, candidates=1):
    """(tensors of a call, configuration) as the operators take them."""
    dim, hidden = 5, (4, 3)
    first = 4 * dim if interaction == "product" else dim * (dim + 2)
    widths = [first, *hidden, 1]
    weights = [torch.randn(o, i, requires_grad=True) for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(4, requires_grad=True), None, torch.randn(1, requires_grad=True)]
    dice = activation == "dice"
    alphas = [torch.randn(h) if activation in ("dice", "prelu") else None for h in hidden]
    statistics = [[f(h) for h in hidden] if dice else [] for f in (torch.randn, torch.rand)]
    lengths = torch.tensor([2, 0, 3])
    ends = lengths.cumsum(0) if jagged else torch.arange(3) * 4 + lengths
    starts = ends - lengths
    rows = 5 if jagged else 12
    mask = None if jagged else torch.rand(rows) > 0.3
    tensors = (
        torch.randn(3 * candidates, dim), torch.randn(rows, dim), starts, ends, mask, weights, biases, alphas,
        *statistics,
    )  # fmt: skip
    return tensors, (interaction, activation, softmax, 0.5, candidates, 0 if jagged else 4, "ieee", "torch")


@pytest.mark.parametrize("activation", ["dice", "relu"])
@pytest.mark.parametrize("interaction", ["product", "outer"])
@pytest.mark.parametrize("jagged", [True, False])
def test_operators_keep_their_promises(activation, interaction, jagged):
    """opcheck: schema, shape-only twins (with symbolic sizes), autograd registration."""
    softmax = jagged
    tensors, config = operator_arguments(activation, interaction, softmax, jagged, candidates=2)
    # No autograd formula is registered on the operators themselves: LocalActivationFunction differentiates them.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    detached = tuple([None if x is None else x.detach() for x in t] if isinstance(t, list) else t for t in tensors)
    torch.library.opcheck(function.forward_op, (*detached, True, *config), test_utils=checks)
    if activation == "dice":
        running = ([torch.randn(h) for h in (4, 3)], [torch.rand(h) for h in (4, 3)])
        arguments = (*detached[:8], [], [], *running, [1e-8, 1e-8], True, *config)
        torch.library.opcheck(function.dice_forward_op, arguments, test_utils=checks)
    pooled, attention, log_normaliser = function.forward_op(*detached, True, *config)
    arguments = (
        torch.randn_like(pooled), torch.randn_like(attention), pooled, attention, log_normaliser if softmax else None,
        torch.tensor(0.1) if activation == "dice" else None, *detached, *config,
    )  # fmt: skip
    torch.library.opcheck(function.backward_op, arguments, test_utils=checks)


@pytest.mark.parametrize("activation", ["dice", "prelu", "sigmoid"])
@pytest.mark.parametrize("interaction", ["product", "outer"])
@pytest.mark.parametrize("softmax", [False, True])
def test_gradcheck(activation, interaction, softmax):
    unit = make_unit(activation, interaction, softmax=softmax).double()
    query = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 5, 5, 9])
    parameters = list(unit.parameters())
    names = [name for name, _ in unit.named_parameters()]

    def call(query, keys, *values):
        given = dict(zip(names, values, strict=True))
        buffers = {name: buffer.clone() for name, buffer in unit.named_buffers()}
        arguments = {"offsets": offsets, "return_weights": True}
        return torch.func.functional_call(unit, {**given, **buffers}, (query, keys), arguments)

    assert torch.autograd.gradcheck(call, (query, keys, *parameters), atol=1e-6, rtol=1e-5, fast_mode=True)


def test_double_backward_raises():
    unit = make_unit("sigmoid")
    query = torch.randn(2, D, requires_grad=True)
    pooled = unit(query, torch.randn(2, 3, D))
    (grad,) = torch.autograd.grad(pooled.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
@pytest.mark.parametrize("interaction", ["product", "outer"])
def test_saved_for_backward_are_the_inputs_and_little_else(activation, interaction):
    """Beyond the caller's own tensors: two numbers per row of query, its pooled row, and the statistics of Dice."""
    rows, length, dim, hidden = 64, 50, 16, (32, 8)
    unit = din_kernels.LocalActivationUnit(dim, hidden, activation, interaction, softmax=True, backend="torch")
    query, keys = torch.randn(rows, dim, requires_grad=True), torch.randn(rows, length, dim, requires_grad=True)
    lengths = torch.randint(0, length, (rows,))
    own = {t.untyped_storage().data_ptr() for t in (query, keys, lengths, *unit.parameters(), *unit.buffers())}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pooled = unit(query, keys, lengths=lengths)
    assert own & saved.keys()
    extra = sum(size for pointer, size in saved.items() if pointer not in own)
    allowed = 4 * rows * (dim + 1) + 2 * 8 * rows + 2 * 4 * sum(hidden) + 64  # pooled, normaliser; starts, ends; Dice
    assert extra <= allowed
    pooled.sum().backward()


def test_gradients_that_nobody_asked_for():
    unit = make_unit("sigmoid").requires_grad_(False)
    query, keys = torch.randn(2, D), torch.randn(2, 3, D, requires_grad=True)
    unit(query, keys).sum().backward()
    assert keys.grad is not None
    assert query.grad is None
    with torch.no_grad():
        assert not unit(query, keys).requires_grad
    with torch.inference_mode():
        assert unit(query, keys).is_inference()
    _, weights = unit(query, keys, return_weights=True)
    (of_weights,) = torch.autograd.grad(weights.sum(), keys)  # pooled is not used at all
    assert bool((of_weights != 0).any())


def test_meta_tensors_give_shapes():
    unit = make_unit().to("meta")
    query = torch.empty(3, 2, D, device="meta")
    pooled, weights = unit.eval()(query, torch.empty(3, 7, D, device="meta"), return_weights=True)
    assert pooled.shape == (3, 2, D)
    assert weights.shape == (3, 2, 7)
    assert pooled.is_meta


def test_functional_equals_module():
    unit = make_unit("prelu", "outer")
    query, keys, how = batch(4, 5, "mask")
    found = local_activation(
        query, keys, [m.weight for m in unit.linears], [m.bias for m in unit.linears], interaction="outer",
        activation="prelu", alphas=[m.weight for m in unit.activations], backend="torch", **how,
    )  # fmt: skip
    assert torch.equal(found, unit(query, keys, **how))
