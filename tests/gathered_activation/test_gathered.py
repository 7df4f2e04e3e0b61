"""The gather-fused unit against the float64 reference on gathered rows, forward and backward, both backends."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from din_kernels.ops.gathered_activation import function
from din_kernels.ops.gathered_activation.api import gathered_activation
from din_kernels.ops.local_activation.function import RunningStatistics
from din_kernels.testing import assert_close, offsets_of
from reference.units import LocalActivationUnit

BACKENDS = ("torch", "triton")
ITEMS, CATEGORIES = 13, 5


@dataclasses.dataclass(frozen=True)
class Spec:
    lengths: tuple[int, ...] = (3, 0, 21)
    item_dim: int = 5
    category_dim: int = 3
    hidden: tuple[int, ...] = (9,)
    interaction: str = "product"
    activation: str = "dice"
    softmax: bool = False
    candidates: int = 0
    training: bool = False
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64


@dataclasses.dataclass
class Problem:
    spec: Spec
    unit: LocalActivationUnit  # float64
    arguments: dict[str, Tensor]  # ids and tables
    offsets: Tensor
    grad_pooled: Tensor
    grad_weights: Tensor

    def call(self, backend: str) -> tuple[Tensor, Tensor, list[Tensor], list[RunningStatistics] | None]:
        """(pooled, weights, [item table, category table, unit's parameters …], running) of the operation under test."""
        spec = self.spec
        unit = copy.deepcopy(self.unit).to(spec.dtype)
        tables = [self.arguments[f"{name}_table"].clone().requires_grad_() for name in ("item", "category")]
        linears = list(unit.linears)
        alphas = running = None
        if spec.activation == "dice":
            alphas = [a.alpha for a in unit.activations]
            running = [
                RunningStatistics(a.running_mean, a.running_var, a.num_batches_tracked, a.momentum, a.eps)
                for a in unit.activations
            ]
        elif spec.activation == "prelu":
            alphas = [a.weight for a in unit.activations]
        ids = {k: v for k, v in self.arguments.items() if not k.endswith("table")}
        weights, biases = [m.weight for m in linears], [m.bias for m in linears]
        pooled, attention = gathered_activation(
            **ids, item_table=tables[0], category_table=tables[1], weights=weights, biases=biases, offsets=self.offsets,
            interaction=spec.interaction, activation=spec.activation, alphas=alphas, running=running,
            training=spec.training, softmax=spec.softmax, return_weights=True, backend=backend,
        )  # fmt: skip
        return pooled, attention, [*tables, *weights, *biases, *(alphas or [])], running

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], LocalActivationUnit]:
        """(pooled, weights, grad of the keys [N, D], grad of the queries, grads of the unit's parameters, the unit)."""
        unit = copy.deepcopy(self.unit).train(self.spec.training)
        tables = [self.arguments[f"{name}_table"].double() for name in ("item", "category")]

        def rows(kind: str) -> Tensor:
            parts = [
                t[self.arguments[f"{kind}_{name}"].long()] for t, name in zip(tables, ("item", "category"), strict=True)
            ]
            return torch.cat(parts, dim=-1).requires_grad_()

        keys, query = rows("key"), rows("query")
        pooled, attention = unit(query, keys, offsets=self.offsets, return_weights=True)
        parameters = [*(m.weight for m in unit.linears), *(m.bias for m in unit.linears)]
        if self.spec.activation in ("dice", "prelu"):
            parameters += [
                getattr(a, "alpha", None) if self.spec.activation == "dice" else a.weight for a in unit.activations
            ]
        loss = (pooled * self.grad_pooled).sum() + (attention * self.grad_weights).sum()
        of_keys, of_query, *grads = torch.autograd.grad(loss, [keys, query, *parameters])
        return pooled, attention, of_keys, of_query, grads, unit


