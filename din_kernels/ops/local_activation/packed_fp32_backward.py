"""Launches of the packed backward kernels of fp32 (``kernels_packed_fp32_backward.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from . import kernels_packed_fp32_backward as kernels
from .first_layer import take_apart
from .packed import TILE, Packed, describes, fp32_constants, next_power_of_two
from .packed_collect import Results, batches
from .packed_sums import score_operands, sums_of_layers
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .universal import capability_of, num_programs

# Told that they may use all registers, kernels do not spill a few bytes for the sake of one more program.
ROW_OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 1, "maxnreg": 255, **FUSED}
# The sums over rows fetch a tile ahead.
SUM_OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 2, "maxnreg": 255, **FUSED}


def fits(config: UnitConfig, capability: int) -> bool:
    """Whether the kernels keep within the registers (``shipped_packed_fp32.compile_cases`` holds them to it)."""
    dim = config.embedding_dim
    if capability < 80 or dim > 64 or max(config.hidden_units) > 64:
        return False
    # Rows that do not begin at multiples of 16 bytes take more addresses.
    if dim > 16 and dim % (4 if dim > 32 and capability < 90 else 2):
        return False
    channels = sum(map(next_power_of_two, config.hidden_units))
    if config.activation in ("dice", "prelu"):
        return channels <= 80
    return channels <= 96 or config.precision == "tf32"


def serves_backward(config: UnitConfig, tensors: UnitTensors) -> bool:
    """As ``packed_backward.serves_backward``, for fp32."""
    if tensors.keys.dtype != torch.float32 or config.candidates > 1:
        return False
    if torch.version.hip is not None or not describes(config, tensors):
        return False
    return fits(config, capability_of(tensors.keys.device))


def _whole(width: int) -> tuple[int, int]:
    """The block that holds a layer of ``width`` channels, and the columns of it that kernels hand on: what lies in memory
    is read in steps of 16 bytes."""
    return (next_power_of_two(width), -(-width // 4) * 4) if width else (0, 0)


def constants(config: UnitConfig) -> dict[str, Any]:
    """Those of the shapes and of the precision, for all kernels but the sums of the first layer."""
    first, second = (*config.hidden_units, 0)[:2]
    of_first, of_second = _whole(first), _whole(second)
    return {
        **fp32_constants(config), "A1": of_first[0], "W1": of_first[1], "A2": of_second[0], "W2": of_second[1],
    }  # fmt: skip


def input_columns(dim: int, capability: int) -> int:
    """Columns of the embedding to a program of ``backward_inputs_fp32``. Before sm_90 operands of products wait in
    registers."""
    return min(64 if capability >= 90 and dim % 4 == 0 else 32, next_power_of_two(dim))


def sum_constants(config: UnitConfig, capability: int) -> dict[str, int]:
    """Block of ``first_layer_sums_fp32``: no fewer than 64 channels, the rows of sm_90's wide products."""
    dim = config.embedding_dim
    columns = 32 if capability >= 90 or dim % 4 == 0 else 16
    return {
        "A1": max(64, next_power_of_two(config.hidden_units[0])), "BLOCK_D": min(columns, next_power_of_two(dim)),
    }  # fmt: skip


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
    device, two = keys.device, len(config.hidden_units) > 1
    grad_pooled = grad_pooled.contiguous()
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    with on_device(keys):
        call = Packed(config, tensors)
        tiles = call.tables.tiles
        programs = max(1, min(tiles, num_programs(device, 2)))
        results = Results(call, programs)
        shapes = constants(config)
        w1, w2 = shapes["W1"], shapes["W2"]
        parts = batches(tiles, 4 * (2 * w1 + two * (w1 + w2)), programs)
        slots = (parts[0][1] - parts[0][0]) * TILE
        z1, dz1 = torch.empty(2, slots, w1, dtype=torch.float32, device=device)
        h1 = torch.empty(slots, w1, dtype=torch.float32, device=device) if two else dz1
        dz2 = torch.empty(slots, w2, dtype=torch.float32, device=device) if two else dz1
        grad_attention, attention = torch.empty(2, slots, dtype=torch.float32, device=device)
        operands: dict[str, Any] = {
            **score_operands(call, saved, grad_pooled, grad_weights, inv_count), **results.operands(), **shapes,
            "offset": take_apart(config, tensors).offset,
            "z1": z1, "grad_attention": grad_attention, "attention": attention, "dz1": dz1, "h1": h1, "dz2": dz2,
        }  # fmt: skip

        def scores(batch: tuple[int, int], **others: Any) -> None:
            of_batch = {**operands, **others, "first_tile": batch[0], "end_tile": batch[1]}
            launch(kernels.backward_first_layer_fp32, (programs,), of_batch, **ROW_OPTIONS)
            launch(kernels.backward_scores_fp32, (programs,), of_batch, **ROW_OPTIONS)

        def gather(layer: int, known: dict[str, Tensor]) -> Tensor:
            gathered = torch.zeros(programs, 2 * widths[layer], dtype=torch.float32, device=device)
            for batch in parts:
                scores(batch, GATHER=layer, vectors=gathered, **known)
            return gathered

        if inv_count is not None:
            sums = sums_of_layers(widths, inv_count, gather)
            operands |= {"sums1": sums, "sums2": sums[2 * widths[0] :]}
        capability = capability_of(device)
        of_inputs = {**operands, "BLOCK_D": input_columns(dim, capability)}
        of_first = {**operands, "totals": results.first_sums, **sum_constants(config, capability)}
        of_second = {**operands, "totals": results.second_sums, "vectors": results.second_vectors}
        for batch in parts:
            scores(batch, GATHER=-1, vectors=results.vectors)
            for values in (of_inputs, of_first, of_second):
                values |= {"first_tile": batch[0], "end_tile": batch[1]}
            grid = (programs, -(-dim // of_inputs["BLOCK_D"]))
            launch(kernels.backward_inputs_fp32, grid, of_inputs, **ROW_OPTIONS)
            grid = (programs, -(-dim // of_first["BLOCK_D"]))
            launch(kernels.first_layer_sums_fp32, grid, of_first, **SUM_OPTIONS)
            if two:
                launch(kernels.second_layer_sums_fp32, (programs,), of_second, **SUM_OPTIONS)
        return results.gradients()
