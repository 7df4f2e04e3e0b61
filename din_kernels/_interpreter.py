"""Repairs of Triton's interpreter, which runs the kernels on CPUs where ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import functools
from typing import Any

from . import _backend


@functools.cache
def repair_interpreter() -> None:
    """Make Triton's interpreter (seen in 3.6) compute what the compiled kernels do.

    * Run-time loop bounds, ``range(first, last)``: Triton keeps scalars as arrays of one element and converts them by
      ``int(array)``, which NumPy 2.4 refuses for anything but zero dimensions; ``array.item()`` means the same.
    * bfloat16 lives in arrays of its bit patterns: ``tl.dot`` multiplied the patterns as integers, conversion from
      float32 truncated instead of rounding to nearest even, and there were no constants but 0.
    * A comparison of scalars is labelled with the operands' dtype (seen in 3.9): broadcast, it became an integer, which
      no load takes for a mask.

    Without the interpreter, or where Triton's internals look different, nothing is changed.
    """
    if not (_backend.interpreting() and _backend.has_triton()):
        return
    from triton.runtime import interpreter

    _repair_loop_bounds(interpreter)
    _repair_bfloat16(interpreter)
    _repair_comparisons(interpreter)


def _repair_loop_bounds(interpreter: Any) -> None:
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # The interpreter restores attributes from the scope where it has one (3.6); older versions set them for good.
        setter = scope[0].set_attr if scope and hasattr(scope[0], "set_attr") else setattr
        setter(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def _repair_bfloat16(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    convert = getattr(interpreter, "_convert_float", None)
    builder = getattr(interpreter, "InterpreterBuilder", None)
    dot, handle = getattr(builder, "create_dot", None), getattr(interpreter, "TensorHandle", None)
    if builder is None or convert is None or dot is None or handle is None:
        return

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """Bit patterns of ``data`` in the dtype ``target`` (callers view them as they need)."""
        if source == tl.bfloat16 and target == tl.float32:
            return data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        if source == tl.float32 and target == tl.bfloat16 and rounding is None:
            bits = np.ascontiguousarray(data).view(np.uint32)
            even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            rounded = ((bits + even) >> np.uint32(16)).astype(np.uint16)
            return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)  # the sum may carry a NaN over to 0
        return convert(data, source, target, rounding)

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = converted(np.ascontiguousarray(operand.data), tl.bfloat16, tl.float32, None)
        return handle(wide.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(converted(np.array([value], np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16)

    interpreter._convert_float = converted
    builder.create_dot = create_dot
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = get_bf16


def _repair_comparisons(interpreter: Any) -> None:
    import triton.language as tl

    builder = getattr(interpreter, "InterpreterBuilder", None)
    splat, handle = getattr(builder, "create_splat", None), getattr(interpreter, "TensorHandle", None)
    if builder is None or splat is None or handle is None:
        return

    def create_splat(self: Any, shape: Any, argument: Any) -> Any:
        if argument.data.dtype == bool and argument.dtype != tl.int1:
            argument = handle(argument.data, tl.int1)
        return splat(self, shape, argument)

    builder.create_splat = create_splat
