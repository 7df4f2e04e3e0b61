"""Exported scorers, with and without compilation, give the model's scores at every size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from din_kernels.serving import Candidates, Visitor
from din_kernels.serving.export import compile_package, export

from ._models import expected_scores, make_model, make_request


def inputs(visitor: Visitor, candidates: Candidates) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(ids, dtype=torch.int64) for ids in (*visitor, *candidates))


@pytest.mark.parametrize(
    "config",
    [{}, {"interaction": "product", "softmax": True, "cross": True, "activation": "prelu", "unit_hidden": (9, 6)}],
)
def test_exported_program(config: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**config)
    torch.export.save(export(model, 64, 32), tmp_path / "scorer.pt2")
    program = torch.export.load(tmp_path / "scorer.pt2").module()
    for shape in ((2, 2), (9, 31), (64, 3), (5, 32)):
        pair = make_request(*shape)
        torch.testing.assert_close(
            program(*inputs(*pair)).double(), expected_scores(model, [pair])[0], rtol=1e-5, atol=1e-6
        )
    with pytest.raises((RuntimeError, AssertionError)):
        program(*inputs(*make_request(65, 3)))


def test_sizes_too_small_to_export() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        export(make_model(), 1, 5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_compiled_package(tmp_path: Path) -> None:
    model = make_model()
    path = compile_package(export(model, 64, 32), tmp_path / "scorer.pt2")
    program = torch._inductor.aoti_load_package(str(path))
    for shape in ((2, 2), (9, 31), (64, 3)):
        pair = make_request(*shape)
        torch.testing.assert_close(
            program(*inputs(*pair)).double(), expected_scores(model, [pair])[0], rtol=1e-5, atol=1e-6
        )
