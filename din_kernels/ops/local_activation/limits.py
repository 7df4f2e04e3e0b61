"""What the Triton kernels of the local activation unit serve. Beyond these limits the torch backend does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_EMBEDDING_DIM = 256
MAX_HIDDEN_LAYERS = 3
MAX_WIDTH = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unsupported(dtype: torch.dtype, embedding_dim: int, hidden_units: Sequence[int]) -> str | None:
    """The reason why the kernels cannot serve such a unit, for a message; None when they can."""
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= embedding_dim <= MAX_EMBEDDING_DIM:
        return f"embedding_dim {embedding_dim} is outside the Triton kernels' range 1..{MAX_EMBEDDING_DIM}"
    if not 1 <= len(hidden_units) <= MAX_HIDDEN_LAYERS:
        return f"{len(hidden_units)} hidden layers are outside the Triton kernels' range 1..{MAX_HIDDEN_LAYERS}"
    if min(hidden_units) < 1 or max(hidden_units) > MAX_WIDTH:
        return f"hidden widths {tuple(hidden_units)} are outside the Triton kernels' range 1..{MAX_WIDTH}"
    return None
