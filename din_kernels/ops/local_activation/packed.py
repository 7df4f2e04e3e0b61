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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._backend import interpreting
from ..._launch import FUSED, launch, on_device
from . import kernels_packed_forward as kernels
from . import kernels_packed_fp32 as kernels_fp32
from . import kernels_packed_tables as kernels_tables
from .first_layer import take_apart
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
    device, queries = tensors.keys.device, tensors.query.shape[0]
    tiles = -(-most_slots(config, tensors) // TILE)
    blocks = -(-(queries + 1 + SEGMENTS) // TABLE_BLOCK)
    slot_query, slot_row, tile_first, first_slot = (
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (tiles * TILE, tiles * TILE, tiles + 1, queries + 1 + SEGMENTS)
    )
    tables, summed = Tables(first_slot, tile_first, slot_query, slot_row, tiles), blocks > FEW_BLOCKS
    operands = {
        **tables.operands(), "starts": tensors.starts, "ends": tensors.ends,
        "sums": torch.empty(blocks, dtype=torch.int32, device=device) if summed else first_slot,
        "candidates": config.candidates, "queries": queries,
        "BLOCK": TABLE_BLOCK, "BLOCK_SUMS": 128, "SUMMED": summed,
    }  # fmt: skip
    if summed:
        launch(kernels_tables.sum_slots, (blocks,), operands, num_warps=4)
    launch(kernels_tables.make_tables, (blocks,), operands, num_warps=4)
    launch(kernels_tables.fill_slots, (min(tiles, num_programs(device, 16)),), operands, num_warps=4)
    return tables


def shape_constants(config: UnitConfig) -> dict[str, Any]:
    widths = widths_of(config)
    return {
        "D": config.embedding_dim, "AD": widths.ad, "RD": widths.rd,
        "H1": config.hidden_units[0], "A1": widths.a1, "R1": widths.r1,
        "H2": config.hidden_units[1] if len(config.hidden_units) > 1 else 0, "A2": widths.a2, "R2": widths.r2,
        "ACT": ACTIVATION_CODES[config.activation],
        "HOIST": widths.a1 + widths.r1 + widths.a2 + widths.r2 <= 64,
    }  # fmt: skip


@functools.cache
def fast_instructions() -> bool:
    """Whether kernels may name NVIDIA's instructions: not in the interpreter, nor on AMD."""
    return torch.version.hip is None and not interpreting()


def kernel_precision(config: UnitConfig, dtype: torch.dtype) -> str:
    """Products of fp32 by tf32 where asked for; else as three of them, which is as accurate as fp32."""
    if dtype != torch.float32:
        return "ieee"  # 16-bit products are exact
    return "tf32" if config.precision == "tf32" else "tf32x3"


@functools.lru_cache(maxsize=256)
def _constants(
    config: UnitConfig, dtype: torch.dtype, capability: int, biases: int, contiguous: bool
) -> dict[str, Any]:  # fmt: skip
    """What is compiled into the kernels that take the operands of ``Packed``; ``biases``: bit l for layer l."""
    return {
        **shape_constants(config), "BIASES": biases, "FAST": fast_instructions(), "CONTIGUOUS": contiguous,
        "WGMMA": capability >= 90, "PRECISION": kernel_precision(config, dtype),
    }  # fmt: skip


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
        return config.embedding_dim <= 64
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


@functools.lru_cache(maxsize=256)
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

    def operands(self) -> dict[str, Any]:
        """Tables, layers and what is compiled in; the statistics of the layers that are known by now."""
        mean1, mean2 = self._of_two(self.tensors.means)
        rstd1, rstd2 = self._of_two(self.tensors.rstds)
        return {**self._known, "mean1": mean1, "mean2": mean2, "rstd1": rstd1, "rstd2": rstd2}

    def _of_two(self, values: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Those of the first layer and of the second; one that does not exist repeats another, and is not read."""
        nothing = self.tensors.weights[0]
        given = [nothing if value is None else value.contiguous() for value in values]
        return (given[0] if given else nothing), (given[1] if len(given) > 1 else nothing)

    @functools.cached_property
    def _known(self) -> dict[str, Any]:
        """All but the statistics."""
        tensors = self.tensors
        *of_layers, bias_out = tensors.biases
        bias1, bias2 = self._of_two(of_layers)
        alphas = zip(tensors.alphas, self.config.hidden_units, strict=True)
        alpha1, alpha2 = self._of_two([None if a is None else a.reshape(-1).expand(width) for a, width in alphas])
        return {
            "keys": tensors.keys, "query": self.query, "weight1": tensors.weights[0].contiguous(), "bias1": bias1,
            "alpha1": alpha1, "weight2": tensors.weights[1].contiguous(), "bias2": bias2, "alpha2": alpha2,
            "weight_out": tensors.weights[-1].contiguous(), "bias_out": self._of_two([bias_out])[0],
            "key_stride": tensors.keys.stride(0), "queries": self.queries, **self.tables.operands(), **self._constants(),
        }  # fmt: skip

    def weight_operands(self) -> dict[str, int]:
        """weight_index as strides of (row, candidate, list)."""
        candidates, padded = self.config.candidates, self.config.padded_length
        if padded:
            strides = {"weight_row": 1, "weight_candidate": padded, "weight_list": padded * (candidates - 1)}
        else:
            strides = {"weight_row": candidates, "weight_candidate": 1, "weight_list": 0}
        return {"candidates": candidates, **strides}

    def _constants(self) -> dict[str, Any]:
        keys = self.tensors.keys
        biases = sum([1 << layer for layer, bias in enumerate(self.tensors.biases) if bias is not None])
        return _constants(self.config, keys.dtype, capability_of(keys.device), biases, is_contiguous(keys))


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
    queries, dim = sums.shape
    softmax = carry_softmax is not None
    operands = {
        "carry": carry, "carry_softmax": carry_softmax if softmax else carry, "first_slot": tables.first_slot,
        "pooled": sums, "log_normaliser": log_normaliser if softmax else sums, "queries": queries,
        "D": dim, "BLOCK_D": next_power_of_two(dim), "LISTS": FINISH_LISTS, "SOFTMAX": softmax,
    }  # fmt: skip
    launch(kernels.finish_packed, (-(-queries // FINISH_LISTS),), operands, **finish_options())


def forward(
    config: UnitConfig, tensors: UnitTensors, *, return_weights: bool, call: Packed | None = None
) -> UnitOutputs:
    """``call``: what the statistics prepared, if they did."""
    keys, queries, dim = tensors.keys, tensors.query.shape[0], config.embedding_dim
    device, softmax = keys.device, config.softmax
    pooled = torch.empty(queries, dim, dtype=keys.dtype, device=device)
    log_normaliser = torch.empty(queries, dtype=torch.float32, device=device) if softmax else None
    pairs = keys.shape[0] * config.candidates
    weights = keys.new_zeros(pairs) if return_weights else None
    attention = weights
    if softmax and return_weights:
        attention = torch.empty(pairs, dtype=torch.float32, device=device)
    with on_device(keys):
        call = call or Packed(config, tensors)
        tiles = call.tables.tiles
        carry = torch.empty(2 * tiles, dim, dtype=torch.float32, device=device)
        carry_softmax = torch.empty(2 * tiles, 2, dtype=torch.float32, device=device) if softmax else None
        programs = max(1, min(tiles, num_programs(device, 4)))
        operands: dict[str, Any] = {
            **call.operands(), **call.weight_operands(),
            "pooled": pooled, "log_normaliser": carry if log_normaliser is None else log_normaliser,
            "carry": carry, "carry_softmax": carry if carry_softmax is None else carry_softmax,
            "attention": pooled if attention is None else attention, "scale": float(config.scale),
            "SOFTMAX": softmax, "HAS_ATTENTION": return_weights,
        }  # fmt: skip
        if keys.dtype == torch.float32:
            operands |= {"offset": take_apart(config, tensors).offset, **fp32_constants(config)}
            launch(kernels_fp32.forward_packed_fp32, (programs,), operands, **FP32_OPTIONS)
        else:
            launch(kernels.forward_packed, (programs,), operands, **launch_options(config))
        finish_lists(call.tables, carry, pooled, carry_softmax, log_normaliser)
        if weights is not None and softmax:
            of_weights = {**operands, "scores": attention, "weights": weights}
            launch(kernels.normalise_packed, (programs,), of_weights, num_warps=4)
    return UnitOutputs(pooled, weights, log_normaliser)
