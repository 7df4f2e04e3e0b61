"""Which implementation serves a call: the Triton kernels or the plain-torch twin.

``backend=None``      automatic: Triton for CUDA/HIP tensors when Triton is installed, torch otherwise.
``backend="triton"``  the kernels; raises where they cannot run. With ``TRITON_INTERPRET=1`` they run on CPU tensors.
``backend="torch"``   the vectorised torch implementation, on any device.

The environment variable ``DIN_KERNELS_BACKEND`` sets what ``None`` means. An explicit request that cannot be served
raises; an automatic choice that has to leave the fast path says so once, in the log ``din_kernels``.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger("din_kernels")

BACKENDS = ("triton", "torch")


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run here; the message says what is missing."""


_TRITON_FOUND = importlib.util.find_spec("triton") is not None  # at import: torch.compile warns of cached functions


def has_triton() -> bool:
    """Whether the ``triton`` package is installed (it is not imported to find out)."""
    return _TRITON_FOUND


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def debug_enabled() -> bool:
    """Debug mode (``DIN_KERNELS_DEBUG=1``): values are checked too, at the price of a host synchronisation per call."""
    return os.environ.get("DIN_KERNELS_DEBUG", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def log_once(message: str) -> None:
    """Log ``message`` at warning level the first time it is said in this process."""
    logger.warning(message)


def check_name(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {backend!r}")


def resolve(backend: str | None, device: torch.device) -> str:
    """Return ``"triton"`` or ``"torch"`` for tensors on ``device``.

    Raises ``BackendUnavailable`` when ``backend="triton"`` (as an argument or through ``DIN_KERNELS_BACKEND``) cannot
    serve: Triton is not installed, or the tensors are on a CPU and the interpreter is not switched on.
    """
    check_name(backend)
    if backend is None:
        requested = os.environ.get("DIN_KERNELS_BACKEND", "").strip().lower() or None
        if requested in (None, "auto"):
            return "triton" if device.type == "cuda" and has_triton() else "torch"
        if requested not in BACKENDS:
            raise ValueError(f"DIN_KERNELS_BACKEND must be 'triton', 'torch' or 'auto', got {requested!r}")
        backend = requested
    if backend == "torch":
        return "torch"
    if not has_triton():
        raise BackendUnavailable(
            "backend='triton' was asked for but the triton package is not installed: pip install triton (Linux), "
            "or use backend='torch'"
        )
    if device.type != "cuda" and not interpreting():
        raise BackendUnavailable(
            f"backend='triton' was asked for but the tensors are on '{device}': move them to a GPU, use backend='torch', "
            "or set TRITON_INTERPRET=1 before importing din_kernels to run the kernels in Triton's (slow) CPU interpreter"
        )
    return "triton"
