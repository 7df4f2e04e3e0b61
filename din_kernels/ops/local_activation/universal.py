"""The universal Triton path of the local activation unit: every option of the contract, any shape within ``limits``.

Three functions, as for every backend: ``statistics``, ``forward``, ``backward``. What they launch is described in
``kernels_universal_forward.py`` and ``kernels_universal_backward.py``; how work is shared out, in ``items.py``.
Nothing is read back from the device, and each result is the sum of parts in an order that shapes alone decide.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from . import kernels_parameters
from . import kernels_universal_forward as kernels
from .dice_statistics import Moments, merge
from .factorise import FirstLayer
from .first_layer import wide_first_layer
from .items import Items, make_items, rows_per_item
from .problem import UnitConfig, UnitOutputs, UnitTensors

ACTIVATION_CODES = {"sigmoid": 0, "relu": 1, "prelu": 2, "dice": 3}  # as in kernels_common.py
PARAMETER_VECTORS = {"sigmoid": 1, "relu": 1, "prelu": 2, "dice": 4}
COMBINE_BLOCK = 64  # columns of a program that adds up slots


@dataclass(frozen=True)
class Tiling:
    """Compile-time shape of the kernels: rows of a tile, columns of a block of the embedding and of each hidden layer
    (16 for layers that do not exist), and the embedding rounded up to a power of two."""

    rows: int
    dim: int
    hidden: tuple[int, int, int]
    padded_dim: int
    num_warps: int


def _power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())


def _block(width: int, cap: int) -> int:
    """Columns per block: one block where it fits; else the block that pads least, with a preference for few."""
    whole = _power_of_two(width)
    if whole <= cap:
        return whole
    half = cap // 2
    padded, padded_half = -(-width // cap) * cap, -(-width // half) * half
    return half if half >= 16 and padded_half * 5 <= padded * 4 else cap


def tiling(config: UnitConfig, dtype: torch.dtype, *, backward: bool = False, capability: int = 90) -> Tiling:
    """The largest tiles that do not spill (``shipped.compile_cases`` holds them to it); capability 80 is sm_80.

    Products in full fp32 run on the ordinary cores, from registers, so their tiles are small. tf32 operands take twice
    the registers of 16-bit ones. The backward kernel has some two hundred addresses, so eight warps share its tiles,
    and narrow blocks pad less of 36, 40 or 80 columns besides. Before sm_90 fewer addresses fit."""
    full, tf32 = (dtype == torch.float32 and config.precision == p for p in ("ieee", "tf32"))
    padded_dim = _power_of_two(config.embedding_dim)
    if backward:
        rows = 32 if full or (tf32 and capability < 90) else 64
        cap = 32 if full and capability >= 90 else 16
    else:
        rows = 32 if full or padded_dim > 128 or (padded_dim > 64 and capability < 90 and not tf32) else 64
        narrow = full or capability < 90 or (padded_dim > 128 and not tf32 and len(config.hidden_units) == 3)
        cap = (16 if tf32 else 32) if narrow else 64
    widths = [_block(h, cap) for h in config.hidden_units] + [16] * (3 - len(config.hidden_units))
    num_warps = 8 if tf32 or (backward and not full) else 4
    return Tiling(rows, _block(config.embedding_dim, cap), (widths[0], widths[1], widths[2]), padded_dim, num_warps)


def launch_options(tiles: Tiling, *, crowded: bool = False) -> dict[str, int]:
    """No software pipelining: operands that a program has just written must not be fetched ahead of the barrier.

    Left alone, ptxas likes to spill a few bytes for the sake of one more program per processor; told that it may
    use all registers, it does not. A ``crowded`` kernel of eight warps and long tiles needs them all anyway, and is
    scheduled better untold."""
    options: dict[str, int] = {"num_warps": tiles.num_warps, "num_stages": 1, **FUSED}
    if torch.version.hip is None and not (crowded and tiles.num_warps == 8 and tiles.rows == 64):
        options["maxnreg"] = 255
    return options


@functools.cache
def capability_of(device: torch.device) -> int:
    """90 for sm_90; the interpreter counts as such, AMD as 80, and sm_120, which has the instructions and the shared memory
    of sm_89, as that."""
    if device.type != "cuda":
        return 90
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 89 if major == 12 else 10 * major + minor


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_programs(device: torch.device, per_processor: int) -> int:
    """Programs of a persistent launch (in the interpreter a few, so that tests see more than one)."""
    return _processors(device) * per_processor if device.type == "cuda" else 3


# Warps of persistent programs per processor. Forward kernels of all widths fit 16 or nearly; backward ones need up to
# the whole register file for 8, and each program more costs another row of private sums.
FORWARD_WARPS = 16
BACKWARD_WARPS = 8


def kernel_precision(config: UnitConfig, dtype: torch.dtype) -> str:
    return config.precision if dtype == torch.float32 else "ieee"  # 16-bit products are exact


def shape_constants(config: UnitConfig, tiles: Tiling) -> dict[str, Any]:
    """Constexprs that all kernels over tiles take."""
    h1, h2, h3 = (*config.hidden_units, 0, 0)[:3]
    return {
        "D": config.embedding_dim, "H1": h1, "H2": h2, "H3": h3,
        "BD": tiles.dim, "B1": tiles.hidden[0], "B2": tiles.hidden[1], "B3": tiles.hidden[2], "T": tiles.rows,
        "VECTORS": PARAMETER_VECTORS[config.activation], "ACT": ACTIVATION_CODES[config.activation],
        "OUTER": config.interaction == "outer",
    }  # fmt: skip


def _padded(width: int, block: int) -> int:
    return -(-width // block) * block


def scratch_columns(config: UnitConfig, tiles: Tiling, layers: int) -> int:
    """Columns of scratch for hidden layers 0 … layers − 1."""
    return sum(_padded(h, b) for h, b in zip(config.hidden_units[:layers], tiles.hidden, strict=False))


class Prepared:
    """The operands of one call in the form the kernels read."""

    def __init__(
        self, config: UnitConfig, tensors: UnitTensors, *, layers: int, backward: bool = False,
        tiles: Tiling | None = None,
    ) -> None:  # fmt: skip
        """``tiles``: other than those of the universal kernels."""
        keys = tensors.keys
        self.config, self.tensors = config, tensors
        self.tiles = tiles or tiling(config, keys.dtype, backward=backward, capability=capability_of(keys.device))
        self.wide = wide_first_layer(config, tensors)
        self.first: FirstLayer = self.wide.layer
        self.query = tensors.query.contiguous()
        self.lists = tensors.starts.numel()
        warps = BACKWARD_WARPS if backward else FORWARD_WARPS
        programs = num_programs(keys.device, warps // self.tiles.num_warps)
        rows = rows_per_item(config, tensors, tile=self.tiles.rows, programs=programs)
        self.items: Items = make_items(config, tensors, rows)
        self.most_programs = programs
        self.programs = max(1, min(programs, self.items.bound * config.candidates))
        self.known = layers
        self.params = self._parameters(layers)
        self.mask = keys if tensors.row_mask is None else tensors.row_mask.contiguous().view(torch.uint8)

    def know(self, layers: int) -> None:
        """From now on statistics of so many layers are known."""
        if layers != self.known and self.config.uses_dice:
            self.known, self.params = layers, self._parameters(layers)

    def _parameters(self, layers: int) -> Tensor:
        """One flat fp32 vector (see kernels_common.py); statistics of ``layers`` layers are known, the rest is
        unused."""
        tensors, config = self.tensors, self.config
        output = tensors.weights[-1].reshape(-1)
        vectors: list[Tensor] = []
        sizes: list[int] = []
        strides: list[int] = []

        def add(vector: Tensor | None, size: int) -> None:
            """A vector [size], one number for all of them, or nothing."""
            vectors.append(output if vector is None else vector)
            sizes.append(size)
            strides.append(-1 if vector is None else vector.stride(-1) if vector.numel() == size else 0)

        for layer, width in enumerate(config.hidden_units):
            add(tensors.biases[layer], width)
            if config.activation in ("prelu", "dice"):
                alpha = tensors.alphas[layer]
                assert alpha is not None
                add(alpha.reshape(-1), width)
            if config.uses_dice:
                known = layer < layers
                add(tensors.means[layer] if known else None, width)
                add(tensors.rstds[layer] if known else None, width)
        add(output, output.numel())
        add(tensors.biases[-1], 1)
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=tensors.keys.device)
        block = _power_of_two(max(sizes))
        operands = {
            "vectors": tuple(vectors), "flat": flat, "SIZES": tuple(sizes), "STRIDES": tuple(strides), "BLOCK": block
        }  # fmt: skip
        with on_device(tensors.keys):
            launch(kernels_parameters.gather_parameters, (1,), operands, num_warps=4)
        return flat

    def layer_operands(self) -> dict[str, Any]:
        """Arguments of the layers, the same for every kernel; an operand that does not exist repeats another."""
        tensors, config = self.tensors, self.config
        upper = [weight.contiguous() for weight in tensors.weights[1:-1]]
        outer = config.interaction == "outer"
        first = self.first.matrix if outer else self.first.shared
        assert first is not None
        gathered = tensors.gathered
        return {
            "keys": tensors.keys if gathered is None else gathered.tables_and_ids(),
            "query": self.query, "offset": self.first.offset.contiguous(),
            "first": first.contiguous(),
            "product": self.first.offset if self.first.product is None else self.first.product.contiguous(),
            "weight2": upper[0] if upper else self.params, "weight3": upper[1] if len(upper) > 1 else self.params,
            "param": self.params, **self.item_operands(),
            "key_stride": tensors.keys.stride(0) if gathered is None else gathered.strides(),
        }  # fmt: skip

    def item_operands(self) -> dict[str, Any]:
        return {
            "starts": self.tensors.starts, "ends": self.tensors.ends, "row_mask": self.mask,
            "chunk_offsets": self.items.chunk_offsets, "chunk_list": self.items.chunk_list,
            "item_rows": self.items.rows, "num_lists": self.lists, "candidates": self.config.candidates,
        }  # fmt: skip

    def weight_strides(self) -> dict[str, int]:
        """weight_index as strides of (row, candidate, list)."""
        candidates, padded = self.config.candidates, self.config.padded_length
        if padded:
            return {"weight_row": 1, "weight_candidate": padded, "weight_list": padded * (candidates - 1)}
        return {"weight_row": candidates, "weight_candidate": 1, "weight_list": 0}

    def constants(self) -> dict[str, Any]:
        return {
            **shape_constants(self.config, self.tiles),
            "HAS_MASK": self.tensors.row_mask is not None,
            "PRECISION": kernel_precision(self.config, self.tensors.keys.dtype),
        }

    def scratch(self, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        keys = self.tensors.keys
        count = max(1, self.programs * self.tiles.rows * columns)
        return torch.empty(count, dtype=dtype or keys.dtype, device=keys.device)


def moments_of_programs(call: Prepared, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """counts [P] int64, means and m2s [P, H] of hidden layer ``layer``'s pre-activation, of each program's pairs."""
    config, device = call.config, call.tensors.keys.device
    counts = torch.empty(call.programs, dtype=torch.int64, device=device)
    means = torch.empty(call.programs, config.hidden_units[layer], dtype=torch.float32, device=device)
    m2s = torch.empty_like(means)
    operands = {
        **call.layer_operands(), "counts": counts, "means": means, "m2s": m2s,
        "scratch": call.scratch(scratch_columns(config, call.tiles, layer)), "LAYER": layer, **call.constants(),
    }  # fmt: skip
    with on_device(call.tensors.keys):
        launch(kernels.statistics_items, (call.programs,), operands, **launch_options(call.tiles))
    return counts, means, m2s


def no_moments(config: UnitConfig, tensors: UnitTensors, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same where there are no lists."""
    device = tensors.keys.device
    zero = torch.zeros(1, config.hidden_units[layer], dtype=torch.float32, device=device)
    return torch.zeros(1, dtype=torch.int64, device=device), zero, zero


def statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> Moments:
    """Moments of hidden layer ``layer``'s pre-activation over all pairs."""
    if tensors.starts.numel() == 0:
        return merge(*no_moments(config, tensors, layer))
    return merge(*moments_of_programs(Prepared(config, tensors, layers=layer), layer))


def combine_items(call: Prepared, written: dict[str, Any]) -> None:
    """Add up the slots of each list's chunks, which the forward kernel has ``written``."""
    dim, block = call.config.embedding_dim, min(COMBINE_BLOCK, call.tiles.padded_dim)
    queries, device = written["pooled"].shape[0], call.tensors.keys.device
    operands = {
        **written, **call.item_operands(), "D": dim, "BLOCK_D": block, "BLOCK_K": 16, "SOFTMAX": call.config.softmax
    }  # fmt: skip
    launch(kernels.combine_items, (min(queries, num_programs(device, 8)), -(-dim // block)), operands, num_warps=4)


def normalise_weights(call: Prepared, written: dict[str, Any]) -> None:
    """weights = exp(scores − log_normaliser), of those in ``written``."""
    operands = {
        **written, **call.item_operands(), **call.weight_strides(), "T": 128, "HAS_MASK": call.tensors.row_mask is not None
    }  # fmt: skip
    launch(kernels.normalise_weights, (call.programs,), operands, num_warps=4)


def forward(
    config: UnitConfig, tensors: UnitTensors, *, return_weights: bool, call: Prepared | None = None
) -> UnitOutputs:
    """``call``: what the statistics prepared, if they did."""
    keys, depth = tensors.keys, len(config.hidden_units)
    queries = tensors.query.shape[0]
    pooled = torch.empty(queries, config.embedding_dim, dtype=keys.dtype, device=keys.device)
    log_normaliser = torch.empty(queries if config.softmax else 0, dtype=torch.float32, device=keys.device)
    weights = keys.new_zeros(keys.shape[0] * config.candidates) if return_weights else None
    if queries == 0:
        return UnitOutputs(pooled, weights, log_normaliser if config.softmax else None)
    call = call or Prepared(config, tensors, layers=depth)
    call.know(depth)
    attention = weights
    if config.softmax and return_weights:
        attention = torch.empty(keys.shape[0] * config.candidates, dtype=torch.float32, device=keys.device)
    several = call.items.slots > queries
    partial = torch.empty(
        call.items.slots if several else 1, config.embedding_dim, dtype=torch.float32, device=keys.device
    )
    partial_softmax = torch.empty(partial.shape[0] if config.softmax else 1, 2, dtype=torch.float32, device=keys.device)
    with on_device(keys):
        operands = {
            **call.layer_operands(), "pooled": pooled, "log_normaliser": log_normaliser,
            "partial": partial, "partial_softmax": partial_softmax,
            "attention": pooled if attention is None else attention,
            "scratch": call.scratch(scratch_columns(config, call.tiles, depth - 1)),
            "scale": float(config.scale), **call.weight_strides(), **call.constants(),
            "BLOCK_D": call.tiles.padded_dim, "DEPTH": depth, "SOFTMAX": config.softmax, "HAS_ATTENTION": return_weights,
        }  # fmt: skip
        launch(kernels.forward_items, (call.programs,), operands, **launch_options(call.tiles))
        if several:
            combine_items(call, operands)
        if weights is not None and config.softmax:
            normalise_weights(call, {**operands, "scores": attention, "weights": weights})
    return UnitOutputs(pooled, weights, log_normaliser if config.softmax else None)
