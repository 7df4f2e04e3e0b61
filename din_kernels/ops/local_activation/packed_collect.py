"""Launches of ``kernels_collect.py``: gradients from what the packed backward kernels have summed up."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._launch import launch, on_device
from .packed import finish_options, next_power_of_two
from .problem import UnitConfig, UnitGradients, UnitTensors
from .universal import num_programs

LOG2_E = 1.4426950408889634
BLOCK_Q, BLOCK = 32, 64


def precision() -> str:
    """Three products of tf32, which are as accurate as fp32 and leave room in the registers; AMD has the room."""
    return "tf32x3" if torch.version.hip is None else "ieee"


def columns(width: int) -> int:
    """Columns of the embedding to a program of ``finish_queries``, so that it has the registers for so many channels."""
    return 16 if width > 64 else 32


def zeroed(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Zeros of these shapes, fp32, by one launch. Each begins at a multiple of 16 bytes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    steps = [-(-size // 4) * 4 for size in sizes]
    pieces = torch.zeros(sum(steps), device=device).split(steps)
    return [piece[:size].view(shape) for piece, size, shape in zip(pieces, sizes, shapes, strict=True)]


def vector_sizes(config: UnitConfig) -> list[int]:
    """Widths of the pieces of a row of ``vectors``: Σ ds · h, Σ ds, alphas."""
    widths = list(config.hidden_units)
    alphas = widths if config.activation in ("prelu", "dice") else []
    return [widths[-1], 1, *alphas]


def collect(
    config: UnitConfig, tensors: UnitTensors, grad_keys: Tensor, list_sums: Tensor, first_sums: Tensor,
    second_sums: Tensor, second_vectors: Tensor, vectors: Tensor,
) -> UnitGradients:  # fmt: skip
    """``list_sums`` [Q, D + H1] and the programs' sums (see ``finish_gradients``) to gradients in their parameters' dtypes."""
    from . import kernels_collect as kernels

    dim, widths = config.embedding_dim, config.hidden_units
    first, second = (*widths, 0)[:2]
    device, queries = list_sums.device, list_sums.shape[0]

    def like(parameter: Tensor) -> Tensor:
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)

    query = tensors.query.contiguous()
    grad_query = like(query)
    block = columns(first)
    parts = min(-(-queries // BLOCK_Q), num_programs(device, 1))
    weight_parts = torch.empty(parts, first, dim, device=device)
    bias_parts = torch.empty(parts, first, device=device)
    weights = [like(weight) for weight in tensors.weights]
    biases = [None if bias is None else like(bias) for bias in tensors.biases]
    has_alpha = config.activation in ("prelu", "dice")
    # A slope that all channels share gets the sum over them.
    shared = [alpha is not None and alpha.numel() != width for alpha, width in zip(tensors.alphas, widths, strict=True)]
    alphas: list[Tensor | None] = [
        None if alpha is None else torch.empty(width, device=device) if one else like(alpha)
        for alpha, width, one in zip(tensors.alphas, widths, shared, strict=True)
    ]
    operands = {
        "first_sums": first_sums, "second_sums": second_sums, "second_vectors": second_vectors, "vectors": vectors,
        "weight_parts": weight_parts, "bias_parts": bias_parts, "weight1": weights[0], "weight2": weights[1],
        "weight_out": weights[-1], "bias1": biases[0], "bias2": biases[1], "bias_out": biases[-1],
        "alpha1": alphas[0], "alpha2": alphas[-1], "programs": vectors.shape[0], "query_programs": parts,
        # For sigmoid dz2 is stored for weights multiplied by −log₂e.
        "unscale": -LOG2_E if config.activation == "sigmoid" else 1.0,
        "D": dim, "H1": first, "H2": second, "BLOCK": BLOCK, "HAS_ALPHA": has_alpha,
        "BIASES": sum(1 << layer for layer, bias in enumerate(biases) if bias is not None),
    }  # fmt: skip
    absent = {name: vectors for name, value in operands.items() if value is None}
    grid = first * -(-dim // BLOCK) + -(-second * first // BLOCK) + -(-max(vectors.shape[1], *widths) // BLOCK)
    with on_device(list_sums):
        kernels.finish_queries[(parts, -(-dim // block))](
            list_sums, query, tensors.weights[0].contiguous(), grad_query, weight_parts, bias_parts, queries,
            D=dim, BLOCK_D=block, H=first, BLOCK_H=next_power_of_two(first), BLOCK_Q=BLOCK_Q,
            PRECISION=precision(), num_warps=4,
        )  # fmt: skip
        launch(kernels.finish_gradients, (grid,), operands | absent, **finish_options())
    for layer, (alpha, one) in enumerate(zip(tensors.alphas, shared, strict=True)):
        if one:
            value = alphas[layer]
            assert alpha is not None
            assert value is not None
            alphas[layer] = value.sum().to(alpha.dtype).view(alpha.shape)
    return UnitGradients(grad_query, grad_keys, weights, biases, alphas)
