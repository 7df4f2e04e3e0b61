"""Launches of the Dice kernels: the same functions as ``torch_impl``. How rows and channels are cut up: ``tiling.py``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._launch import PreparedLaunch, launch, on_device
from . import kernels, kernels_backward, kernels_columns
from .tiling import columns_options, columns_tile, launch_options, numbers_of, processors_of, tiling


class _Plan(NamedTuple):
    """What a call's shape decides: the grid (blocks of channels, parts), the operands that are numbers, and options."""

    grid: tuple[int, ...]
    numbers: dict[str, Any]
    options: dict[str, int]


@functools.lru_cache(maxsize=1024)
def _plan(
    rows: int, width: int, itemsize: int, stride: tuple[int, ...], grad_stride: tuple[int, ...], device: torch.device,
    heavy: bool, waves: int,
) -> _Plan:  # fmt: skip
    heavy = heavy or stride[1] != 1 or grad_stride[1] != 1
    tiles = tiling(rows, width, itemsize, processors_of(device), heavy=heavy, waves=waves)
    numbers = {
        "num_rows": rows, **numbers_of(width, stride, grad_stride, tiles.block_r, tiles.block_c),
        "rows_per_part": tiles.rows_per_part, "num_parts": tiles.parts, "BLOCK_P": tiles.block_p,
    }  # fmt: skip
    return _Plan((-(-width // tiles.block_c), tiles.parts), numbers, launch_options())


# What stands for an argument that is absent, and is not read.
_STAND_INS = {
    "mask": "x", "running_mean": "x", "running_var": "x", "tracked": "x", "shift": "alpha", "weight": "alpha", "bias": "alpha",
}  # fmt: skip


def _prepared(
    kernel: Any, width: int, decided: dict[str, Any], given: tuple[str, ...], numbers: tuple[str, ...], **present: bool
) -> PreparedLaunch:  # fmt: skip
    """Calls give those of ``given`` that are not optional, or ``present``."""
    of_pair = {"bias": "weight", "running_var": "running_mean"}
    there = [name for name in given if present.get(of_pair.get(name, name), True)]
    absent = {name: _STAND_INS[name] for name in given if name not in there and name != "step"}
    options = columns_options(decided["BLOCK_R"], decided["BLOCK_C"])
    return PreparedLaunch(kernel, (-(-width // decided["BLOCK_C"]),), decided, there, numbers, absent, **options)


_FORWARD = (
    "x", "y", "normaliser", "alpha", "mask", "shift", "weight", "bias", "running_mean", "running_var", "tracked", "step",
)  # fmt: skip
_BACKWARD = ("x", "grad", "dx", "sums", "normaliser", "alpha", "mask", "shift", "weight", "bias")


@functools.lru_cache(maxsize=1024)
def _one_forward(
    tile: tuple[int, int], width: int, stride: tuple[int, ...], alpha_stride: int, masked: bool, shifted: bool, affine: bool,
    running: bool, tracked: bool, pointer: bool, eps: float,
) -> PreparedLaunch:  # fmt: skip
    """Forward in training as one launch; numbers: rows, and the step unless it is a ``pointer``."""
    decided = {
        **numbers_of(width, stride, stride, *tile), "alpha_stride": alpha_stride, "eps": eps, "HAS_MASK": masked,
        "HAS_SHIFT": shifted, "AFFINE": affine, "HAS_RUNNING": running, "HAS_TRACKED": tracked, "STEP_POINTER": pointer,
    }  # fmt: skip
    return _prepared(
        kernels_columns.forward_columns, width, decided, _FORWARD, ("num_rows", *(() if pointer else ("step",))),
        mask=masked, shift=shifted, weight=affine, running_mean=running, tracked=tracked, step=pointer,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _one_backward(
    tile: tuple[int, int], width: int, stride: tuple[int, ...], grad_stride: tuple[int, ...], alpha_stride: int,
    masked: bool, shifted: bool, affine: bool,
) -> PreparedLaunch:  # fmt: skip
    """The same of backward."""
    decided = {
        **numbers_of(width, stride, grad_stride, *tile), "alpha_stride": alpha_stride, "HAS_MASK": masked,
        "HAS_SHIFT": shifted, "AFFINE": affine,
    }  # fmt: skip
    return _prepared(
        kernels_columns.backward_columns, width, decided, _BACKWARD, ("num_rows",),
        mask=masked, shift=shifted, weight=affine,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _columns_tile(
    rows: int, width: int, itemsize: int, stride: tuple[int, ...], grad_stride: tuple[int, ...] | None = None
) -> tuple[int, int] | None:
    """The tile of one launch, None if there must be two; ``grad_stride``: of backward."""
    strided = stride[1] != 1 or (grad_stride is not None and grad_stride[1] != 1)
    return columns_tile(rows, width, itemsize, backward=grad_stride is not None, strided=strided)


def _planned(x: Tensor, grad: Tensor | None = None, *, heavy: bool = False, waves: int = 1) -> _Plan:
    stride = x.stride()
    return _plan(*x.shape, x.element_size(), stride, stride if grad is None else grad.stride(), x.device, heavy, waves)


def _vectors(shift: Tensor | None, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    """Parameters as the kernels take them; absent ones need some pointer."""
    return {
        "alpha": alpha, "alpha_stride": alpha.stride(0),
        "weight": alpha if weight is None else weight.contiguous(), "bias": alpha if bias is None else bias.contiguous(),
        "shift": alpha if shift is None else shift.contiguous(), "HAS_SHIFT": shift is not None, "AFFINE": weight is not None,
    }  # fmt: skip


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _masked(mask: Tensor | None, x: Tensor) -> dict[str, Any]:
    return {"mask": x if mask is None else _bytes(mask), "HAS_MASK": mask is not None}


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _empty(x: Tensor) -> Tensor:
    """As x, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _three(x: Tensor, *parts: int, four: bool = False) -> Tensor:
    """[..., 3, C], or [..., 4, C] for sums where there is a shift."""
    return x.new_empty(*parts, 3 + four, x.shape[1], dtype=torch.float32)


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
    if gathered is None:
        stride = x.stride()
        tile = _columns_tile(*x.shape, x.element_size(), stride)
        if tile is not None:
            number, pointer = ((), step) if isinstance(step, Tensor) else ((float(step),), None)
            once = _one_forward(
                tile, x.shape[1], stride, alpha.stride(0), mask is not None, shift is not None, weight is not None,
                running_mean is not None, tracked is not None, pointer is not None, float(eps),
            )  # fmt: skip
            given = _given(
                x, y, normaliser, alpha, _bytes(mask), _contiguous(shift), _contiguous(weight), _contiguous(bias),
                running_mean, running_var, tracked, pointer,
            )  # fmt: skip
            with on_device(x):
                once(given, x.shape[0], *number)
            return y, normaliser
    plan = _planned(x)
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
    if training and gathered is None:
        stride, grad_stride = x.stride(), grad.stride()
        tile = _columns_tile(*x.shape, x.element_size(), stride, grad_stride)
        if tile is not None:
            once = _one_backward(
                tile, x.shape[1], stride, grad_stride, alpha.stride(0), mask is not None, four, weight is not None
            )  # fmt: skip
            result = _three(x, four=four)
            given = _given(
                x, grad, dx, result, normaliser, alpha, _bytes(mask), _contiguous(shift), _contiguous(weight),
                _contiguous(bias),
            )  # fmt: skip
            with on_device(x):
                once(given, x.shape[0])
            return dx, result
    plan = _planned(x, grad, heavy=four)
    operands: dict[str, Any] = {
        **plan.numbers, **_vectors(shift, alpha, weight, bias), "grad": grad, "x": x, "normaliser": normaliser,
    }  # fmt: skip
    with on_device(x):
        if not training:
            return dx, _finish(_sum_parts(x, dx, plan, operands), plan, moments=False)
        result = _three(x, four=four)
        operands.update(_masked(mask, x), sums=result)
        if gathered is None:
            _sum_parts(x, None, plan, operands)
        else:
            operands.update(parts=gathered, num_parts=len(gathered))
        operands["dx"] = dx
        launch(kernels_backward.apply_gradient, plan.grid, operands, **plan.options)
    return dx, result
