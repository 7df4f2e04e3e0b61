"""One ``torch.library`` namespace for all operations, defined idempotently.

``define`` declares a schema once per process and registers its implementations and its fake (shape-only) twin. The
thin ``Library.define`` / ``impl`` route is used instead of ``custom_op`` because its dispatch costs a third as much on
the host, which for kernels of ten microseconds is most of the time a user sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "din_kernels"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_defined: set[str] = set()


def define(schema: str, *, fake: Callable[..., Any], impls: dict[str, Callable[..., Any]]) -> Any:
    """Declare ``schema`` (``"name(Tensor x, ...) -> Tensor"``) and return the callable operator.

    ``impls`` maps a dispatch key (``"CPU"``, ``"CUDA"``, ``"CompositeExplicitAutograd"``) to an implementation. Calling it
    again for a name that exists (a module reload) returns the existing operator.
    """
    name = schema.split("(", 1)[0].strip()
    if name not in _defined:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key, function in impls.items():
            _library.impl(name, function, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        _defined.add(name)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
