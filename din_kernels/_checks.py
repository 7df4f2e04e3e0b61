"""Argument errors. Every public call checks its arguments here before anything is launched or changed.

The messages name the argument, say what was given, what is expected and, where it is not obvious, how to get there.
Checks of *shapes, dtypes and devices* always run and never touch the data. Checks of *values* (offsets monotone, ids in
range) read the data and so would synchronise a GPU: on CPU tensors they always run, on GPU tensors only in debug mode
(``DIN_KERNELS_DEBUG=1``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    value: object,
    *,
    ndim: int | Sequence[int] | None = None,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    layout_hint: str = "",
) -> None:
    """Check one tensor argument; ``shape`` entries of ``None`` match any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else tuple(ndim)
        if value.dim() not in allowed:
            wanted = " or ".join(str(n) for n in allowed)
            raise ValueError(
                f"{name} must have {wanted} dimension(s){layout_hint}, got {value.dim()}: shape {tuple(value.shape)}"
            )
    if shape is not None:
        given = value.shape
        fits = len(given) == len(shape)
        if fits:
            for got, want in zip(given, shape, strict=True):  # a loop: this runs a dozen times before each launch
                if want is not None and got != want:
                    fits = False
        if not fits:
            wanted = "[" + ", ".join("any" if w is None else str(w) for w in shape) + "]"
            raise ValueError(f"{name} must have shape {wanted}{layout_hint}, got {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}: move it with .to('{device}')")


def values_readable(tensor: Tensor) -> bool:
    """Whether value checks may read ``tensor``: real data, and on a CPU or in debug mode."""
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or _backend.debug_enabled()


def check_offsets(offsets: Tensor, num_rows: int, *, name: str = "offsets") -> None:
    """Check the values of ``offsets``: start at 0, never decrease, end at ``num_rows`` (the rows of ``keys``)."""
    if not values_readable(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"{name}[0] must be 0, got {first}")
    if offsets.numel() > 1:
        steps = offsets[1:] - offsets[:-1]
        if bool((steps < 0).any()):
            at = int((steps < 0).nonzero()[0, 0])
            raise ValueError(
                f"{name} must not decrease, but {name}[{at}] = {int(offsets[at])} > {name}[{at + 1}] = {int(offsets[at + 1])}"
            )
    if last != num_rows:
        raise ValueError(f"{name}[-1] must equal the number of rows of keys, {num_rows}, got {last}")


def check_lengths(lengths: Tensor, max_length: int, *, name: str = "lengths") -> None:
    """Check the values of ``lengths``: 0 ≤ length ≤ ``max_length`` (the padded size T of keys)."""
    if not values_readable(lengths) or lengths.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < 0:
        raise ValueError(f"{name} must not be negative, got {low} at position {int(lengths.argmin())}")
    if high > max_length:
        raise ValueError(
            f"{name} must not exceed the padded length T = {max_length} of keys, got {high} at position {int(lengths.argmax())}"
        )


def check_ids(ids: Tensor, num_rows: int, *, name: str = "ids", force: bool = False) -> None:
    """Check that no id is ``num_rows`` or above (negative ids mean "missing" and are skipped by the kernels)."""
    if ids.numel() == 0 or not (force or values_readable(ids)):
        return
    high = int(ids.max())
    if high >= num_rows:
        raise IndexError(f"{name} must be below num_embeddings = {num_rows}, got {high}")
