"""The packed Triton path: the common shapes of the local activation unit, designed for what the GPU can do at best.

Product interaction, one or two hidden layers, every activation, softmax or none, candidates, any lengths; what it
leaves to the universal kernels is listed in ``serves``. Tiles of slots cross the borders of lists (see
kernels_packed_common.py), so work is balanced whatever the lengths are. Nothing is read back from the device, and sums
are taken in an order that lengths alone decide.

One thing to know: lists that share a tile are summed by one matrix product, and 0 · NaN is NaN. A NaN or infinity among
the *real* behaviours of one list can therefore show in its neighbours too. Padding may hold anything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._backend import interpreting
from ..._launch import FUSED, launch, on_device
from .factorise import first_layer
from .problem import UnitConfig, UnitOutputs, UnitTensors
from .universal import ACTIVATION_CODES, capability_of, num_programs

TILE, SEGMENTS, MIN_SLOTS = 64, 16, 5  # as in kernels_packed_common.py
TABLE_BLOCK = 1024  # query rows of a program that makes tables
FEW_BLOCKS = 8  # so many add up what comes before them themselves
FINISH_LISTS = 16
INT32 = 2**31 - 1


def next_power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())


def split(width: int) -> tuple[int, int]:
    """``width`` as two powers of two of at least 16, the second 0 where one is as good: 80 → (64, 16), 64 → (64, 0)."""
    whole = next_power_of_two(width)
    half = whole // 2
    if whole == 16 or width <= half:
        return whole, 0
    rest = next_power_of_two(width - half)
    return (half, rest) if rest < half else (whole, 0)


def split_dim(dim: int) -> tuple[int, int]:
    """The same for the embedding, of which no block is wider than 64 columns: operands of the tile are that wide."""
    return (64, 64) if split(dim) == (128, 0) else split(dim)


def split_dim_fp32(dim: int) -> tuple[int, int]:
    """For the kernel of fp32: 32 columns at a time, for which it has registers."""
    return (32, 32) if 32 < dim <= 64 else split_dim(dim)


@dataclass(frozen=True)
class Widths:
    """Block widths of the two layers (0, 0 where there is no second) and of the embedding."""

    a1: int
    r1: int
    a2: int
    r2: int
    ad: int
    rd: int


@functools.lru_cache(maxsize=256)
def widths_of(config: UnitConfig) -> Widths:
    second = split(config.hidden_units[1]) if len(config.hidden_units) > 1 else (0, 0)
    return Widths(*split(config.hidden_units[0]), *second, *split_dim(config.embedding_dim))


class Tables(NamedTuple):
    """See kernels_packed_common.py. tiles: most tiles there can be, from shapes alone."""

    first_slot: Tensor
    tile_first: Tensor
    slot_query: Tensor
    slot_row: Tensor
    tiles: int

    def operands(self) -> dict[str, Tensor]:
        return {
            "first_slot": self.first_slot, "tile_first": self.tile_first, "slot_query": self.slot_query,
            "slot_row": self.slot_row,
        }  # fmt: skip


def most_slots(config: UnitConfig, tensors: UnitTensors) -> int:
    """More slots than any lengths can take."""
    queries, rows = tensors.query.shape[0], tensors.keys.shape[0] * config.candidates
    if config.padded_length:
        return queries * max(config.padded_length, MIN_SLOTS)
    return rows + MIN_SLOTS * queries


def make_tables(config: UnitConfig, tensors: UnitTensors) -> Tables:
    from . import kernels_packed_tables as kernels

    device, queries = tensors.keys.device, tensors.query.shape[0]
    tiles = -(-most_slots(config, tensors) // TILE)
    blocks = -(-(queries + 1 + SEGMENTS) // TABLE_BLOCK)
    slot_query, slot_row, tile_first, first_slot, sums = (
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (tiles * TILE, tiles * TILE, tiles + 1, queries + 1 + SEGMENTS, blocks)
    )
    lists, summed = (tensors.starts, tensors.ends), blocks > FEW_BLOCKS
    if summed:
        kernels.sum_slots[(blocks,)](*lists, sums, config.candidates, queries, BLOCK=TABLE_BLOCK, num_warps=4)
    kernels.make_tables[(blocks,)](
        *lists, sums, first_slot, tile_first, config.candidates, queries,
        BLOCK=TABLE_BLOCK, BLOCK_SUMS=128, SUMMED=summed, num_warps=4,
    )  # fmt: skip
    kernels.fill_slots[(min(tiles, num_programs(device, 16)),)](
        *lists, first_slot, tile_first, slot_query, slot_row, config.candidates, queries, num_warps=4
    )
    return Tables(first_slot, tile_first, slot_query, slot_row, tiles)


def shape_constants(config: UnitConfig) -> dict[str, Any]:
    widths = widths_of(config)
    return {
        "D": config.embedding_dim, "AD": widths.ad, "RD": widths.rd,
        "H1": config.hidden_units[0], "A1": widths.a1, "R1": widths.r1,
        "H2": config.hidden_units[1] if len(config.hidden_units) > 1 else 0, "A2": widths.a2, "R2": widths.r2,
        "ACT": ACTIVATION_CODES[config.activation],
        "HOIST": widths.a1 + widths.r1 + widths.a2 + widths.r2 <= 64,
    }  # fmt: skip


def fast_instructions() -> bool:
    """Whether kernels may name NVIDIA's instructions: not in the interpreter, nor on AMD."""
    return torch.version.hip is None and not interpreting()