def make(spec: Spec, device: torch.device | str = "cpu", *, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    dim, batch, total = spec.item_dim + spec.category_dim, len(spec.lengths), sum(spec.lengths)
    unit = LocalActivationUnit(dim, spec.hidden, spec.activation, spec.interaction, spec.softmax).double().eval()
    for module in unit.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 1.5)
            torch.nn.init.normal_(module.alpha, std=0.3)
    queries = (batch, spec.candidates) if spec.candidates else (batch,)
    arguments = {
        "query_item": torch.randint(ITEMS, queries, dtype=spec.index_dtype),
        "query_category": torch.randint(CATEGORIES, queries, dtype=spec.index_dtype),
        "key_item": torch.randint(ITEMS, (total,), dtype=spec.index_dtype),
        "key_category": torch.randint(CATEGORIES, (total,), dtype=spec.index_dtype),
        "item_table": torch.randn(ITEMS, spec.item_dim).to(spec.dtype),
        "category_table": torch.randn(CATEGORIES, spec.category_dim).to(spec.dtype),
    }
    if spec.dtype != torch.float64:  # the reference computes with the values that the operation is given
        unit = unit.to(spec.dtype).double()
    weights = (total, spec.candidates) if spec.candidates else (total,)
    arguments = {name: value.to(device) for name, value in arguments.items()}
    return Problem(
        spec, unit.to(device), arguments, offsets_of(spec.lengths, dtype=spec.index_dtype).to(device),
        torch.randn(*queries, dim).to(device, spec.dtype).double(), torch.randn(weights).to(device, spec.dtype).double(),
    )  # fmt: skip


def check(problem: Problem, backend: str) -> None:
    spec = problem.spec
    pooled, attention, leaves, running = problem.call(backend)
    dtype = spec.dtype
    loss = (pooled * problem.grad_pooled.to(dtype)).sum() + (attention * problem.grad_weights.to(dtype)).sum()
    of_items, of_categories, *grads = torch.autograd.grad(loss, leaves)
    want_pooled, want_attention, want_keys, want_query, want_grads, unit = problem.expected()
    length = max(spec.lengths, default=1) * max(spec.candidates, 1) * 4
    bound: dict[str, Any] = {"dtype": dtype, "length": length, "stages": 4 if not spec.training else 8}
    assert_close("pooled", pooled, want_pooled, **bound)
    assert_close("weights", attention, want_attention, **bound)
    # A gradient for every occurrence, behaviours first: not yet summed by id.
    want = torch.cat([want_keys, want_query.reshape(-1, want_query.shape[-1])])
    for name, grad, columns in (
        ("item", of_items, want[:, : spec.item_dim]),
        ("category", of_categories, want[:, spec.item_dim :]),
    ):
        assert grad.is_sparse
        assert not grad.is_coalesced()
        ids = torch.cat([problem.arguments[f"key_{name}"], problem.arguments[f"query_{name}"].reshape(-1)])
        assert torch.equal(grad._indices()[0], ids.long())
        assert_close(f"{name} occurrences", grad._values(), columns, scale=float(want.square().mean().sqrt()), **bound)
    total = max(sum(spec.lengths), 1)
    bound["length"] = total * max(spec.candidates, 1)
    for i, (grad, wanted) in enumerate(zip(grads, want_grads, strict=True)):
        size = max(float(wanted.abs().max()), float(want.square().mean().sqrt()) * total**0.5)
        assert_close(f"parameter {i}", grad, wanted.view_as(grad), scale=size, **bound)
    if spec.training:
        assert running is not None
        for state, dice in zip(running, unit.activations, strict=True):
            assert_close("running mean", state.mean, dice.running_mean, **bound)
            assert_close("running var", state.var, dice.running_var, **bound)
            assert int(state.num_batches_tracked) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        Spec(interaction="outer", softmax=True),
        Spec(hidden=(18, 7), activation="sigmoid", candidates=2),
        Spec(interaction="outer", activation="prelu", index_dtype=torch.int32),
        Spec(training=True),
        Spec(item_dim=1, category_dim=17, activation="relu", lengths=(0, 33)),
        Spec(item_dim=16, category_dim=16, softmax=True, lengths=(40,)),
        Spec(lengths=(0, 0), activation="sigmoid"),
    ],
    ids=str,
)
def test_parity(spec: Spec, backend: str, device: torch.device) -> None:
    check(make(spec, device), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, device: torch.device) -> None:
    check(make(Spec(dtype=dtype, activation="sigmoid", lengths=(3, 9)), device), "triton")


def test_float64_on_the_torch_backend() -> None:
    for interaction, softmax in itertools.product(("outer", "product"), (False, True)):
        check(make(Spec(dtype=torch.float64, interaction=interaction, softmax=softmax)), "torch")


def test_gradients_as_the_sparse_optimizer_takes_them() -> None:
    """One step of row-wise SGD from the unit's gradients equals the dense step."""
    import din_kernels

    problem = make(Spec())
    _, _, leaves, _ = problem.call("torch")
    table = torch.nn.Parameter(leaves[0].detach().clone())
    problem.arguments["item_table"] = table.detach()
    optimizer = din_kernels.optim.SparseSGD([table], lr=0.1)
    pooled, _, leaves, _ = problem.call("torch")
    grad = torch.autograd.grad((pooled * problem.grad_pooled.float()).sum(), leaves[0])[0]
    expected = table.detach() - 0.1 * grad.to_dense()
    table.grad = grad
    optimizer.step()
    torch.testing.assert_close(table.detach(), expected, rtol=1e-5, atol=1e-6)


