"""One ``torch.library`` namespace for all operations, defined idempotently.

``define`` declares a schema once per process and registers its implementations and its fake (shape-only) twin. The
thin ``Library.define`` / ``impl`` route is used instead of ``custom_op`` because its dispatch costs a third as much on
the host, which for kernels of ten microseconds is most of the time a user sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._backend import while_tracing

NAMESPACE = "din_kernels"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_defined: set[str] = set()
_EVERYWHERE = "CompositeExplicitAutograd"
_are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state
_PLAIN = (Tensor, torch.nn.Parameter)
_implementations: dict[Any, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    impls: dict[str, Callable[..., Any]],
    direct: Callable[..., Any] | None = None,
) -> Any:
    """Declare ``schema`` (``"name(Tensor x, ...) -> Tensor"``) and return the callable operator.

    ``impls`` maps a dispatch key (``"CPU"``, ``"CUDA"``, ``"CompositeExplicitAutograd"``) to an implementation; ``direct`` is
    what ``run`` calls where nobody listens, by default the last of those keys'. Calling it again for a name that exists (a
    module reload) returns the existing operator.
    """
    name = schema.split("(", 1)[0].strip()
    if name not in _defined:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key, function in impls.items():
            _library.impl(name, function, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        _defined.add(name)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    direct = direct or impls.get(_EVERYWHERE)
    if direct is not None:
        _implementations.setdefault(operator, direct)
    return operator


def is_compiling() -> bool:
    """Whether ``torch.compile`` traces. ``torch.export`` does not count: what it writes down are our operators, with the
    backend of the device that it was exported on."""
    return torch.compiler.is_compiling() and not _is_exporting()


@while_tracing
def _is_exporting() -> bool:
    """Asked outside the graph: before torch 2.13 ``torch.compile`` takes the answer for granted."""
    return torch.compiler.is_exporting()


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nobody traces or intercepts: plain tensors with memory, no dispatch mode, transform of torch.func or tracer."""
    if torch.compiler.is_compiling() or _are_transforms_active() or _tracing_state() is not None:
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
            return False
    return _get_current_dispatch_mode() is None


def run(operator: Any, eager: bool, *arguments: Any) -> Any:
    """``operator(*arguments)``; if ``eager`` (see ``is_eager``) directly what its dispatch leads to: boxing the arguments and
    the way through the dispatcher take longer than a small kernel. For operators with one implementation for all devices,
    where autograd records nothing."""
    return _implementations[operator](*arguments) if eager else operator(*arguments)