def kernel_precision(config: UnitConfig, dtype: torch.dtype) -> str:
    """Products of fp32 by tf32 where asked for; else as three of them, which is as accurate as fp32."""
    if dtype != torch.float32:
        return "ieee"  # 16-bit products are exact
    return "tf32" if config.precision == "tf32" else "tf32x3"


def fp32_constants(config: UnitConfig) -> dict[str, Any]:
    """Those of ``shape_constants`` and of the precision, for the forward kernel of fp32."""
    constants = shape_constants(config)
    del constants["HOIST"]
    block, rest = split_dim_fp32(config.embedding_dim)
    return {**constants, "AD": block, "RD": rest, "PRECISION": "tf32" if config.precision == "tf32" else "split"}


def is_contiguous(rows: Tensor) -> bool:
    """Whether kernels may take rows for D apart, with addresses in 32 bits."""
    return rows.is_contiguous() and rows.numel() <= INT32


@functools.lru_cache(maxsize=256)
def fits(config: UnitConfig, dtype: torch.dtype, capability: int) -> bool:
    """Whether the forward kernel of these widths keeps within the registers (``shipped.compile_cases`` holds it to that).

    Weights and inputs of fp32 take twice the place of 16-bit ones, and those split for products as exact as fp32 four
    times; so of fp32 only embeddings of up to 64 columns are here, and two layers only if each is one block. Dice keeps
    four vectors per channel where others keep one."""
    widths = widths_of(config)
    channels = widths.a1 + widths.r1 + widths.a2 + widths.r2
    if config.embedding_dim > 128 or channels > 128:
        return False
    if capability in (86, 89) and config.embedding_dim > 64:
        return False  # fetched ahead, wide rows take up to 132 of the 99 KB of shared memory that a block has there
    if dtype == torch.float32:
        light = config.precision == "tf32" or config.activation in ("sigmoid", "relu")
        whole = widths.r1 == widths.r2 == 0 and max(widths.a1, widths.a2) <= 64
        fitting = channels <= 48 or (whole and (channels <= 64 or light))
        # Rows that begin at odd addresses are loaded number by number, and each takes an address.
        steps = config.precision == "tf32" or config.embedding_dim <= 16 or config.embedding_dim % 4 == 0
        return config.embedding_dim <= 64 and capability >= 90 and fitting and steps
    if config.activation in ("dice", "prelu") and channels > 64 and (widths.r1 or widths.r2):
        return config.embedding_dim <= 64 and capability >= 90
    return True


def serves(config: UnitConfig, tensors: UnitTensors) -> bool:
    """Whether the packed forward takes this call; the universal kernels take all others."""
    return describes(config, tensors) and fits(config, tensors.keys.dtype, capability_of(tensors.keys.device))


def describes(config: UnitConfig, tensors: UnitTensors) -> bool:
    """Whether the call is of the kind that packed kernels know, and of a size that their indices can count."""
    keys, queries = tensors.keys, tensors.query.shape[0]
    if config.interaction != "product" or len(config.hidden_units) > 2 or tensors.row_mask is not None:
        return False
    if queries == 0 or keys.shape[0] == 0:
        return False
    slots = most_slots(config, tensors)
    carry = 2 * (slots // TILE + 1) * config.embedding_dim
    offset = queries * config.hidden_units[0]
    return max(slots, carry, offset, tensors.query.numel(), keys.shape[0]) <= INT32 - 2 * TILE


def launch_options(config: UnitConfig) -> dict[str, int]:
    """Two tiles ahead where registers allow, one otherwise."""
    light = shape_constants(config)["HOIST"] and not config.softmax
    return {"num_warps": 4, "num_stages": 3 if light else 2, **FUSED}


# The kernel of fp32 has no registers left to fetch ahead.
FP32_OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 1, **FUSED}


