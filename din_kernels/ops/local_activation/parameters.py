"""Memory for the gradients of parameters, which kernels write in the parameters' own dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def like(parameter: Tensor) -> Tensor:
    """Contiguous, whatever the parameter is."""
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


class Slopes:
    """Gradients of the activations' slopes, one each layer of ``widths``. ``memory``: what kernels write, a number a channel;
    of a slope that all channels share in fp32, and ``gradients`` adds it up."""

    def __init__(self, alphas: Sequence[Tensor | None], widths: Sequence[int]) -> None:
        self.alphas = alphas
        self.shared = [alpha is not None and alpha.numel() != h for alpha, h in zip(alphas, widths, strict=True)]
        self.memory = [
            None if alpha is None else alpha.new_empty(h, dtype=torch.float32) if one else like(alpha)
            for alpha, h, one in zip(alphas, widths, self.shared, strict=True)
        ]

    def gradients(self) -> list[Tensor | None]:
        """In the shapes and dtypes of the slopes."""
        return [
            value.sum().to(alpha.dtype).view(alpha.shape) if one and alpha is not None and value is not None else value
            for alpha, one, value in zip(self.alphas, self.shared, self.memory, strict=True)
        ]
