"""The first layer, taken apart so that neither the concatenation nor the outer product ever exists.

For a query row v and a behaviour e the first linear layer is affine in e: ``z1 = c + A e`` with

    product   features [v, e, v − e, v ∘ e]:      A = (W_k − W_d) + W_p diag(v)        c = (W_q + W_d) v + b
    outer     features [e, vec(e ⊗ v), v]:        A[h, i] = W_e[h, i] + Σ_j W_o[h, i, j] v[j]     c = W_v v + b

so a behaviour costs D·H multiplications (2·D·H as rows [e ; v ∘ e]) instead of 4·D·H or D²·H. What remains per query
row is one small matrix product, left to the vendor's GEMM. Everything here is fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import UnitConfig, UnitTensors


class FirstLayer(NamedTuple):
    """shared [H1, D]: the part of A common to all queries (W_k − W_d, or W_e);
    product [H1, D]: W_p, None for the outer interaction;
    matrix [Q, H1, D]: A of every query row, None for the product interaction (formed on the fly);
    offset [Q, H1]: c."""

    shared: Tensor
    product: Tensor | None
    matrix: Tensor | None
    offset: Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def first_layer(config: UnitConfig, tensors: UnitTensors) -> FirstLayer:
    dim, width = config.embedding_dim, config.hidden_units[0]
    weight, query = _wide(tensors.weights[0]), _wide(tensors.query)
    bias = tensors.biases[0]
    if config.interaction == "product":
        of_query, of_key, of_difference, of_product = weight.split_with_sizes([dim] * 4, dim=1)
        shared, product, matrix = of_key - of_difference, of_product, None
        to_offset = of_query + of_difference
    else:
        shared, of_outer, to_offset = weight.split_with_sizes([dim, dim * dim, dim], dim=1)
        product = None
        # [H·D, D] @ [D, Q]: one GEMM for all query rows.
        matrix = torch.addmm(shared.reshape(1, -1), query, of_outer.reshape(width * dim, dim).t())
        matrix = matrix.view(-1, width, dim)
    offset = query @ to_offset.t() if bias is None else torch.addmm(_wide(bias), query, to_offset.t())
    return FirstLayer(shared, product, matrix, offset)


class FirstLayerGradients(NamedTuple):
    """What a backend's backward hands back about the first layer.

    offset   γ [Q, H1]: Σ_j dz_j per query row
    shared   [H1, D]: Σ_q G_q with G_q = Σ_j dz_j e_jᵀ          (product interaction only)
    product  [H1, D]: Σ_q G_q diag(v_q)                         (product interaction only)
    query    [Q, D]: Σ_j (W_pᵀ dz_j) ∘ e_j                       (product interaction only)
    matrix   [Q, H1, D]: G_q                                    (outer interaction only)
    """

    offset: Tensor
    shared: Tensor | None = None
    product: Tensor | None = None
    query: Tensor | None = None
    matrix: Tensor | None = None


def first_layer_backward(
    config: UnitConfig, tensors: UnitTensors, grads: FirstLayerGradients
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of (first weight, first bias or None, query) in the dtypes of those tensors."""
    dim, width = config.embedding_dim, config.hidden_units[0]
    weight, query = _wide(tensors.weights[0]), _wide(tensors.query)
    gamma = grads.offset
    gamma_query = gamma.t() @ query  # Σ_q γ_q v_qᵀ [H1, D]
    if config.interaction == "product":
        assert grads.shared is not None
        assert grads.product is not None
        assert grads.query is not None
        of_query, _, of_difference, _ = weight.split_with_sizes([dim] * 4, dim=1)
        grad_weight = torch.cat([gamma_query, grads.shared, gamma_query - grads.shared, grads.product], dim=1)
        grad_query = torch.addmm(grads.query, gamma, of_query + of_difference)
    else:
        assert grads.matrix is not None
        _, of_outer, of_query = weight.split_with_sizes([dim, dim * dim, dim], dim=1)
        flat = grads.matrix.reshape(-1, width * dim)
        grad_outer = (flat.t() @ query).view(width, dim * dim)
        grad_weight = torch.cat([grads.matrix.sum(0), grad_outer, gamma_query], dim=1)
        grad_query = torch.addmm(gamma @ of_query, flat, of_outer.reshape(width * dim, dim))
    bias = tensors.biases[0]
    grad_bias = None if bias is None else gamma.sum(0).to(bias.dtype)
    return grad_weight.to(tensors.weights[0].dtype), grad_bias, grad_query.to(tensors.query.dtype)