class Packed:
    """The operands of one call in the form the kernels read."""

    def __init__(self, config: UnitConfig, tensors: UnitTensors) -> None:
        self.config, self.tensors = config, tensors
        self.queries = tensors.query.shape[0]
        self.query = tensors.query.contiguous()
        with on_device(tensors.keys):
            self.tables = make_tables(config, tensors)

    def layer_operands(self) -> dict[str, Any]:
        """Parameters as they are; one that does not exist repeats another, and is not read."""
        tensors, two = self.tensors, len(self.config.hidden_units) > 1
        nothing = tensors.weights[0]

        def of(values: list[Tensor] | list[Tensor | None], layer: int) -> Tensor:
            value = values[layer] if layer < len(values) else None
            return nothing if value is None else value.contiguous()

        alphas = [
            None if a is None else a.reshape(-1).expand(width)
            for a, width in zip(tensors.alphas, self.config.hidden_units, strict=True)
        ]
        return {
            "keys": tensors.keys, "query": self.query,
            "weight1": tensors.weights[0].contiguous(), "bias1": of(tensors.biases, 0), "alpha1": of(alphas, 0),
            "mean1": of(tensors.means, 0), "rstd1": of(tensors.rstds, 0),
            "weight2": tensors.weights[1].contiguous(), "bias2": of(tensors.biases, 1) if two else nothing,
            "alpha2": of(alphas, 1), "mean2": of(tensors.means, 1), "rstd2": of(tensors.rstds, 1),
            "weight_out": tensors.weights[-1].contiguous(), "bias_out": of(tensors.biases, len(tensors.biases) - 1),
            "key_stride": tensors.keys.stride(0), "queries": self.queries,
        }  # fmt: skip

    def weight_operands(self) -> dict[str, int]:
        """weight_index as strides of (row, candidate, list)."""
        candidates, padded = self.config.candidates, self.config.padded_length
        if padded:
            strides = {"weight_row": 1, "weight_candidate": padded, "weight_list": padded * (candidates - 1)}
        else:
            strides = {"weight_row": candidates, "weight_candidate": 1, "weight_list": 0}
        return {"candidates": candidates, **strides}

    def constants(self) -> dict[str, Any]:
        biases = sum(1 << layer for layer, bias in enumerate(self.tensors.biases) if bias is not None)
        return {
            **shape_constants(self.config), "BIASES": biases, "FAST": fast_instructions(),
            "CONTIGUOUS": is_contiguous(self.tensors.keys), "WGMMA": capability_of(self.tensors.keys.device) >= 90,
            "PRECISION": kernel_precision(self.config, self.tensors.keys.dtype),
        }  # fmt: skip


def finish_options() -> dict[str, int]:
    """Left alone, ptxas spills a few bytes of some widths for the sake of more programs per processor."""
    return {"num_warps": 4, **({"maxnreg": 128} if torch.version.hip is None else {})}


def finish_lists(
    tables: Tables,
    carry: Tensor,
    sums: Tensor,
    carry_softmax: Tensor | None = None,
    log_normaliser: Tensor | None = None,
) -> None:
    """Complete ``sums`` [Q, D] of lists that lie in several tiles with what those left in ``carry`` [2 · tiles, D]."""
    from .kernels_packed_forward import finish_packed

    queries, dim = sums.shape
    softmax = carry_softmax is not None
    finish_packed[(-(-queries // FINISH_LISTS),)](
        carry, carry_softmax if softmax else carry, tables.first_slot, sums, log_normaliser if softmax else sums, queries,
        D=dim, BLOCK_D=max(16, next_power_of_two(dim)), LISTS=FINISH_LISTS, SOFTMAX=softmax, **finish_options(),
    )  # fmt: skip


def forward(
    config: UnitConfig, tensors: UnitTensors, *, return_weights: bool, call: Packed | None = None
) -> UnitOutputs:
    """``call``: what the statistics prepared, if they did."""
    from . import kernels_packed_forward as kernels
    from . import kernels_packed_fp32 as fp32_kernels

    keys, queries, dim = tensors.keys, tensors.query.shape[0], config.embedding_dim
    device, softmax = keys.device, config.softmax
    pooled = torch.empty(queries, dim, dtype=keys.dtype, device=device)
    log_normaliser = torch.empty(queries if softmax else 0, device=device)
    pairs = keys.shape[0] * config.candidates
    weights = keys.new_zeros(pairs) if return_weights else None
    attention = weights
    if softmax and return_weights:
        attention = torch.empty(pairs, device=device)
    with on_device(keys):
        call = call or Packed(config, tensors)
        tiles = call.tables.tiles
        carry = torch.empty(2 * tiles, dim, device=device)
        carry_softmax = torch.empty(2 * tiles if softmax else 1, 2, device=device)
        programs = max(1, min(tiles, num_programs(device, 4)))
        operands: dict[str, Any] = {
            **call.layer_operands(), **call.tables.operands(), **call.weight_operands(),
            "pooled": pooled, "log_normaliser": log_normaliser, "carry": carry, "carry_softmax": carry_softmax,
            "attention": pooled if attention is None else attention, "scale": float(config.scale),
            "SOFTMAX": softmax, "HAS_ATTENTION": return_weights, **call.constants(),
        }  # fmt: skip
        if keys.dtype == torch.float32:
            operands |= {"offset": first_layer(config, tensors).offset, **fp32_constants(config)}
            launch(fp32_kernels.forward_packed_fp32, (programs,), operands, **FP32_OPTIONS)
        else:
            launch(kernels.forward_packed, (programs,), operands, **launch_options(config))
        finish_lists(call.tables, carry, pooled, carry_softmax if softmax else None, log_normaliser)
        if weights is not None and softmax:
            kernels.normalise_packed[(programs,)](
                attention, log_normaliser, weights, **call.tables.operands(), queries=queries,
                **call.weight_operands(), num_warps=4,
            )  # fmt: skip
    return UnitOutputs(pooled, weights, log_normaliser if softmax else None)