def test_keys_are_never_written(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """On the Triton backend no tensor of the keys' size is made in forward: the stand-in has one element of memory."""
    made: list[Tensor] = []
    shape_only = function._shape_only

    def note(gathered: Any) -> Tensor:
        made.append(shape_only(gathered))
        return made[-1]

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("rows of the behaviours were gathered")

    monkeypatch.setattr(function, "_shape_only", note)
    gather = function.rows_of
    problem = make(Spec(candidates=2), device)
    queries = problem.arguments["query_item"].numel()
    monkeypatch.setattr(
        function, "rows_of", lambda a, b, ids, more: gather(a, b, ids, more) if ids.numel() == queries else refuse()
    )
    pooled, _, leaves, _ = problem.call("triton")
    torch.autograd.grad(pooled.sum(), leaves)
    assert len(made) == 2
    assert all(keys.untyped_storage().nbytes() == keys.element_size() for keys in made)


def test_candidates_alone_get_gradients_where_nothing_happened() -> None:
    problem = make(Spec(lengths=(0, 0), activation="sigmoid"))
    pooled, _, leaves, _ = problem.call("torch")
    assert torch.equal(pooled, torch.zeros_like(pooled))
    grad = torch.autograd.grad(pooled.sum(), leaves[0])[0]
    assert grad._values().shape[0] == 2


def test_frozen_tables_get_no_gradient() -> None:
    problem = make(Spec(activation="sigmoid"))
    ids = {k: v for k, v in problem.arguments.items() if not k.endswith("table")}
    unit = copy.deepcopy(problem.unit).float()
    linears = list(unit.linears)
    category = problem.arguments["category_table"].clone().requires_grad_()
    pooled = gathered_activation(
        **ids, item_table=problem.arguments["item_table"], category_table=category, weights=[m.weight for m in linears],
        biases=[m.bias for m in linears], offsets=problem.offsets, interaction="product", activation="sigmoid",
    )  # fmt: skip
    pooled.sum().backward()
    assert category.grad is not None
    assert category.grad.is_sparse


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key_item": torch.full((24,), 13)}, IndexError, "key_item must be below num_embeddings = 13"),
        ({"key_category": torch.full((24,), -1)}, IndexError, "key_category must not be negative"),
        ({"key_category": torch.zeros(23).long()}, ValueError, "key_category"),
        ({"query_item": torch.zeros(3, 2).long()}, ValueError, "query_category"),
        ({"query_item": torch.zeros(3)}, TypeError, "query_item"),
        ({"item_table": torch.zeros(5, 13).t()}, ValueError, "unit stride"),
        ({"category_table": torch.zeros(5, 3).double()}, TypeError, "category_table"),
        ({"item_table": torch.zeros(13, 6)}, ValueError, r"weights\[0\]"),
        ({"offsets": torch.tensor([0, 3, 3, 25])}, ValueError, r"offsets\[-1\]"),
        ({"offsets": torch.tensor([0, 3, 24])}, ValueError, "offsets"),
    ],
)
def test_arguments(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    problem = make(Spec())
    problem.offsets = changes.pop("offsets", problem.offsets)
    problem.arguments.update(changes)
    with pytest.raises(error, match=message):
        problem.call("torch")


def test_operators_pass_opcheck() -> None:
    problem = make(Spec(activation="sigmoid", lengths=(2, 3)))
    args, linears = problem.arguments, list(problem.unit.float().linears)
    query = function.rows_of(args["item_table"], args["category_table"], args["query_item"], args["query_category"])
    tensors = (
        args["item_table"], args["category_table"], args["key_item"], args["key_category"], query,
        problem.offsets[:-1], problem.offsets[1:], [m.weight.detach() for m in linears],
        [m.bias.detach() for m in linears], [None], [], [],
    )  # fmt: skip
    config = ("product", "sigmoid", False, 1.0, 1, 0, "ieee", "torch")
    torch.library.opcheck(function.forward_op, (*tensors, True, *config), test_utils=("test_schema", "test_faketensor"))
    pooled, weights, _ = function.forward_op(*tensors, True, *config)
    torch.library.opcheck(
        function.backward_op, (torch.ones_like(pooled), None, pooled, weights, None, None, *tensors, *config),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
