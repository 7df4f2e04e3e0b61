"""The tiled Triton path of the local activation unit: one list at a time, with its first layer on chip.

Either interaction, one or two hidden layers, every activation, softmax or none, candidates, any lengths, masks. Launches
of ``kernels_tiled_forward.py``; the idea is told in ``kernels_tiled_common.py``. Of the product interaction the packed
path takes short lists (``prefers``); what would not fit into registers (``fits``) is left to the universal one. Nothing is
read back from the device, and sums are taken in an order that lengths alone decide. A NaN among the real behaviours of
a list stays in that list.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from . import kernels_tiled_forward as kernels
from . import packed
from .dice_statistics import Moments, merge
from .factorise import FirstLayer
from .first_layer import take_apart
from .items import MAX_ITEM_ROWS, make_items
from .problem import UnitConfig, UnitOutputs, UnitTensors
from .universal import (
    FORWARD_WARPS,
    PARAMETER_VECTORS,
    Prepared,
    Tiling,
    capability_of,
    combine_items,
    normalise_weights,
    num_programs,
)

ITEM_ROWS = 64  # rows of a chunk are a multiple of this
LOG2_E = 1.4426950408889634

# Average length from which lists of the product interaction are worth a matrix of their own. Making it costs an item 450
# to 750 instructions in each of four warps, and half a tile, 32 rows, goes empty besides; it saves 15 (80-40, sigmoid) to
# 35 (36, Dice) of the packed kernel's 32 to 75 instructions a row. On sm_90 they are even at 70 to 215 rows.
PREFERRED_LENGTH = 160
# Average length below which a tile has 16 rows and one warp to itself, where that fits. A row then takes as many
# instructions, but an item's matrix (outer, 36, of 64 columns) 380 instead of four times 290, and half a tile is 8 rows
# instead of 32. What speaks for four warps, twice as many of them on a processor, counts where tiles follow each other.
SHORT_LENGTH = 128


@dataclass(frozen=True)
class Form:
    """Compile-time form of the kernels: rows of a tile, warps that share it, and whether the product that sums it is tall
    (``kernels_tiled_forward.no_sum``)."""

    rows: int = 64
    num_warps: int = 4
    tall: bool = False


LONG, SHORT = Form(), Form(rows=16, num_warps=1)


def long_form(config: UnitConfig, capability: int) -> Form:
    """AMD counts as 80, but is better off with the flat product, and so is the one case in which the tall one spills."""
    spills = config.activation == "prelu" and config.embedding_dim > 64 and len(config.hidden_units) > 1
    return Form(tall=capability < 90 and torch.version.hip is None and not spills)


def average_length(config: UnitConfig, tensors: UnitTensors) -> int:
    """As far as shapes tell: padded lists are taken to be half full, but masks are walked from end to end."""
    if config.padded_length:
        return config.padded_length if tensors.row_mask is not None else config.padded_length // 2
    return tensors.keys.shape[0] // tensors.starts.numel()


def form_of(config: UnitConfig, tensors: UnitTensors) -> Form:
    if average_length(config, tensors) < SHORT_LENGTH and fits_short(config, tensors.keys.dtype):
        return SHORT
    return long_form(config, capability_of(tensors.keys.device))


def _channels(config: UnitConfig) -> tuple[int, int]:
    """Of the two layers, with padding."""
    widths = packed.widths_of(config)
    return widths.a1 + widths.r1, widths.a2 + widths.r2


def shape_constants(config: UnitConfig, form: Form) -> dict[str, Any]:
    """HOIST1, HOIST2: Dice keeps four vectors per channel and PReLU two, where others keep one; with two layers those of
    the first, and where the keys come in two blocks or the sum is tall those of the second too, would be too many.
    Keys of up to 64 columns come in one block: two, 32 + 16 for 36, save no instructions and take twice the registers."""
    first, second = _channels(config)
    long, short = config.embedding_dim > 64, first + second <= 64
    light = config.activation in ("sigmoid", "relu") or (config.activation == "prelu" and not (long and second))
    one_block = {} if long else {"AD": packed.next_power_of_two(config.embedding_dim), "RD": 0}
    return {
        **packed.shape_constants(config), **one_block, "T": form.rows, "VECTORS": PARAMETER_VECTORS[config.activation],
        "OUTER": config.interaction == "outer", "TALL": form.tall,
        "HOIST1": light or short or (not second and first <= 80),
        "HOIST2": light or short or not (form.tall or (long and config.uses_dice)),
    }  # fmt: skip


@functools.lru_cache(maxsize=256)
def launch_options(config: UnitConfig, dtype: torch.dtype, form: Form, *, statistics: bool = False) -> dict[str, int]:
    """Left alone, ptxas likes to spill a few bytes for the sake of one more program per processor; told that it may use all
    registers, it does not. Of narrow forward kernels before sm_90 it takes more than it needs, and three programs fit a
    processor if told not to."""
    options: dict[str, int] = {"num_warps": form.num_warps, "num_stages": 2, **FUSED}
    narrow = dtype != torch.float32 and config.embedding_dim <= 64 and sum(_channels(config)) <= 48
    if torch.version.hip is None and (statistics or form == SHORT or (form.tall and dtype == torch.float32)):
        options["maxnreg"] = 255
    elif form.tall and narrow:
        options["maxnreg"] = 168
    return options


@functools.lru_cache(maxsize=256)
def fits(
    config: UnitConfig, dtype: torch.dtype, capability: int, *, masked: bool = False, attention: bool = False
) -> bool:
    """As ``packed.fits``, for the tiled forward kernel: operands of fp32 take twice the place of 16-bit ones, products as
    exact as fp32 several times that, and what a mask or the writing of attention takes is there in all but the widest."""
    channels = sum(_channels(config))
    long, dice = config.embedding_dim > 64, config.uses_dice
    if config.embedding_dim > 128 or channels > 128:
        return False
    if dtype != torch.float32:
        return not (long and channels > 64 and (masked or (attention and dice)))
    if config.precision != "tf32" or long:
        return False
    if capability < 90:
        return channels <= 64 and not masked and not (dice and _channels(config)[0] > 48)
    return channels <= (128 if config.activation in ("sigmoid", "relu") and not masked else 64)


def fits_short(config: UnitConfig, dtype: torch.dtype) -> bool:
    """Whether one warp has the registers for what ``SHORT`` lets it hold of the matrices."""
    return dtype != torch.float32 and sum(_channels(config)) <= 48


def fits_statistics(
    config: UnitConfig, dtype: torch.dtype, capability: int, layer: int, *, masked: bool = False
) -> bool:
    """Moments take two registers a channel and row besides, and before sm_90 the matrices' operands take some."""
    first, second = _channels(config)
    if (capability < 90 or dtype == torch.float32) and not (first <= 64 if layer == 0 else first + second <= 96):
        return False
    return fits(config, dtype, capability, masked=masked) and (first, second)[layer] <= 96


