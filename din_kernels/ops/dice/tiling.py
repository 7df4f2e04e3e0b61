"""How rows and channels of Dice are cut up for the kernels, and with which options they are launched.

The numbers below follow from registers, bytes in flight and bytes read twice, checked by compiling ahead of time. None of
them has been tuned on a GPU yet.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ..._launch import FUSED

TILE = 4096  # elements of a tile: 16 a thread
NUM_WARPS = 8
BLOCK_P_ELEMENTS = 1024  # numbers of a kind that a program takes from ``parts`` at a time

# Up to so many rows a program holds its channels on chip: half the launches, and everything is read once.
COLUMNS_MAX_ROWS = 4096
COLUMNS_FORWARD, COLUMNS_BACKWARD = 16384, 8192  # elements of a program: 32 or 16 for each of 512 threads
COLUMNS_BLOCKS = 128  # about as many as there are processors: nothing else is parallel
SEGMENTS = 1 << 20  # pieces of rows narrower than a sector of 32 bytes, which the L2 cache hands out whole


class Tiling(NamedTuple):
    """block_r × block_c elements a tile; ``parts`` runs of ``rows_per_part`` rows; ``block_p`` parts read at a time."""

    block_r: int
    block_c: int
    block_p: int
    rows_per_part: int
    parts: int


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def block_of_channels(width: int, itemsize: int, blocks: int = 8) -> int:
    """Channels of a program: 32 to 128 bytes of a row, as wide as leaves so many blocks.

    More blocks mean fewer parts for as many programs, and every program reads all parts of its channels.
    """
    block, narrowest = 128 // itemsize, 32 // itemsize
    while block > narrowest and -(-width // block) < blocks:
        block //= 2
    return min(block, power_of_two(width))


def tiling(rows: int, width: int, itemsize: int, processors: int, *, heavy: bool = False, waves: int = 1) -> Tiling:
    """How [rows, width] is cut up: for each of ``processors`` programs that have 32 KiB in flight, ``waves`` times; but
    so few that reading all parts (12 bytes for a channel of each) costs a program at most half of its share of x and y.

    heavy  an element takes more registers than usual, so that a tile must have half as many: channels that are not next to
           one another (each element has an address), or a fourth sum (backward with a shift)
    """
    block_c = block_of_channels(width, itemsize)
    tile = TILE // 2 if heavy or block_c * itemsize < 16 else TILE
    block_r = tile // block_c
    blocks = -(-width // block_c)
    wanted = 32768 // (tile * itemsize) * waves * processors // blocks
    wanted = max(1, rows >> 29, min(wanted, math.isqrt(rows * itemsize // 12)))  # a part's rows are counted in 32 bits
    tiles = max(1, -(-rows // block_r))
    rows_per_part = -(-tiles // wanted) * block_r
    parts = max(1, -(-rows // rows_per_part))
    return Tiling(block_r, block_c, min(power_of_two(parts), BLOCK_P_ELEMENTS // block_c), rows_per_part, parts)


def columns_tile(
    rows: int, width: int, itemsize: int, *, backward: bool = False, strided: bool = False
) -> tuple[int, int] | None:
    """(BLOCK_R, BLOCK_C) of programs that hold all rows of their channels; None where two launches serve better.

    strided  channels are not next to one another: each element has an address
    """
    if rows > COLUMNS_MAX_ROWS:
        return None
    most = (COLUMNS_BACKWARD if backward else COLUMNS_FORWARD) // (4 if strided else 1)
    block_r = power_of_two(max(rows, 16))
    block_c = min(block_of_channels(width, itemsize, COLUMNS_BLOCKS), most // block_r)
    if block_c == 0:
        return None
    blocks = -(-width // block_c)
    return (block_r, block_c) if block_c * itemsize >= 32 or rows * blocks <= SEGMENTS else None


@functools.cache
def launch_options(warps: int = NUM_WARPS, registers: int = 128) -> dict[str, int]:
    """Left alone, ptxas may spill a few bytes for the sake of a third program per processor, or let one have all its
    registers. The tiling counts on two programs of eight warps, with 128 registers a thread."""
    options: dict[str, int] = {"num_warps": warps, "num_stages": 1, **FUSED}
    if torch.version.hip is None:
        options["maxnreg"] = registers
    return options


def columns_options(block_r: int, block_c: int) -> dict[str, int]:
    """16 elements a thread or more; one program may take all registers of a processor."""
    warps = max(4, min(16, block_r * block_c // 512))
    return launch_options(warps, min(255, 2048 // warps))


@functools.cache
def processors_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: a few programs, so that tests see more than one part
    return torch.cuda.get_device_properties(device).multi_processor_count


def unit_of(stride: int) -> int:
    """The largest unit up to 16 that divides a stride: see kernels.py."""
    return math.gcd(stride, 16) if stride else 16


def numbers_of(
    width: int, stride: tuple[int, ...], grad_stride: tuple[int, ...], block_r: int, block_c: int
) -> dict[str, Any]:
    unit, grad_unit = unit_of(stride[0]), unit_of(grad_stride[0])
    return {
        "C": width, "x_stride": stride[0] // unit, "x_channel": stride[1], "X_UNIT": unit,
        "grad_stride": grad_stride[0] // grad_unit, "grad_channel": grad_stride[1], "GRAD_UNIT": grad_unit,
        "BLOCK_R": block_r, "BLOCK_C": block_c,
    }  # fmt: skip
