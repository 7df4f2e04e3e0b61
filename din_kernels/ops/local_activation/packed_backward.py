"""Launches of the packed backward kernels (``kernels_packed_backward.py``, ``kernels_packed_gradients.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from . import universal_backward
from .packed import TILE, Packed, finish_lists, next_power_of_two, serves, widths_of
from .packed_collect import collect, vector_sizes, zeroed
from .packed_sums import dice_sums, fits_sums, softmax_delta
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .universal import capability_of, num_programs

# Bytes of what one kernel leaves to the next (dz1, h1, dz2 of a batch of tiles): within the L2 cache of the GPUs this
# is for, 40 to 50 MB, with room for the rest.
BETWEEN_BYTES = 24 << 20

# Kernels with much to keep run without fetching ahead; the sums over rows, with two tiles ahead.
ROW_OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 1, **FUSED}
SUM_OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 3, **FUSED}


def fits(config: UnitConfig, dtype: torch.dtype, capability: int) -> bool:
    """As ``packed.fits``, for the backward kernels (``shipped.compile_cases`` holds them to it)."""
    widths = widths_of(config)
    channels = widths.a1 + widths.r1 + widths.a2 + widths.r2
    if dtype == torch.float32:
        return False
    if config.activation in ("dice", "prelu"):
        return channels <= 64
    return capability >= 90 or max(widths.a1, widths.a2) <= 64


def serves_backward(config: UnitConfig, tensors: UnitTensors) -> bool:
    """Whether the packed backward takes this call. Candidates share rows of keys, whose gradients would have to be
    added up."""
    if config.candidates > 1:
        return False
    return serves(config, tensors) and fits(config, tensors.keys.dtype, capability_of(tensors.keys.device))


def sum_columns(dim: int) -> int:
    """Columns of the embedding to a program of ``first_layer_sums``."""
    return min(64, next_power_of_two(dim))


def _batches(tiles: int, row_bytes: int) -> list[tuple[int, int]]:
    """(first, end) of batches of tiles."""
    size = max(1, BETWEEN_BYTES // (row_bytes * TILE))
    return [(first, min(first + size, tiles)) for first in range(0, tiles, size)]


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    """Gradients of everything; see torch_impl.backward."""
    from . import kernels_packed_backward as kernels
    from . import kernels_packed_gradients as after

    keys, dim, widths = tensors.keys, config.embedding_dim, config.hidden_units
    device, dtype, two = keys.device, keys.dtype, len(config.hidden_units) > 1
    blocks = widths_of(config)
    grad_pooled = grad_pooled.contiguous()
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    # Rows of padded keys beyond their list's length belong to no slot.
    make = torch.zeros if config.padded_length else torch.empty
    grad_keys = make(keys.shape, dtype=dtype, device=device)
    with on_device(keys):
        call = Packed(config, tensors)
        tables, queries = call.tables, call.queries
        width = dim + widths[0]
        list_sums = torch.empty(queries, width, device=device)
        carry = torch.empty(2 * tables.tiles, width, device=device)
        programs = max(1, min(tables.tiles, num_programs(device, 2)))
        first, second = (*widths, 0)[:2]
        vectors, first_sums, second_sums, second_vectors = zeroed(
            device, (programs, sum(vector_sizes(config))), (programs, 2, first, dim), (programs, second, first),
            (programs, second),
        )  # fmt: skip
        w1, w2 = blocks.a1 + blocks.r1, blocks.a2 + blocks.r2
        batches = _batches(tables.tiles, (w1 + two * (w1 + w2)) * dtype.itemsize)
        slots = (batches[0][1] - batches[0][0]) * TILE
        attention = torch.empty(slots, device=device)
        dz1 = torch.empty(slots, w1, dtype=dtype, device=device)
        h1 = torch.empty(slots, w1, dtype=dtype, device=device) if two else dz1
        dz2 = torch.empty(slots, w2, dtype=dtype, device=device) if two else dz1
        nothing = vectors
        block = sum_columns(dim)
        operands: dict[str, Any] = {
            **call.layer_operands(), **call.constants(), **tables.operands(),
            "grad_pooled": grad_pooled, "grad_weights": nothing if grad_weights is None else grad_weights,
            "log_normaliser": nothing if saved.log_normaliser is None else saved.log_normaliser.contiguous(),
            "delta": softmax_delta(call, saved, grad_pooled, grad_weights) if config.softmax else nothing,
            "attention": attention, "dz1": dz1, "h1": h1, "dz2": dz2, "grad_keys": grad_keys, "list_sums": list_sums,
            "carry": carry, "scale": float(config.scale), "SOFTMAX": config.softmax,
            "HAS_GRAD_WEIGHTS": grad_weights is not None, "BATCH_STATISTICS": inv_count is not None,
            "BLOCK_D": block, "H": widths[0], "A": blocks.a1, "R": blocks.r1,
        }  # fmt: skip
        sums = nothing
        if inv_count is not None:
            if fits_sums(config, dtype, capability_of(device)):
                sums = dice_sums(call, operands, inv_count)
            else:
                sums = universal_backward.dice_sums(config, tensors, saved, grad_pooled, grad_weights, inv_count)
        operands |= {"sums1": sums, "sums2": sums[2 * widths[0] :]}
        for first_tile, end_tile in batches:
            operands |= {"first_tile": first_tile, "end_tile": end_tile}
            launch(kernels.backward_scores, (programs,), {**operands, "vectors": vectors}, **ROW_OPTIONS)
            launch(after.backward_inputs, (programs,), operands, **ROW_OPTIONS)
            launch(
                after.first_layer_sums, (programs, -(-dim // block)), {**operands, "totals": first_sums}, **SUM_OPTIONS
            )
            if two:
                sums_of_two = {**operands, "totals": second_sums, "vectors": second_vectors}
                launch(after.second_layer_sums, (programs,), sums_of_two, **SUM_OPTIONS)
        finish_lists(tables, carry, list_sums)

    return collect(config, tensors, grad_keys, list_sums, first_sums, second_sums, second_vectors, vectors)
