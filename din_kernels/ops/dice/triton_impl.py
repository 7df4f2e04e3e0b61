"""Launches of the Dice kernels: how rows and channels are cut up, and the same five functions as ``torch_impl``.

The numbers below follow from registers, bytes in flight and bytes read twice, checked by compiling ahead of time. None of
them has been tuned on a GPU yet.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from . import kernels, kernels_backward, kernels_columns

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


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def block_of_channels(width: int, itemsize: int, blocks: int = 8) -> int:
    """Channels of a program: 32 to 128 bytes of a row, as wide as leaves so many blocks.

    More blocks mean fewer parts for as many programs, and every program reads all parts of its channels.
    """
    block, narrowest = 128 // itemsize, 32 // itemsize
    while block > narrowest and -(-width // block) < blocks:
        block //= 2
    return min(block, _power_of_two(width))


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
    return Tiling(block_r, block_c, min(_power_of_two(parts), BLOCK_P_ELEMENTS // block_c), rows_per_part, parts)


def columns_tile(
    rows: int, width: int, itemsize: int, *, backward: bool = False, strided: bool = False
) -> tuple[int, int] | None:
    """(BLOCK_R, BLOCK_C) of programs that hold all rows of their channels; None where two launches serve better.

    strided  channels are not next to one another: each element has an address
    """
    if rows > COLUMNS_MAX_ROWS:
        return None
    most = (COLUMNS_BACKWARD if backward else COLUMNS_FORWARD) // (4 if strided else 1)
    block_r = _power_of_two(max(rows, 16))
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
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: a few programs, so that tests see more than one part
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Plan(NamedTuple):
    """What a call's shape decides: the grid (blocks of channels, parts), the operands that are numbers, and options."""

    grid: tuple[int, ...]
    numbers: dict[str, Any]
    options: dict[str, int]


def _unit(stride: int) -> int:
    """The largest unit up to 16 that divides a stride: see kernels.py."""
    return math.gcd(stride, 16) if stride else 16


