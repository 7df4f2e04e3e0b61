"""Launches of ``kernels_first_layer.py``: what ``factorise.py`` states in torch, for the paths of Triton."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..._launch import launch, on_device
from . import kernels_first_layer as kernels
from .factorise import FirstLayer
from .parameters import like
from .problem import UnitConfig, UnitTensors

BLOCK_Q, BLOCK_H, BLOCK_D, BLOCK = 32, 32, 32, 1024


class Parts(NamedTuple):
    """shared [H1, D] and offset [Q, H1] as in ``FirstLayer``; of_query: [H1·D + H1, D], W_o by its rows (h, i) and then W_v
    (outer), or W_p [H1, D] and then W_q + W_d [H1, D] (product)."""

    shared: Tensor
    of_query: Tensor
    offset: Tensor


@functools.cache
def options() -> dict[str, int]:
    """Left alone, ptxas spills a few bytes of some widths for the sake of more programs per processor."""
    return {"num_warps": 4, **({"maxnreg": 255} if torch.version.hip is None else {})}


def take_apart(config: UnitConfig, tensors: UnitTensors, dtype: torch.dtype = torch.float32) -> Parts:
    """The weight's parts in ``dtype``."""
    dim, width, outer = config.embedding_dim, config.hidden_units[0], config.interaction == "outer"
    query, bias = tensors.query.contiguous(), tensors.biases[0]
    rest = width * (dim if outer else 1)
    shared = query.new_empty(width, dim, dtype=dtype)
    of_query = query.new_empty(rest + width, dim, dtype=dtype)
    offset = query.new_empty(query.shape[0], width, dtype=torch.float32)
    query_blocks = -(-query.shape[0] // BLOCK_Q)
    operands = {
        "query": query, "weight": tensors.weights[0].contiguous(), "bias": offset if bias is None else bias.contiguous(),
        "shared": shared, "rest": of_query, "to_query": of_query[rest:], "offset": offset, "queries": query.shape[0],
        "query_blocks": query_blocks, "D": dim, "H": width, "BLOCK_Q": BLOCK_Q, "BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D,
        "BLOCK": BLOCK, "OUTER": outer, "HAS_BIAS": bias is not None,
    }  # fmt: skip
    grid = query_blocks + width * -(-(dim * (dim + 2) if outer else dim) // BLOCK)
    with on_device(query):
        launch(kernels.take_apart, (grid,), operands, **options())
    return Parts(shared, of_query, offset)


class Wide(NamedTuple):
    """The first layer in fp32, and what its gradients are made with: ``query`` [Q, D] in fp32, ``of_query`` of ``Parts``."""

    layer: FirstLayer
    query: Tensor
    of_query: Tensor


def wide_first_layer(config: UnitConfig, tensors: UnitTensors) -> Wide:
    """As ``factorise.first_layer``."""
    dim, width = config.embedding_dim, config.hidden_units[0]
    shared, of_query, offset = take_apart(config, tensors)
    query = tensors.query.float()
    if config.interaction == "product":
        return Wide(FirstLayer(shared, of_query[:width], None, offset), query, of_query)
    matrix = torch.addmm(shared.view(1, -1), query, of_query[: width * dim].t())
    return Wide(FirstLayer(shared, None, matrix.view(-1, width, dim), offset), query, of_query)


def outer_gradients(
    config: UnitConfig, tensors: UnitTensors, first: Wide, sums: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of (first weight, first bias or None, query) in the dtypes of those tensors, outer interaction, from ``sums``
    [Q, H1·D + H1] = [G_q ; γ_q] of each query row (``FirstLayerGradients``)."""
    dim, width = config.embedding_dim, config.hidden_units[0]
    weight, bias = tensors.weights[0], tensors.biases[0]
    grad_weight = like(weight)
    grad_bias = None if bias is None else like(bias)
    operands = {
        "products": sums.t() @ first.query, "sums": sums.sum(0), "weight": grad_weight,
        "bias": grad_weight if grad_bias is None else grad_bias, "D": dim, "H": width, "BLOCK": BLOCK,
        "HAS_BIAS": bias is not None,
    }  # fmt: skip
    with on_device(weight):
        launch(kernels.put_together, (width, -(-dim * (dim + 2) // BLOCK)), operands, num_warps=4)
    return grad_weight, grad_bias, (sums @ first.of_query).to(tensors.query.dtype)
