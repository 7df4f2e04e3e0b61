"""The kernels that take the first layer's weight apart and put its gradient together, and the one that adds up what programs
leave, against factorise.py in float64."""

from __future__ import annotations

import pytest
import torch

from din_kernels._launch import launch, on_device
from din_kernels.ops.local_activation import first_layer
from din_kernels.ops.local_activation.factorise import FirstLayerGradients, first_layer_backward
from din_kernels.ops.local_activation.factorise import first_layer as by_definition
from din_kernels.ops.local_activation.problem import UnitConfig, UnitTensors
from din_kernels.testing import assert_close
from tests.support.memory_monitor import memory_monitor

pytest.importorskip("triton")
from din_kernels.ops.local_activation import kernels_parameters

# Queries below, at and beyond a block; rows of columns below and beyond a block.
SIZES = [(1, 1, 1), (5, 3, 40), (33, 18, 36), (32, 32, 32), (70, 35, 9), (3, 64, 70)]


def problem(interaction: str, queries: int, dim: int, width: int, dtype: torch.dtype, bias: bool, device: torch.device):
    """(config, tensors in ``dtype``, the same in float64)."""
    generator = torch.Generator().manual_seed(3)
    columns = dim * (dim + 2) if interaction == "outer" else 4 * dim

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query, weight, vector = made(queries, dim), made(width, columns), made(width) if bias else None
    none = torch.empty(0, device=device)
    tensors = UnitTensors(query, none, none, none, None, [weight, weight], [vector, None], [None], [], [])
    exact = tensors._replace(
        query=query.double(), weights=[weight.double()] * 2, biases=[None if vector is None else vector.double(), None]
    )
    return UnitConfig(interaction, "sigmoid", dim, (width,)), tensors, exact


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("interaction", ["outer", "product"])
def test_parts(interaction, sizes, dtype, bias, device, poison_scratch):
    config, tensors, exact = problem(interaction, *sizes, dtype, bias, device)
    _, dim, width = sizes
    want = by_definition(config, exact)
    wide = first_layer.wide_first_layer(config, tensors)
    assert_close("offset", wide.layer.offset, want.offset, length=dim)
    assert_close("shared", wide.layer.shared, want.shared)
    if interaction == "outer":
        assert_close("matrix", wide.layer.matrix, want.matrix, length=dim)
        parts = first_layer.take_apart(config, tensors, dtype)  # copies are exact in any dtype
        of_outer, of_query = exact.weights[0][:, dim:].split([dim * dim, dim], dim=1)
        assert torch.equal(parts.of_query.double(), torch.cat([of_outer.reshape(-1, dim), of_query]))
        assert torch.equal(parts.shared.double(), exact.weights[0][:, :dim])
    else:
        assert torch.equal(wide.layer.product.double(), want.product)
        of_query, _, of_difference, _ = exact.weights[0].split([dim] * 4, dim=1)
        assert_close("to query", wide.of_query[width:], of_query + of_difference)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(sizes, dtype, bias, device, poison_scratch):
    config, tensors, exact = problem("outer", *sizes, dtype, bias, device)
    queries, dim, width = sizes
    sums = torch.randn(queries, width * dim + width, device=device)
    matrix, gamma = sums.double().split([width * dim, width], dim=1)
    want = first_layer_backward(config, exact, FirstLayerGradients(gamma, matrix=matrix.reshape(queries, width, dim)))
    found = first_layer.outer_gradients(config, tensors, first_layer.wide_first_layer(config, tensors), sums)
    assert (found[1] is None) == (want[1] is None) == (not bias)
    for name, got, expected in zip(("weight", "bias", "query"), found, want, strict=True):
        if got is not None:
            assert got.dtype == dtype
            assert_close(name, got, expected, length=max(queries, width * dim), stages=2, scale=1.0)


def test_memory():
    """In bounds, every number written once."""
    for interaction in ("outer", "product"):
        config, tensors, _ = problem(interaction, 33, 18, 36, torch.float32, True, torch.device("cpu"))
        with memory_monitor():
            wide = first_layer.wide_first_layer(config, tensors)
            if interaction == "outer":
                first_layer.outer_gradients(config, tensors, wide, torch.randn(33, 36 * 19))


@pytest.mark.parametrize("programs", [1, 16, 37])
def test_sums_of_programs(programs, device, poison_scratch):
    """Pieces of a row, in any order and dtype, some of them nobody's; the rest of the row is not read."""
    private = torch.randn(programs, 400, device=device)
    pieces = [(3, 64, torch.float32), (70, 65, torch.bfloat16), (200, 1, torch.float16), (201, 130, torch.float32)]
    wanted = torch.zeros(400, dtype=torch.bool, device=device)
    targets = []
    for begin, size, dtype in pieces:
        wanted[begin : begin + size] = True
        targets.append(torch.empty(size, dtype=dtype, device=device))
    private[:, ~wanted] = float("nan")
    operands = {
        "private": private, "targets": tuple(targets), "programs": programs, "ROW": 400,
        "PLACES": tuple(begin for begin, _, _ in pieces), "SIZES": tuple(size for _, size, _ in pieces), "BLOCK": 64,
    }  # fmt: skip
    with on_device(private):
        launch(kernels_parameters.scatter_parameters, (1 + 2 + 1 + 3,), operands, num_warps=4)
    for target, (begin, size, _) in zip(targets, pieces, strict=True):
        expected = private[:, begin : begin + size].double().sum(0)
        assert_close("sums", target, expected, length=programs, scale=programs**0.5)
