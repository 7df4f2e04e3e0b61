"""Kernels broken on purpose, to see that the checks notice."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import din_kernels.ops.local_activation as package


def load_mutant(
    monkeypatch: pytest.MonkeyPatch, directory: Path, modules: Sequence[str], module: str, old: str, new: str
) -> None:
    """Put copies of ``modules``, of which later ones import from earlier ones, in place of the originals, with ``old``
    replaced in ``module``, once or more."""
    changed = False
    for name in modules:
        source = Path(package.__file__).with_name(f"{name}.py").read_text()
        if name == module:
            changed = old in source
            source = source.replace(old, new)
        path = directory / f"{name}.py"
        path.write_text(source)
        full = f"{package.__name__}.{name}"
        original = importlib.import_module(full)
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, mutant)
        for holder in [m for key, m in sys.modules.items() if key.startswith(package.__name__) and m is not mutant]:
            for attribute, value in list(vars(holder).items()):
                if value is original:  # the package's, and those of modules that launch its kernels
                    monkeypatch.setattr(holder, attribute, mutant)
        spec.loader.exec_module(mutant)
    assert changed, f"nothing to break: {old!r}"
