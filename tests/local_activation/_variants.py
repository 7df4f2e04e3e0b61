"""What launches hand over to kernels as compile-time or specialised: each different set of it is compiled anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch


def variant(arg_names: Collection[str], args: tuple, options: Mapping[str, Any], free: Collection[str]) -> tuple:
    """The key under which Triton would keep the compiled kernel, but for the arguments ``free``, which kernels mark
    ``do_not_specialize`` (the interpreter does not keep the marks)."""
    values = {**dict(zip(arg_names, args, strict=False)), **options}
    return tuple(
        (name, (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, torch.Tensor) else value)
        for name, value in sorted(values.items())
        if name not in free and not isinstance(value, float)
    )


class _Recorder:
    def __init__(self, kernel: Any, seen: set[tuple], free: Collection[str]) -> None:
        self.kernel, self.seen, self.free, self.arg_names = kernel, seen, free, kernel.arg_names

    def __getitem__(self, grid: tuple) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.seen.add(variant(self.arg_names, args, options, self.free))
            return self.kernel[grid](*args, **options)

        return launch


def record_variants(
    monkeypatch: pytest.MonkeyPatch, kernels: Mapping[ModuleType, Collection[str]], free: Collection[str]
) -> dict[str, set[tuple]]:
    """Variants of each of ``kernels``, by name, that the launches from now on ask for."""
    seen: dict[str, set[tuple]] = {name: set() for names in kernels.values() for name in names}
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, _Recorder(getattr(module, name), seen[name], free))
    return seen
