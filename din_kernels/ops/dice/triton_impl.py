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

from ..._launch import FUSED, on_device
from . import kernels, kernels_backward

TILE = 4096  # elements of a tile: 16 a thread
NUM_WARPS = 8
BLOCK_P_ELEMENTS = 1024  # numbers of a kind that a program takes from ``parts`` at a time
COLUMNS_MAX_ROWS = 1024  # up to here one program takes all rows of its channels: half the launches


class Tiling(NamedTuple):
    """block_r × block_c elements a tile; ``parts`` runs of ``rows_per_part`` rows; ``block_p`` parts read at a time."""

    block_r: int
    block_c: int
    block_p: int
    rows_per_part: int
    parts: int


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def block_of_channels(width: int, itemsize: int) -> int:
    """Channels of a program: 32 to 128 bytes of a row, as wide as leaves eight blocks.

    More blocks mean fewer parts for as many programs, and every program reads all parts of its channels.
    """
    block, narrowest = 128 // itemsize, 32 // itemsize
    while block > narrowest and -(-width // block) < 8:
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


def launch_options(*, crowded: bool = True) -> dict[str, int]:
    """Left alone, ptxas may spill a few bytes for the sake of a third program per processor, or let one have all its
    registers. The tiling counts on two; a launch of few programs (not ``crowded``) may use all registers."""
    options: dict[str, int] = {"num_warps": NUM_WARPS, "num_stages": 1, **FUSED}
    if torch.version.hip is None:
        options["maxnreg"] = 128 if crowded else 255
    return options


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: a few programs, so that tests see more than one part
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiling(x: Tensor, grad: Tensor | None = None, shift: Tensor | None = None, *, waves: int = 1) -> Tiling:
    """``shift``: only where its gradient is summed."""
    heavy = x.stride(1) != 1 or (grad is not None and grad.stride(1) != 1) or shift is not None
    return tiling(x.shape[0], x.shape[1], x.element_size(), _processors(x.device), heavy=heavy, waves=waves)


def _stride(name: str, x: Tensor) -> dict[str, int]:
    """Row stride of x in the largest unit up to 16 that divides it (see kernels.py), and the channel stride."""
    stride, channel = x.stride()
    unit = 16
    while stride % unit:
        unit //= 2
    return {f"{name}_stride": stride // unit, f"{name}_channel": channel, f"{name.upper()}_UNIT": unit}


def _vectors(shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    """Parameters as the kernels take them; absent ones need some pointer."""
    return {
        "alpha": alpha, "alpha_stride": alpha.stride(0),
        "weight": alpha if weight is None else weight.contiguous(), "bias": alpha if bias is None else bias.contiguous(),
        "shift": alpha if shift is None else shift.contiguous(), "HAS_SHIFT": shift is not None, "AFFINE": weight is not None,
    }  # fmt: skip


def _grid(x: Tensor, tiles: Tiling) -> tuple[int, int]:
    return -(-x.shape[1] // tiles.block_c), tiles.parts


def _three(x: Tensor, *parts: int, shift: Tensor | None = None) -> Tensor:
    """[..., 3, C], or [..., 4, C] for sums where there is a shift."""
    return torch.empty((*parts, 3 if shift is None else 4, x.shape[1]), dtype=torch.float32, device=x.device)


def _moments_parts(x: Tensor, mask: Tensor | None, tiles: Tiling) -> Tensor:
    parts = _three(x, tiles.parts)
    kernels.moments_parts[_grid(x, tiles)](
        x, x if mask is None else mask, parts, x.shape[0], tiles.rows_per_part, **_stride("x", x), C=x.shape[1],
        BLOCK_R=tiles.block_r, BLOCK_C=tiles.block_c, HAS_MASK=mask is not None, **launch_options(),
    )  # fmt: skip
    return parts


def _finish(parts: Tensor, tiles: Tiling, *, moments: bool) -> Tensor:
    _, numbers, width = parts.shape
    result = torch.empty_like(parts[0])
    kernels_backward.finish_parts[(-(-width // tiles.block_c),)](
        parts,
        parts.shape[0],
        result,
        C=width,
        BLOCK_C=tiles.block_c,
        BLOCK_P=tiles.block_p,
        MOMENTS=moments,
        HAS_SHIFT=numbers == 4,
        **launch_options(),
    )
    return result


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """See ``torch_impl.moments``."""
    if x.shape[0] == 0:
        return _three(x).zero_()
    tiles = _tiling(x)
    with on_device(x):
        return _finish(_moments_parts(x, _bytes(mask), tiles), tiles, moments=True)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def forward(
    x: Tensor, shift: Tensor | None, mask: Tensor | None, gathered: Tensor | None, alpha: Tensor, weight: Tensor | None,
    bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None,
    step: Tensor | float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``torch_impl.forward``."""
    rows, width = x.shape
    y, normaliser = torch.empty((rows, width), dtype=x.dtype, device=x.device), _three(x)
    tiles = _tiling(x)
    statistics: dict[str, Any] = {
        "running_mean": x if running_mean is None else running_mean,
        "running_var": x if running_var is None else running_var,
        "tracked": x if tracked is None else tracked,
        "step": step, "normaliser": normaliser, "eps": eps,
        "HAS_RUNNING": running_mean is not None, "HAS_TRACKED": tracked is not None,
        "STEP_POINTER": isinstance(step, Tensor),
    }  # fmt: skip
    shape: dict[str, Any] = {
        **_stride("x", x), "C": width, "BLOCK_R": tiles.block_r, "BLOCK_C": tiles.block_c
    }  # fmt: skip
    given = _bytes(mask)
    with on_device(x):
        if gathered is None and rows <= COLUMNS_MAX_ROWS:
            kernels.forward_columns[(_grid(x, tiles)[0],)](
                x=x, mask=x if given is None else given, y=y, num_rows=rows, HAS_MASK=given is not None,
                **statistics, **_vectors(shift, alpha, weight, bias), **shape, **launch_options(crowded=False),
            )  # fmt: skip
            return y, normaliser
        parts = _moments_parts(x, given, tiles) if gathered is None else gathered
        kernels.apply_training[_grid(x, tiles)](
            x=x, y=y, parts=parts, num_parts=parts.shape[0], num_rows=rows, rows_per_part=tiles.rows_per_part,
            BLOCK_P=tiles.block_p, **statistics, **_vectors(shift, alpha, weight, bias), **shape, **launch_options(),
        )  # fmt: skip
    return y, normaliser


def inference(
    x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """See ``torch_impl.inference``."""
    y = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _evaluate_into(y, x, shift, alpha, weight, bias, mean, var, eps)
    return y


def evaluate(
    x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``torch_impl.evaluate``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _evaluate_into(y, x, shift, alpha, weight, bias, mean, var, eps)


def _evaluate_into(
    y: Tensor, x: Tensor, shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Write y, which may be x; returns normaliser [3, C]."""
    normaliser = _three(x)
    tiles = _tiling(x, waves=4)  # nothing is merged, so programs may be many
    with on_device(x):
        kernels.apply_running[_grid(x, tiles)](
            x=x, y=y, running_mean=mean, running_var=var, normaliser=normaliser, num_rows=x.shape[0],
            rows_per_part=tiles.rows_per_part, eps=eps, **_vectors(shift, alpha, weight, bias), **_stride("x", x),
            C=x.shape[1], BLOCK_R=tiles.block_r, BLOCK_C=tiles.block_c, **launch_options(),
        )  # fmt: skip
    return normaliser


def _backward_shape(grad: Tensor, x: Tensor, tiles: Tiling) -> dict[str, Any]:
    return {
        **_stride("grad", grad), **_stride("x", x), "C": x.shape[1], "BLOCK_R": tiles.block_r, "BLOCK_C": tiles.block_c,
    }  # fmt: skip


def _sum_parts(
    grad: Tensor, x: Tensor, dx: Tensor | None, normaliser: Tensor, vectors: dict[str, Any], tiles: Tiling
) -> Tensor:
    parts = _three(x, tiles.parts, shift=vectors["shift"] if vectors["HAS_SHIFT"] else None)
    kernels_backward.sum_parts[_grid(x, tiles)](
        grad=grad, x=x, dx=x if dx is None else dx, parts=parts, normaliser=normaliser, num_rows=x.shape[0],
        rows_per_part=tiles.rows_per_part, WRITE_DX=dx is not None, **vectors, **_backward_shape(grad, x, tiles),
        **launch_options(),
    )  # fmt: skip
    return parts


def sums(
    grad: Tensor, x: Tensor, normaliser: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """See ``torch_impl.sums``."""
    if x.shape[0] == 0:
        return _three(x).zero_()
    tiles = _tiling(x, grad)
    with on_device(x):
        parts = _sum_parts(grad, x, None, normaliser, _vectors(None, alpha, weight, bias), tiles)
        return _finish(parts, tiles, moments=False)


def backward(
    grad: Tensor, x: Tensor, shift: Tensor | None, mask: Tensor | None, normaliser: Tensor, gathered: Tensor | None,
    alpha: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``torch_impl.backward``."""
    rows, width = x.shape
    dx = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    vectors, tiles = _vectors(shift, alpha, weight, bias), _tiling(x, grad, shift)
    with on_device(x):
        if not training:
            return dx, _finish(_sum_parts(grad, x, dx, normaliser, vectors, tiles), tiles, moments=False)
        result = _three(x, shift=shift)
        given = _bytes(mask)
        shared: dict[str, Any] = {
            "grad": grad, "x": x, "mask": x if given is None else given, "dx": dx, "sums": result, "normaliser": normaliser,
            "num_rows": rows, "HAS_MASK": given is not None, **vectors, **_backward_shape(grad, x, tiles),
        }  # fmt: skip
        if gathered is None and rows <= COLUMNS_MAX_ROWS:
            kernels_backward.backward_columns[(_grid(x, tiles)[0],)](**shared, **launch_options(crowded=False))
            return dx, result
        parts = _sum_parts(grad, x, None, normaliser, vectors, tiles) if gathered is None else gathered
        kernels_backward.apply_gradient[_grid(x, tiles)](
            parts=parts,
            num_parts=parts.shape[0],
            rows_per_part=tiles.rows_per_part,
            BLOCK_P=tiles.block_p,
            **shared,
            **launch_options(),
        )
    return dx, result
