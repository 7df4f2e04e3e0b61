"""Launches of the packed backward kernels of fp32 (``kernels_packed_fp32_backward.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from .factorise import first_layer
from .packed import TILE, Packed, describes, finish_lists, fp32_constants, next_power_of_two
from .packed_backward import BETWEEN_BYTES
from .packed_collect import collect, vector_sizes, zeroed
from .packed_sums import softmax_delta
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


def batches(tiles: int, row_bytes: int, programs: int) -> list[tuple[int, int]]:
    """(first, end) of batches of tiles, a whole number of them for each program where there are that many."""
    size = max(1, BETWEEN_BYTES // (row_bytes * TILE))
    if size > programs:
        size -= size % programs
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
    from . import kernels_packed_fp32_backward as kernels

    keys, dim, widths = tensors.keys, config.embedding_dim, config.hidden_units
    device, two = keys.device, len(config.hidden_units) > 1
    grad_pooled = grad_pooled.contiguous()
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    # Rows of padded keys beyond their list's length belong to no slot.
    make = torch.zeros if config.padded_length else torch.empty
    grad_keys = make(keys.shape, device=device)
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
        shapes = constants(config)
        w1, w2 = shapes["W1"], shapes["W2"]
        parts = batches(tables.tiles, 4 * (2 * w1 + two * (w1 + w2)), programs)
        slots = (parts[0][1] - parts[0][0]) * TILE
        z1, dz1 = torch.empty(2, slots, w1, device=device)
        h1 = torch.empty(slots, w1, device=device) if two else dz1
        dz2 = torch.empty(slots, w2, device=device) if two else dz1
        grad_attention, attention = torch.empty(2, slots, device=device)
        # Dice's two sums of every layer, times 1 / count: [H1, H1, H2, H2] flat.
        sums = torch.zeros(2 * sum(widths), device=device)
        nothing = vectors
        operands: dict[str, Any] = {
            **call.layer_operands(), **tables.operands(), **call.constants(), **shapes,
            "offset": first_layer(config, tensors).offset, "grad_pooled": grad_pooled,
            "grad_weights": nothing if grad_weights is None else grad_weights,
            "log_normaliser": nothing if saved.log_normaliser is None else saved.log_normaliser.contiguous(),
            "delta": softmax_delta(call, saved, grad_pooled, grad_weights) if config.softmax else nothing,
            "sums1": sums, "sums2": sums[2 * first :],
            "z1": z1, "grad_attention": grad_attention, "attention": attention, "dz1": dz1, "h1": h1, "dz2": dz2,
            "vectors": vectors, "grad_keys": grad_keys, "list_sums": list_sums, "carry": carry,
            "scale": float(config.scale), "SOFTMAX": config.softmax, "HAS_GRAD_WEIGHTS": grad_weights is not None,
            "BATCH_STATISTICS": inv_count is not None, "GATHER": -1,
        }  # fmt: skip

        def scores(**others: Any) -> None:
            launch(kernels.backward_first_layer_fp32, (programs,), operands, **ROW_OPTIONS)
            launch(kernels.backward_scores_fp32, (programs,), {**operands, **others}, **ROW_OPTIONS)

        if inv_count is not None:
            # Of the top layer first: what comes down to the one below has the top's in it.
            for layer in reversed(range(len(widths))):
                before, size = 2 * sum(widths[:layer]), 2 * widths[layer]
                gathered = torch.zeros(programs, size, device=device)
                for first_tile, end_tile in parts:
                    operands |= {"first_tile": first_tile, "end_tile": end_tile}
                    scores(GATHER=layer, vectors=gathered)
                torch.mul(gathered.sum(0), inv_count, out=sums[before : before + size])
        capability = capability_of(device)
        of_inputs = {**operands, "BLOCK_D": input_columns(dim, capability)}
        of_first = {**operands, "totals": first_sums, **sum_constants(config, capability)}
        of_second = {**operands, "totals": second_sums, "vectors": second_vectors}
        for first_tile, end_tile in parts:
            for values in (operands, of_inputs, of_first, of_second):
                values |= {"first_tile": first_tile, "end_tile": end_tile}
            scores()
            grid = (programs, -(-dim // of_inputs["BLOCK_D"]))
            launch(kernels.backward_inputs_fp32, grid, of_inputs, **ROW_OPTIONS)
            grid = (programs, -(-dim // of_first["BLOCK_D"]))
            launch(kernels.first_layer_sums_fp32, grid, of_first, **SUM_OPTIONS)
            if two:
                launch(kernels.second_layer_sums_fp32, (programs,), of_second, **SUM_OPTIONS)
        finish_lists(tables, carry, list_sums)
    return collect(config, tensors, grad_keys, list_sums, first_sums, second_sums, second_vectors, vectors)
