"""Which implementation serves a call: the Triton kernels or the plain-torch twin.

``backend=None``      automatic: Triton for CUDA/HIP tensors when Triton is installed and the GPU is one that it supports
                      (NVIDIA: compute capability 8.0 and newer), torch otherwise.
``backend="triton"``  the kernels; raises where they cannot run. With ``TRITON_INTERPRET=1`` they run on CPU tensors.
``backend="torch"``   the vectorised torch implementation, on any device.

The environment variable ``DIN_KERNELS_BACKEND`` sets what ``None`` means. An explicit request that cannot be served
raises; an automatic choice that has to leave the fast path says so once, in the log ``din_kernels``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

logger = logging.getLogger("din_kernels")

_Function = TypeVar("_Function", bound=Callable[..., Any])

BACKENDS = ("triton", "torch")

# Ampere: the oldest that Triton supports, and that the kernels are compiled and budgeted for.
OLDEST_CAPABILITY = (8, 0)


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run here; the message says what is missing."""


_TRITON_FOUND = importlib.util.find_spec("triton") is not None  # at import: every call asks


def has_triton() -> bool:
    """Whether the ``triton`` package is installed (it is not imported to find out)."""
    return _TRITON_FOUND


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def debug_enabled() -> bool:
    """Debug mode (``DIN_KERNELS_DEBUG=1``): values are checked too, at the price of a host synchronisation per call."""
    return os.environ.get("DIN_KERNELS_DEBUG", "0").lower() in ("1", "true", "yes", "on")


def while_tracing(function: _Function) -> _Function:
    """torch.compile, when it meets ``function``, calls it and takes the result for a constant instead of tracing what it does:
    ``torch.compiler.assume_constant_result``, which imports the whole compiler to set this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_said: set[str] = set()


@while_tracing
def log_once(message: str) -> None:
    """Log ``message`` at warning level the first time it is said in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def check_name(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {backend!r}")


_VARIABLE = "DIN_KERNELS_BACKEND"
# Every call asks for a variable that is hardly ever set, and ``os.environ`` takes longer to say so than a small operation takes
# to run: it raises and catches. What lies behind it in CPython is a dictionary.
_environment: Any = getattr(os.environ, "_data", os.environ)
_key = os.environ.encodekey(_VARIABLE) if _environment is not os.environ else _VARIABLE


@while_tracing
def requested() -> str | None:
    """The backend that ``DIN_KERNELS_BACKEND`` names; None where it names none, or "auto"."""
    if _key not in _environment:
        return None
    named = os.environ[_VARIABLE].strip().lower()
    return None if named in ("", "auto") else named


_too_old: dict[torch.device, str] = {}


@while_tracing
def why_too_old(device: torch.device) -> str:
    """What keeps the kernels off the GPU ``device``; empty if nothing does, or nobody can tell: it is not here (fake tensors).
    Every call asks, so the answer is kept, though not that of "the current device"."""
    reason = _too_old.get(device)
    if reason is None:
        reason = _look_up_age(device)
        if device.index is not None:
            _too_old[device] = reason
    return reason


def _look_up_age(device: torch.device) -> str:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) >= OLDEST_CAPABILITY:
        return ""
    oldest = ".".join(map(str, OLDEST_CAPABILITY))
    return (
        f"'{device}' ({properties.name}) has compute capability {properties.major}.{properties.minor}, "
        f"and Triton needs {oldest} or newer"
    )


def resolve(backend: str | None, device: torch.device) -> str:
    """Return ``"triton"`` or ``"torch"`` for tensors on ``device``.

    Raises ``BackendUnavailable`` when ``backend="triton"`` (as an argument or through ``DIN_KERNELS_BACKEND``) cannot
    serve: Triton is not installed, the GPU is older than Triton supports, or the tensors are on a CPU and the interpreter
    is not switched on.
    """
    check_name(backend)
    if backend is None:
        named = requested()
        if named is None:
            if device.type != "cuda" or not has_triton():
                return "torch"
            reason = why_too_old(device)
            if not reason or interpreting():
                return "triton"
            log_once(f"{reason}; the torch backend serves it")
            return "torch"
        if named not in BACKENDS:
            raise ValueError(f"DIN_KERNELS_BACKEND must be 'triton', 'torch' or 'auto', got {named!r}")
        backend = named
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
    if device.type == "cuda" and (reason := why_too_old(device)) and not interpreting():
        raise BackendUnavailable(
            f"backend='triton' was asked for but {reason}: use backend='torch', or leave backend=None, which chooses it here"
        )
    return "triton"
