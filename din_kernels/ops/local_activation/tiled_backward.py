"""Launches of the tiled backward kernel (``kernels_tiled_backward.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch
from . import kernels_tiled_backward as kernels
from . import packed, universal_backward
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .universal import PARAMETER_VECTORS, Prepared, Tiling, capability_of

TILE, NUM_WARPS, NUM_STAGES = 64, 4, 2
GATES = 7  # as in kernels_tiled_backward.py


# dz1 and a of all rows rest in memory between the steps; beyond this the universal kernels, which need none of it.
HELD_BYTES = 1 << 30


def fits(
    config: UnitConfig, dtype: torch.dtype, capability: int, *, masked: bool = False, through_weights: bool = False
) -> bool:
    """As ``packed.fits``, for the tiled backward kernel (``shipped_tiled_backward.compile_cases`` holds it to that): one
    narrow layer of the outer interaction. An embedding in two blocks leaves no room for a mask or a gradient through the
    weights, and sm_80 none for a column of 64."""
    widths = packed.widths_of(config)
    if config.interaction != "outer" or dtype == torch.float32 or config.embedding_dim > 64 or capability < 90:
        return False
    if len(config.hidden_units) > 1 or widths.a1 + widths.r1 > 48:
        return False
    return not (widths.rd and (masked or through_weights))


def serves_backward(config: UnitConfig, tensors: UnitTensors, grad_weights: Tensor | None) -> bool:
    """Whether the tiled backward takes this call; the universal kernels take all others."""
    keys = tensors.keys
    if len(config.hidden_units) > 1 or config.candidates > 1 or tensors.gathered is not None:
        return False
    if tensors.query.shape[0] == 0 or keys.shape[0] == 0:
        return False
    if keys.shape[0] * (config.hidden_units[0] * keys.element_size() + 4) > HELD_BYTES:
        return False
    masked, through = tensors.row_mask is not None, grad_weights is not None
    return fits(config, keys.dtype, capability_of(keys.device), masked=masked, through_weights=through)


def tiles_of(config: UnitConfig) -> Tiling:
    """The part of ``Tiling`` that launches use; blocks of columns are ``packed.Widths``."""
    return Tiling(TILE, 0, (0, 0, 0), packed.next_power_of_two(config.embedding_dim), NUM_WARPS)


def launch_options() -> dict[str, int]:
    return {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES, **FUSED}


def shape_constants(config: UnitConfig) -> dict[str, Any]:
    return {
        **packed.shape_constants(config), "T": TILE, "VECTORS": PARAMETER_VECTORS[config.activation],
        "OUTER": config.interaction == "outer",
    }  # fmt: skip


class Backward(universal_backward.Backward):
    """One call of the tiled kernel."""

    def prepare(self) -> Prepared:
        config = self.config
        return Prepared(config, self.tensors, layers=len(config.hidden_units), tiles=tiles_of(config), backward=True)

    def private_columns(self) -> int:
        """In whole steps of 16, so that matrices are aligned."""
        return -(-universal_backward.private_columns(self.config) // 16) * 16

    def places(self, vectors: int, matrices: int) -> tuple[int, int]:
        return matrices, 0

    def kernel_arguments(self) -> dict[str, Any]:
        config, call, keys = self.config, self.call, self.tensors.keys
        widths, rows = packed.widths_of(config), keys.shape[0]
        first, second = widths.a1 + widths.r1, widths.a2 + widths.r2
        dz1 = keys.new_empty(rows, first)
        return {
            **shape_constants(config), "HAS_MASK": self.tensors.row_mask is not None,
            "PRECISION": packed.kernel_precision(config, keys.dtype), "FAST": packed.fast_instructions(),
            "CONTIGUOUS": packed.is_contiguous(keys),
            "attention": torch.empty(rows, dtype=torch.float32, device=keys.device), "dz1": dz1,
            "h1": keys.new_empty(rows, first) if second else dz1, "dz2": keys.new_empty(rows, second) if second else dz1,
            "gates": torch.empty(call.programs, GATES * sum(config.hidden_units), dtype=torch.float32, device=keys.device),
        }  # fmt: skip

    def launch(self, gather: int, **arguments: Any) -> None:
        everything = {**self.arguments, **arguments, "GATHER": gather, "PRIVATE": arguments["private"].shape[1]}
        for step in range(1, 2 if gather >= 0 else 2 + len(self.config.hidden_units)):
            launch(kernels.backward_tiled, (self.call.programs,), {**everything, "STEP": step}, **launch_options())


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    """Gradients of everything; see torch_impl.backward."""
    return universal_backward.gradients(Backward(config, tensors, saved, grad_pooled, grad_weights, inv_count))