def _can_serve(config: UnitConfig, tensors: UnitTensors) -> bool:
    if len(config.hidden_units) > 2 or tensors.gathered is not None:
        return False
    if tensors.query.shape[0] == 0 or tensors.keys.shape[0] == 0:
        return False
    return config.candidates * MAX_ITEM_ROWS <= packed.INT32  # weights of a chunk are numbered in 32 bits


def serves(config: UnitConfig, tensors: UnitTensors, *, attention: bool) -> bool:
    """Whether the tiled forward can take this call; ``attention``: the weights are asked for."""
    keys, masked = tensors.keys, tensors.row_mask is not None
    capability = capability_of(keys.device)
    return _can_serve(config, tensors) and fits(config, keys.dtype, capability, masked=masked, attention=attention)


def prefers(config: UnitConfig, tensors: UnitTensors) -> bool:
    """Whether the tiled forward is faster than the packed one where both can serve."""
    return average_length(config, tensors) >= PREFERRED_LENGTH


def serves_statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> bool:
    keys, masked = tensors.keys, tensors.row_mask is not None
    if layer > 1 or not _can_serve(config, tensors):
        return False
    return fits_statistics(config, keys.dtype, capability_of(keys.device), layer, masked=masked)


def scaled_first_layer(config: UnitConfig, tensors: UnitTensors) -> FirstLayer:
    """As ``first_layer``, but for the outer interaction with A as the kernels want it: in the dtype of the keys and, for
    sigmoid, multiplied by −log₂e. It comes so out of the product that makes it, rounded once; of 16-bit parameters that
    product runs on the tensor cores and moves half the bytes."""
    dim, width = config.embedding_dim, config.hidden_units[0]
    query, dtype = tensors.query, tensors.keys.dtype
    if config.interaction == "product":
        shared, of_query, offset = take_apart(config, tensors)
        return FirstLayer(shared, of_query[:width], None, offset)
    if not tensors.weights[0].dtype == query.dtype == dtype:
        query = query.float()
    scale = -LOG2_E if config.activation == "sigmoid" else 1.0
    shared, of_query, offset = take_apart(config, tensors, query.dtype)
    matrix = torch.addmm(shared.view(-1), query, of_query[: width * dim].t(), beta=scale, alpha=scale)
    return FirstLayer(shared, None, matrix.to(dtype).view(-1, width, dim), offset)


