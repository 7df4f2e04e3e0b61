"""Launches of ``kernels_packed_statistics.py`` and ``kernels_packed_sums.py``: what Dice in training, and gradients of softmax
weights, need of all rows first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._launch import FUSED, launch, on_device
from . import kernels_packed_statistics as kernels_statistics
from . import kernels_packed_sums as kernels
from .dice_statistics import Moments, merge
from .packed import Packed, describes, finish_lists, widths_of
from .problem import UnitConfig, UnitOutputs, UnitTensors
from .universal import capability_of, num_programs

# The sums have no registers left to fetch ahead.
OPTIONS: dict[str, int] = {"num_warps": 4, "num_stages": 1, **FUSED}


def channels(config: UnitConfig) -> tuple[int, int]:
    """Of the two layers, with padding."""
    widths = widths_of(config)
    return widths.a1 + widths.r1, widths.a2 + widths.r2


@functools.lru_cache(maxsize=256)
def statistics_options(config: UnitConfig) -> dict[str, int]:
    """Two tiles ahead where registers allow."""
    light = config.embedding_dim <= 64 and sum(channels(config)) <= 48
    return {**OPTIONS, "num_stages": 3 if light else 1}


def fits_statistics(config: UnitConfig, dtype: torch.dtype, capability: int, layer: int) -> bool:
    """As ``packed.fits``, for the statistics of ``layer``: moments take a register a channel and row besides, but the weights
    of the layers above none."""
    widths, (first, second) = widths_of(config), channels(config)
    if dtype == torch.float32 or config.embedding_dim > 128 or first + layer * second > 128:
        return False
    older = capability < 90
    if layer == 0:
        return first <= 96 or not older
    if config.embedding_dim <= 64:
        return True
    return first <= 64 and first + second <= (112 if older else 96 if widths.r1 else 128)


def serves_statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> bool:
    if layer > 1 or not describes(config, tensors):
        return False
    return fits_statistics(config, tensors.keys.dtype, capability_of(tensors.keys.device), layer)


def moments_of_programs(call: Packed, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``universal.moments_of_programs``."""
    device, width = call.tensors.keys.device, call.config.hidden_units[layer]
    programs = max(1, min(call.tables.tiles, num_programs(device, 4)))
    counts = torch.empty(programs, dtype=torch.int64, device=device)
    means = torch.empty(programs, width, dtype=torch.float32, device=device)
    m2s = torch.empty_like(means)
    operands = {
        **call.operands(), "counts": counts, "means": means, "m2s": m2s, "LAYER": layer
    }  # fmt: skip
    with on_device(call.tensors.keys):
        launch(kernels_statistics.statistics_packed, (programs,), operands, **statistics_options(call.config))
    return counts, means, m2s


def statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> Moments:
    """As ``universal.statistics``."""
    return merge(*moments_of_programs(Packed(config, tensors), layer))


def hands_on(config: UnitConfig) -> bool:
    """Whether ``backward_sums`` leaves ds of every slot to the kernels after it. With one narrow layer there is one, which
    finds ds in fewer instructions than handing it on takes."""
    return len(config.hidden_units) > 1 or sum(channels(config)) > 64


def sums_of_layers(
    widths: Sequence[int], inv_count: Tensor, gather: Callable[[int, dict[str, Tensor]], Tensor]
) -> Tensor:
    """Dice's two sums of every layer, times 1 / count: [H1, H1, H2, H2] flat. ``gather(layer, {sums1, sums2})``: those of a
    layer by program, [P, 2 · H]; of the top layer first, as what comes down to the one below has the top's in it."""
    sums = torch.empty(2 * sum(widths), dtype=torch.float32, device=inv_count.device)
    known = {"sums1": sums, "sums2": sums[2 * widths[0] :]}
    for layer in reversed(range(len(widths))):
        begin, size = 2 * sum(widths[:layer]), 2 * widths[layer]
        torch.mul(gather(layer, known).sum(0), inv_count, out=sums[begin : begin + size])
    return sums


def dice_sums(call: Packed, operands: dict[str, Any], inv_count: Tensor) -> Tensor:
    """As ``Backward.sums`` of universal_backward.py, from the ``operands`` of ``backward_scores``, whose ``score_gradients`` it
    fills where it ``hands_on``."""
    widths, device = call.config.hidden_units, inv_count.device
    programs = max(1, min(call.tables.tiles, num_programs(device, 3)))

    def gather(layer: int, known: dict[str, Tensor]) -> Tensor:
        partial = torch.empty(programs, 2 * widths[layer], dtype=torch.float32, device=device)
        of_layer = {**operands, **known, "partial": partial, "LAYER": layer}
        launch(kernels.backward_sums, (programs,), of_layer, **OPTIONS)
        return partial

    return sums_of_layers(widths, inv_count, gather)


def score_operands(
    call: Packed, saved: UnitOutputs, grad_pooled: Tensor, grad_weights: Tensor | None, inv_count: Tensor | None
) -> dict[str, Any]:
    """What the kernels of scores, backward, read in 16 bits as in fp32; one that does not exist repeats another. Gradients
    are contiguous."""
    config, log_normaliser = call.config, saved.log_normaliser
    return {
        **call.operands(), "grad_pooled": grad_pooled,
        "grad_weights": grad_pooled if grad_weights is None else grad_weights,
        "log_normaliser": grad_pooled if log_normaliser is None else log_normaliser.contiguous(),
        "delta": softmax_delta(call, saved, grad_pooled, grad_weights) if config.softmax else grad_pooled,
        "score_gradients": grad_pooled, "sums1": grad_pooled, "sums2": grad_pooled,  # of Dice, until they are known
        "scale": float(config.scale), "SOFTMAX": config.softmax, "HAS_GRAD_WEIGHTS": grad_weights is not None,
        "BATCH_STATISTICS": inv_count is not None, "HANDS_ON": inv_count is not None and hands_on(config),
    }  # fmt: skip


def softmax_delta(call: Packed, saved: UnitOutputs, grad_pooled: Tensor, grad_weights: Tensor | None) -> Tensor:
    """δ_q = g · u_q + Σ_j a_j · ∂L/∂a_j, fp32 [Q]; one candidate a list."""
    delta = (grad_pooled.float() * saved.pooled.float()).sum(1)
    if grad_weights is None:
        return delta
    assert saved.weights is not None
    tables, queries, device = call.tables, call.queries, delta.device
    of_weights = torch.empty(queries, 1, dtype=torch.float32, device=device)
    carry = torch.empty(2 * tables.tiles, 1, dtype=torch.float32, device=device)
    operands = {
        **tables.operands(), "weights": saved.weights, "grad_weights": grad_weights, "sums": of_weights, "carry": carry,
        "queries": queries,
    }  # fmt: skip
    grid = (min(tables.tiles, num_programs(device, 8)),)
    launch(kernels.weighted_gradients_packed, grid, operands, num_warps=2)
    finish_lists(tables, carry, of_weights)
    return delta + of_weights[:, 0]
