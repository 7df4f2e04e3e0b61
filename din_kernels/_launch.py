"""Launching on the tensor's own device, whatever the current device is."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import _backend


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on ``tensor``'s GPU; a no-op for CPU tensors (the interpreter)."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    repair_interpreter()
    return contextlib.nullcontext()


@functools.cache
def repair_interpreter() -> None:
    """Let kernels with run-time loop bounds (``range(first, last)``) run in the interpreter under NumPy ≥ 2.4.

    Triton keeps scalars as arrays of one element and converts them by ``int(array)``, which NumPy 2.4 refuses for
    anything but zero dimensions (seen with Triton 3.6). ``array.item()`` means the same in every version. Without the
    interpreter, or where Triton's internals look different, nothing is changed.
    """
    if not (_backend.interpreting() and _backend.has_triton()):
        return
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # The interpreter restores attributes from the scope where it has one (3.6); older versions set them for good.
        setter = scope[0].set_attr if scope and hasattr(scope[0], "set_attr") else setattr
        setter(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
