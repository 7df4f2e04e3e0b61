"""Shipped launch configurations, and the list of kernels that must compile well on machines that are not here.

Nothing is tuned at run time unless asked for: every operation's ``shipped.py`` maps a problem (widths, dtype, average
length) to one configuration, so a first call neither benchmarks nor stalls, and results do not depend on what ran before.

``CompileCase`` describes one kernel with one configuration so that it can be compiled ahead of time, without a GPU, and
its registers, stack, shared memory and instruction counts held to a budget (``benchmarks/static_budget.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel, one shipped configuration.

    name        unique and stable, e.g. ``"local_activation/forward_packed/product-D64-80x40-sigmoid-bf16"``
    kernel      the ``@triton.jit`` function
    signature   runtime argument -> Triton type, e.g. ``{"keys": "*bf16", "num_rows": "i64"}``; a tuple of types for an
                argument that is a tuple
    constexprs  compile-time argument -> value
    rows        behaviour rows (or elements, see ``unit``) that one trip of the kernel's main loop handles per program
    unit        what ``rows`` counts
    aligned     names of arguments promised to be divisible by 16 (pointers from the allocator, padded strides)
    targets     architectures: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``
    stack       bytes of stack a thread may use at most; 0 but where the kernel is known to be the best there is even so
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    rows: int = 0
    unit: str = "row"
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("sm_80", "sm_90", "gfx942")
    options: Mapping[str, Any] = field(default_factory=dict)
    stack: int = 0
