"""Launches of the packed backward kernels (``kernels_packed_backward.py``, ``kernels_packed_gradients.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from . import kernels_packed_backward as kernels
from . import kernels_packed_gradients as after
from . import packed
from .packed import TILE, Packed, next_power_of_two, serves, widths_of
from .packed_collect import Results, batches
from .packed_sums import dice_sums, hands_on, score_operands
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .universal import capability_of, num_programs

# Kernels with much to keep run without fetching ahead; the sums over rows, with two tiles ahead.
ROW_OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 1, **FUSED}
SUM_OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 3, **FUSED}


def fits(config: UnitConfig, dtype: torch.dtype, capability: int) -> bool:
    """As ``packed.fits``, for the backward kernels (``shipped.compile_cases`` holds them to it)."""
    if dtype == torch.float32 or not packed.fits(config, dtype, capability):
        return False
    widths = widths_of(config)
    narrow = max(widths.a1, widths.a2) <= 64
    return narrow or (capability >= 90 and config.activation in ("sigmoid", "relu"))


def serves_backward(config: UnitConfig, tensors: UnitTensors) -> bool:
    """Whether the packed backward takes this call. Candidates share rows of keys, whose gradients would have to be
    added up."""
    if config.candidates > 1:
        return False
    return serves(config, tensors) and fits(config, tensors.keys.dtype, capability_of(tensors.keys.device))


def sum_columns(dim: int) -> int:
    """Columns of the embedding to a program of ``first_layer_sums``."""
    return min(64, next_power_of_two(dim))


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    """Gradients of everything; see torch_impl.backward."""
    keys, dim, widths = tensors.keys, config.embedding_dim, config.hidden_units
    device, dtype, two = keys.device, keys.dtype, len(config.hidden_units) > 1
    blocks = widths_of(config)
    grad_pooled = grad_pooled.contiguous()
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    with on_device(keys):
        call = Packed(config, tensors)
        tiles = call.tables.tiles
        programs = max(1, min(tiles, num_programs(device, 2)))
        results = Results(call, programs)
        w1, w2 = blocks.a1 + blocks.r1, blocks.a2 + blocks.r2
        parts = batches(tiles, (w1 + two * (w1 + w2)) * dtype.itemsize, programs)
        slots = (parts[0][1] - parts[0][0]) * TILE
        attention = torch.empty(slots, dtype=torch.float32, device=device)
        dz1 = torch.empty(slots, w1, dtype=dtype, device=device)
        h1 = torch.empty(slots, w1, dtype=dtype, device=device) if two else dz1
        dz2 = torch.empty(slots, w2, dtype=dtype, device=device) if two else dz1
        block = sum_columns(dim)
        operands: dict[str, Any] = {
            **score_operands(call, saved, grad_pooled, grad_weights, inv_count), **results.operands(),
            "attention": attention, "dz1": dz1, "h1": h1, "dz2": dz2,
            "BLOCK_D": block, "H": widths[0], "A": blocks.a1, "R": blocks.r1,
        }  # fmt: skip
        if inv_count is not None:
            if hands_on(config):
                operands["score_gradients"] = torch.empty(tiles * TILE, dtype=torch.float32, device=device)
            sums = dice_sums(call, operands, inv_count)
            operands |= {"sums1": sums, "sums2": sums[2 * widths[0] :]}
        for first_tile, end_tile in parts:
            operands |= {"first_tile": first_tile, "end_tile": end_tile}
            launch(kernels.backward_scores, (programs,), {**operands, "vectors": results.vectors}, **ROW_OPTIONS)
            launch(after.backward_inputs, (programs,), operands, **ROW_OPTIONS)
            grid = (programs, -(-dim // block))
            launch(after.first_layer_sums, grid, {**operands, "totals": results.first_sums}, **SUM_OPTIONS)
            if two:
                of_second = {**operands, "totals": results.second_sums, "vectors": results.second_vectors}
                launch(after.second_layer_sums, (programs,), of_second, **SUM_OPTIONS)
        return results.gradients()