def _numbers(
    rows: int, width: int, stride: tuple[int, ...], grad_stride: tuple[int, ...], block_r: int, block_c: int
) -> dict[str, Any]:
    unit, grad_unit = _unit(stride[0]), _unit(grad_stride[0])
    return {
        "num_rows": rows, "C": width, "x_stride": stride[0] // unit, "x_channel": stride[1], "X_UNIT": unit,
        "grad_stride": grad_stride[0] // grad_unit, "grad_channel": grad_stride[1], "GRAD_UNIT": grad_unit,
        "BLOCK_R": block_r, "BLOCK_C": block_c,
    }  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _plan(
    rows: int, width: int, itemsize: int, stride: tuple[int, ...], grad_stride: tuple[int, ...], device: torch.device,
    heavy: bool, waves: int,
) -> _Plan:  # fmt: skip
    heavy = heavy or stride[1] != 1 or grad_stride[1] != 1
    tiles = tiling(rows, width, itemsize, _processors(device), heavy=heavy, waves=waves)
    numbers = {
        **_numbers(rows, width, stride, grad_stride, tiles.block_r, tiles.block_c),
        "rows_per_part": tiles.rows_per_part, "num_parts": tiles.parts, "BLOCK_P": tiles.block_p,
    }  # fmt: skip
    return _Plan((-(-width // tiles.block_c), tiles.parts), numbers, launch_options())


@functools.lru_cache(maxsize=1024)
def _columns_plan(
    rows: int, width: int, itemsize: int, stride: tuple[int, ...], grad_stride: tuple[int, ...] | None
) -> _Plan | None:
    """``grad_stride``: for backward."""
    strided = stride[1] != 1 or (grad_stride is not None and grad_stride[1] != 1)
    tile = columns_tile(rows, width, itemsize, backward=grad_stride is not None, strided=strided)
    if tile is None:
        return None
    numbers = _numbers(rows, width, stride, stride if grad_stride is None else grad_stride, *tile)
    return _Plan((-(-width // tile[1]),), numbers, columns_options(*tile))


def _planned(x: Tensor, grad: Tensor | None = None, *, heavy: bool = False, waves: int = 1) -> _Plan:
    stride = x.stride()
    return _plan(*x.shape, x.element_size(), stride, stride if grad is None else grad.stride(), x.device, heavy, waves)


def _columns_planned(x: Tensor, grad: Tensor | None = None) -> _Plan | None:
    """The plan for one launch, None if there must be two."""
    return _columns_plan(*x.shape, x.element_size(), x.stride(), None if grad is None else grad.stride())


def _vectors(shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    """Parameters as the kernels take them; absent ones need some pointer."""
    return {
        "alpha": alpha, "alpha_stride": alpha.stride(0),
        "weight": alpha if weight is None else weight.contiguous(), "bias": alpha if bias is None else bias.contiguous(),
        "shift": alpha if shift is None else shift.contiguous(), "HAS_SHIFT": shift is not None, "AFFINE": weight is not None,
    }  # fmt: skip


def _masked(mask: Tensor | None, x: Tensor) -> dict[str, Any]:
    if mask is None:
        return {"mask": x, "HAS_MASK": False}
    return {"mask": mask.contiguous().view(torch.uint8), "HAS_MASK": True}


def _empty(x: Tensor) -> Tensor:
    """As x, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _three(x: Tensor, *parts: int, four: bool = False) -> Tensor:
    """[..., 3, C], or [..., 4, C] for sums where there is a shift."""
    return torch.empty((*parts, 3 + four, x.shape[1]), dtype=torch.float32, device=x.device)


def _moments_parts(x: Tensor, plan: _Plan, operands: dict[str, Any]) -> Tensor:
    """[P, 3, C]; also put among ``operands``."""
    operands["parts"] = parts = _three(x, plan.grid[1])
    launch(kernels.moments_parts, plan.grid, operands, **plan.options)
    return parts


def _finish(parts: Tensor, plan: _Plan, *, moments: bool) -> Tensor:
    result = torch.empty_like(parts[0])
    operands = {**plan.numbers, "parts": parts, "result": result, "MOMENTS": moments, "HAS_SHIFT": len(result) == 4}
    launch(kernels_backward.finish_parts, plan.grid[:1], operands, **plan.options)
    return result


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``torch_impl.moments``."""
    if x.shape[0] == 0:
        return _three(x).zero_()
    plan = _planned(x)
    with on_device(x):
        return _finish(_moments_parts(x, plan, {**plan.numbers, **_masked(mask, x), "x": x}), plan, moments=True)


def forward(
    x: Tensor, shift: Tensor | None, mask: Tensor | None, gathered: Tensor | None, alpha: Tensor, weight: Tensor | None,
    bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None,
    step: Tensor | float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``torch_impl.forward``."""
    y, normaliser = _empty(x), _three(x)
    single = _columns_planned(x) if gathered is None else None
    plan = single or _planned(x)
    operands: dict[str, Any] = {
        **plan.numbers, **_vectors(shift, alpha, weight, bias), **_masked(mask, x), "x": x, "y": y,
        "running_mean": x if running_mean is None else running_mean,
        "running_var": x if running_var is None else running_var,
        "tracked": x if tracked is None else tracked,
        "step": step, "normaliser": normaliser, "eps": eps,
        "HAS_RUNNING": running_mean is not None, "HAS_TRACKED": tracked is not None,
        "STEP_POINTER": isinstance(step, Tensor),
    }  # fmt: skip
    with on_device(x):
        if single is not None:
            launch(kernels_columns.forward_columns, plan.grid, operands, **plan.options)
            return y, normaliser
        if gathered is None:
            _moments_parts(x, plan, operands)
        else:
            operands.update(parts=gathered, num_parts=len(gathered))
        launch(kernels.apply_training, plan.grid, operands, **plan.options)
    return y, normaliser


def inference(
    x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """See ``torch_impl.inference``."""
    y = x if in_place else _empty(x)
    _evaluate_into(y, x, shift, alpha, weight, bias, mean, var, eps)
    return y


def evaluate(
    x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``torch_impl.evaluate``."""
    y = _empty(x)
    return y, _evaluate_into(y, x, shift, alpha, weight, bias, mean, var, eps)


def _evaluate_into(
    y: Tensor, x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Write y, which may be x; returns normaliser [3, C]."""
    normaliser = _three(x)
    plan = _planned(x, waves=4)  # nothing is merged, so programs may be many
    operands = {
        **plan.numbers, **_vectors(shift, alpha, weight, bias), "x": x, "y": y, "running_mean": mean, "running_var": var,
        "normaliser": normaliser, "eps": eps,
    }  # fmt: skip
    with on_device(x):
        launch(kernels.apply_running, plan.grid, operands, **plan.options)
    return normaliser


def _sum_parts(x: Tensor, dx: Tensor | None, plan: _Plan, operands: dict[str, Any]) -> Tensor:
    """[P, 3 or 4, C]; also put among ``operands``. dx is written if given."""
    operands["parts"] = parts = _three(x, plan.grid[1], four=operands["HAS_SHIFT"])
    operands.update(dx=x if dx is None else dx, WRITE_DX=dx is not None)
    launch(kernels_backward.sum_parts, plan.grid, operands, **plan.options)
    return parts


def sums(
    grad: Tensor, x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """See ``torch_impl.sums``."""
    if x.shape[0] == 0:
        return _three(x).zero_()
    plan = _planned(x, grad)
    operands = {**plan.numbers, **_vectors(None, alpha, weight, bias), "grad": grad, "x": x, "normaliser": normaliser}
    with on_device(x):
        return _finish(_sum_parts(x, None, plan, operands), plan, moments=False)


def backward(
    grad: Tensor, x: Tensor, shift: Tensor | None, mask: Tensor | None, normaliser: Tensor, gathered: Tensor | None,
    alpha: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``torch_impl.backward``."""
    dx, four = _empty(x), shift is not None
    single = _columns_planned(x, grad) if training and gathered is None else None
    plan = single or _planned(x, grad, heavy=four)
    operands: dict[str, Any] = {
        **plan.numbers, **_vectors(shift, alpha, weight, bias), "grad": grad, "x": x, "normaliser": normaliser,
    }  # fmt: skip
    with on_device(x):
        if not training:
            return dx, _finish(_sum_parts(x, dx, plan, operands), plan, moments=False)
        result = _three(x, four=four)
        operands.update(_masked(mask, x), sums=result)
        if single is not None:
            operands["dx"] = dx
            launch(kernels_columns.backward_columns, plan.grid, operands, **plan.options)
            return dx, result
        if gathered is None:
            _sum_parts(x, None, plan, operands)
        else:
            operands.update(parts=gathered, num_parts=len(gathered))
        operands["dx"] = dx
        launch(kernels_backward.apply_gradient, plan.grid, operands, **plan.options)
    return dx, result