def rows_per_item(config: UnitConfig, tensors: UnitTensors, programs: int) -> int:
    """Rows of a chunk: as many as leave an item to each program, for each chunk makes A anew."""
    pairs = tensors.keys.shape[0] * config.candidates
    rows = ITEM_ROWS
    while rows < MAX_ITEM_ROWS and rows * 2 * programs <= pairs:
        rows *= 2
    return rows


class Tiled(Prepared):
    """The operands of one call in the form the kernels read; ``layers``: of how many statistics are known."""

    def __init__(self, config: UnitConfig, tensors: UnitTensors, *, layers: int) -> None:
        self.config, self.tensors = config, tensors
        self.form = form_of(config, tensors)
        padded_dim = packed.next_power_of_two(config.embedding_dim)
        self.tiles = Tiling(self.form.rows, 0, (0, 0, 0), padded_dim, self.form.num_warps)
        self.first = scaled_first_layer(config, tensors)
        self.query = tensors.query.contiguous()
        self.lists = tensors.starts.numel()
        programs = num_programs(tensors.keys.device, min(8, FORWARD_WARPS // self.form.num_warps))
        self.items = make_items(config, tensors, rows_per_item(config, tensors, programs))
        self.most_programs = programs
        self.programs = max(1, min(programs, self.items.bound * config.candidates))
        self.known = layers
        self.params = self._parameters(layers)
        self.mask = tensors.keys if tensors.row_mask is None else tensors.row_mask.contiguous().view(torch.uint8)

    def launch(self, kernel: Any, **arguments: Any) -> None:
        keys = self.tensors.keys
        everything = {
            **self.layer_operands(), **self.weight_strides(), **shape_constants(self.config, self.form), **arguments,
            "HAS_MASK": self.tensors.row_mask is not None, "FAST": packed.fast_instructions(),
            "CONTIGUOUS": keys.is_contiguous(), "PRECISION": packed.kernel_precision(self.config, keys.dtype),
        }  # fmt: skip
        hoisted = everything["HOIST1"] and everything["HOIST2"]
        columns = 1 if hoisted else 3 * sum(self.config.hidden_units)
        gates = torch.empty(1 if hoisted else self.programs, columns, dtype=torch.float32, device=keys.device)
        options = launch_options(self.config, keys.dtype, self.form, statistics="LAYER" in arguments)
        launch(kernel, (self.programs,), {**everything, "gates": gates}, **options)


def moments_of_programs(call: Tiled, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``universal.moments_of_programs``."""
    device = call.tensors.keys.device
    counts = torch.empty(call.programs, dtype=torch.int64, device=device)
    means = torch.empty(call.programs, call.config.hidden_units[layer], dtype=torch.float32, device=device)
    m2s = torch.empty_like(means)
    with on_device(call.tensors.keys):
        call.launch(kernels.statistics_tiled, counts=counts, means=means, m2s=m2s, LAYER=layer)
    return counts, means, m2s


def statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> Moments:
    """As ``universal.statistics``."""
    return merge(*moments_of_programs(Tiled(config, tensors, layers=layer), layer))


def forward(
    config: UnitConfig, tensors: UnitTensors, *, return_weights: bool, call: Tiled | None = None
) -> UnitOutputs:
    """``call``: what the statistics prepared, if they did."""
    keys, queries, dim, softmax = tensors.keys, tensors.query.shape[0], config.embedding_dim, config.softmax
    pooled = torch.empty(queries, dim, dtype=keys.dtype, device=keys.device)
    log_normaliser = torch.empty(queries if softmax else 0, dtype=torch.float32, device=keys.device)
    pairs = keys.shape[0] * config.candidates
    weights = keys.new_zeros(pairs) if return_weights else None
    attention = weights
    if softmax and return_weights:
        attention = torch.empty(pairs, dtype=torch.float32, device=keys.device)
    call = call or Tiled(config, tensors, layers=len(config.hidden_units))
    call.know(len(config.hidden_units))
    several = call.items.slots > queries
    partial = torch.empty(call.items.slots if several else 1, dim, dtype=torch.float32, device=keys.device)
    partial_softmax = torch.empty(partial.shape[0] if softmax else 1, 2, dtype=torch.float32, device=keys.device)
    with on_device(keys):
        written = {
            "pooled": pooled, "log_normaliser": log_normaliser, "partial": partial, "partial_softmax": partial_softmax,
            "attention": pooled if attention is None else attention,
        }  # fmt: skip
        call.launch(
            kernels.forward_tiled, **written, scale=float(config.scale), SOFTMAX=softmax, HAS_ATTENTION=return_weights
        )
        if several:
            combine_items(call, written)
        if weights is not None and softmax:
            normalise_weights(call, {**written, "scores": attention, "weights": weights})
    return UnitOutputs(pooled, weights, log_normaliser if softmax else None)
