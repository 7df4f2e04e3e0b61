"""What the packed backward kernels of 16 bits and of fp32 have in common: batches of tiles, the memory for what they sum up,
and the gradients made of it (launches of ``kernels_collect.py``)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..._launch import launch
from . import kernels_collect as kernels
from .packed import TILE, Packed, finish_lists, finish_options, next_power_of_two
from .parameters import Slopes, like
from .problem import UnitConfig, UnitGradients
from .universal import num_programs

LOG2_E = 1.4426950408889634
BLOCK_Q, BLOCK = 32, 64

# Bytes of what one kernel leaves to the next (dz1, h1, dz2 of a batch of tiles), which bounds the memory of a call. By
# bandwidth, batches that fit the L2 cache, 24 MiB, save up to 15 µs each; and they cost four launches: on an H200, seven of
# them left the GPU waiting for three quarters of the time. A batch of this size takes longer than it takes to launch.
BETWEEN_BYTES = 128 << 20


def precision() -> str:
    """Three products of tf32, which are as accurate as fp32 and leave room in the registers; AMD has the room."""
    return "tf32x3" if torch.version.hip is None else "ieee"


def columns(width: int) -> int:
    """Columns of the embedding to a program of ``finish_queries``, so that it has the registers for so many channels."""
    return 16 if width > 64 else 32


@functools.lru_cache(maxsize=256)
def batches(tiles: int, row_bytes: int, programs: int) -> list[tuple[int, int]]:
    """(first, end) of batches of tiles whose rows leave ``row_bytes`` each between kernels, a whole number of tiles for each
    program where there are that many."""
    most = max(1, BETWEEN_BYTES // (row_bytes * TILE))
    size = -(-tiles // -(-tiles // most))  # batches alike, rather than a small one at the end
    if size > programs:
        size = min(-(-size // programs), most // programs) * programs
    return [(first, min(first + size, tiles)) for first in range(0, tiles, size)]


def zeroed(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Zeros of these shapes, fp32, by one launch. Each begins at a multiple of 16 bytes."""
    size, places = _places(shapes)
    memory = torch.zeros(size, dtype=torch.float32, device=device)
    return [memory.as_strided(*place) for place in places]


@functools.lru_cache(maxsize=256)
def _places(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, list[tuple[tuple[int, ...], tuple[int, ...], int]]]:
    """Elements in all; (shape, strides, offset) of each."""
    size, places = 0, []
    for shape in shapes:
        places.append((shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), size))
        size += -(-math.prod(shape) // 4) * 4
    return size, places


def vector_width(config: UnitConfig) -> int:
    """Columns of ``vectors``: Σ ds · h, Σ ds, alphas."""
    widths = config.hidden_units
    return widths[-1] + 1 + (sum(widths) if config.activation in ("prelu", "dice") else 0)


class Results:
    """What the packed backward kernels leave, and the gradients made of it.

    grad_keys [R, D]; list_sums [Q, D + H1] with a carry as in forward; and added to by ``programs`` (see
    ``finish_gradients``): vectors, first_sums, second_sums, second_vectors."""

    def __init__(self, call: Packed, programs: int) -> None:
        self.call = call
        config, keys = call.config, call.tensors.keys
        dim, (first, second) = config.embedding_dim, (*config.hidden_units, 0)[:2]
        # Rows of padded keys beyond their list's length belong to no slot.
        make = torch.zeros if config.padded_length else torch.empty
        self.grad_keys = make(keys.shape, dtype=keys.dtype, device=keys.device)
        self.list_sums = torch.empty(call.queries, dim + first, dtype=torch.float32, device=keys.device)
        self.carry = torch.empty(2 * call.tables.tiles, dim + first, dtype=torch.float32, device=keys.device)
        self.vectors, self.first_sums, self.second_sums, self.second_vectors = zeroed(
            keys.device, (programs, vector_width(config)), (programs, 2, first, dim), (programs, second, first),
            (programs, second),
        )  # fmt: skip

    def operands(self) -> dict[str, Tensor]:
        return {"grad_keys": self.grad_keys, "list_sums": self.list_sums, "carry": self.carry}

    def gradients(self) -> UnitGradients:
        """In the dtypes of their parameters; after the kernels."""
        call = self.call
        finish_lists(call.tables, self.carry, self.list_sums)
        grad_query, weight_parts, bias_parts = self._query()
        tensors, widths = call.tensors, call.config.hidden_units
        weights = [like(weight) for weight in tensors.weights]
        biases = [None if bias is None else like(bias) for bias in tensors.biases]
        slopes = Slopes(tensors.alphas, widths)
        self._parameters(weights, biases, slopes.memory, weight_parts, bias_parts)
        return UnitGradients(grad_query, self.grad_keys, weights, biases, slopes.gradients())

    def _query(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the query, and what query rows add to those of the first layer, by program."""
        call, device = self.call, self.list_sums.device
        dim, width = call.config.embedding_dim, call.config.hidden_units[0]
        gradient, block = like(call.query), columns(width)
        programs = min(-(-call.queries // BLOCK_Q), num_programs(device, 1))
        weight_parts = torch.empty(programs, width, dim, dtype=torch.float32, device=device)
        bias_parts = torch.empty(programs, width, dtype=torch.float32, device=device)
        operands = {
            "list_sums": self.list_sums, "query": call.query, "weight1": call.tensors.weights[0].contiguous(),
            "grad_query": gradient, "weight_parts": weight_parts, "bias_parts": bias_parts, "queries": call.queries,
            "D": dim, "BLOCK_D": block, "H": width, "BLOCK_H": next_power_of_two(width), "BLOCK_Q": BLOCK_Q,
            "PRECISION": precision(),
        }  # fmt: skip
        launch(kernels.finish_queries, (programs, -(-dim // block)), operands, num_warps=4)
        return gradient, weight_parts, bias_parts

    def _parameters(
        self, weights: list[Tensor], biases: list[Tensor | None], alphas: list[Tensor | None], weight_parts: Tensor,
        bias_parts: Tensor,
    ) -> None:  # fmt: skip
        """The gradients of all parameters, by one launch."""
        config = self.call.config
        dim, (first, second) = config.embedding_dim, (*config.hidden_units, 0)[:2]
        operands = {
            "first_sums": self.first_sums, "second_sums": self.second_sums, "second_vectors": self.second_vectors,
            "vectors": self.vectors, "weight_parts": weight_parts, "bias_parts": bias_parts,
            "weight1": weights[0], "weight2": weights[1], "weight_out": weights[-1],
            "bias1": biases[0], "bias2": biases[1], "bias_out": biases[-1], "alpha1": alphas[0], "alpha2": alphas[-1],
            "programs": self.vectors.shape[0], "query_programs": weight_parts.shape[0],
            # For sigmoid dz2 is stored for weights multiplied by −log₂e.
            "unscale": -LOG2_E if config.activation == "sigmoid" else 1.0,
            "D": dim, "H1": first, "H2": second, "BLOCK": BLOCK, "HAS_ALPHA": config.activation in ("prelu", "dice"),
            "BIASES": sum(1 << layer for layer, bias in enumerate(biases) if bias is not None),
        }  # fmt: skip
        absent = {name: self.vectors for name, value in operands.items() if value is None}
        widest = max(self.vectors.shape[1], first, second)
        grid = first * -(-dim // BLOCK) + -(-second * first // BLOCK) + -(-widest // BLOCK)
        launch(kernels.finish_gradients, (grid,), operands | absent, **finish_options())
