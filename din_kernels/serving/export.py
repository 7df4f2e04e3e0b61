"""The scorer without Python: ``torch.export`` and AOTInductor packages of the torch backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .network import VisitorNetwork
from .parts import DinParts


def export(model: Any, max_behaviours: int, max_candidates: int) -> torch.export.ExportedProgram:
    """One visitor's scoring as an exported program, any number of behaviours and candidates up to the given ones.

    Inputs, int64: history_item [T], history_category [T], profile [F], item [C], category [C]; output: logits [C]. The graph
    holds the folded parameters and the embedding tables. Each of T and C must be at least 2: tracing takes sizes 0 and 1 for
    constants. Pad the candidates with any id and drop its score; a visitor without behaviours needs ``Scorer``, as does the
    Triton backend (its launches depend on lengths), whose own operators export with the training model.
    """
    if max_behaviours < 2 or max_candidates < 2:
        raise ValueError("max_behaviours and max_candidates must be at least 2")
    network = VisitorNetwork(DinParts.of(model), chunked=False).eval()
    behaviours = torch.export.Dim("behaviours", min=2, max=max_behaviours)
    candidates = torch.export.Dim("candidates", min=2, max=max_candidates)
    device = network.item_table.device

    def ids(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device=device)

    t, c = min(7, max_behaviours), min(5, max_candidates)
    with torch.no_grad():
        return torch.export.export(
            network, (ids(t), ids(t), ids(network.fields), ids(c), ids(c)),
            dynamic_shapes=({0: behaviours}, {0: behaviours}, None, {0: candidates}, {0: candidates}),
        )  # fmt: skip


def compile_package(program: torch.export.ExportedProgram, path: Path | str) -> Path:
    """Compile an exported scorer to machine code with AOTInductor (needs a C++ compiler) and write it to ``path`` (.pt2).

    ``torch._inductor.aoti_load_package(path)`` loads it in Python, ``AOTIModelPackageLoader`` in C++.
    """
    return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))
