"""The sparse update in plain torch: sort, find the runs, segment sum, update the touched rows.

Deterministic on a CPU: ``embedding_bag`` adds each run in order, ``index_copy_`` writes each row once. On a GPU it works
too, but the number of touched rows must reach the host (one synchronisation per update); the Triton kernels need none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import key_dtype

_MASK32 = 0xFFFFFFFF


def plan(ids: Tensor, num_rows: int, padding: int) -> tuple[Tensor, Tensor]:
    """Sorted keys and order; see ``SparsePlan``."""
    flat = ids.reshape(-1)
    dtype = key_dtype(num_rows)
    all_used = False
    if flat.device.type == "cpu" and padding < 0 and flat.numel():
        low, high = (int(x) for x in torch.aminmax(flat))
        all_used = low >= 0 and high < num_rows
    if all_used:
        keys = flat.to(dtype)
    else:
        used = (flat >= 0) & (flat < num_rows) & (flat != padding)
        keys = torch.where(used, flat.to(torch.int64), num_rows).to(dtype)
    sorted_keys, order = torch.sort(keys, stable=True)
    return sorted_keys, order


def _mix(x: Tensor) -> Tensor:
    """The kernels' 32-bit finaliser, in int64 (products wrap modulo 2^64, whose low half is what counts)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def noise(seed: Tensor, rows: Tensor, width: int) -> Tensor:
    """32 random bits per (seed, row, column) as int64 [rows, width]: the same bits as in the kernels."""
    seed = seed.to(torch.int64)
    h = _mix(seed & _MASK32)
    h = _mix(h ^ ((seed >> 32) & _MASK32))
    h = _mix(h ^ (rows & _MASK32))
    h = _mix(h ^ ((rows >> 32) & _MASK32))
    return _mix(h[:, None] ^ torch.arange(width, device=rows.device))


def round_stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 ``x`` to bf16 or fp16, up or down with probability proportional to nearness; NaN and ∞ stay."""
    raw = x.view(torch.int32).to(torch.int64) & _MASK32
    if dtype is torch.bfloat16:
        moved = (raw + (bits & 0xFFFF)) & 0xFFFF0000
    else:
        moved = (raw + (bits & 0x1FFF)) & 0xFFFFE000
    rounded = (moved - ((moved >> 31) << 32)).to(torch.int32).view(torch.float32)
    if dtype is torch.float16:
        fraction = (bits & 0x1FFF).to(torch.float32) * 2.0**-13
        small = torch.floor(x * 2.0**24 + fraction) * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, small, rounded)
    return torch.where(x == x, rounded, x).to(dtype)


def apply(
    weight: Tensor,
    state0: Tensor | None,
    state1: Tensor | None,
    keys: Tensor,
    order: Tensor,
    grad: Tensor,
    occurrences: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
    *,
    lr: float | Tensor,
    grad_scale: float | Tensor,
    bias: float | Tensor,
    reg_lambda: float,
    eps: float,
    betas: tuple[float, float],
    optimizer: str,
    regularizer: str,
    coupled: bool,
) -> None:
    """Update ``weight`` [V, D] and its states in place; ``seed`` (given) switches stochastic rounding on."""
    if found_inf is not None and bool(found_inf):
        return
    rows, counts = torch.unique_consecutive(keys, return_counts=True)
    if rows.numel() and int(rows[-1]) == weight.shape[0]:  # the skipped occurrences
        rows, counts = rows[:-1], counts[:-1]
    if not rows.numel():
        return
    rows = rows.to(torch.int64)
    ends = counts.cumsum(0)
    compute = torch.float64 if weight.dtype is torch.float64 else torch.float32
    values = grad.to(compute).contiguous()
    total = torch.embedding_bag(values, order[: int(ends[-1])], ends - counts)[0]

    w = weight.index_select(0, rows).to(compute)
    decay: Tensor | float = 0.0
    if regularizer == "mba":
        assert occurrences is not None
        decay = reg_lambda / occurrences.index_select(0, rows).clamp_(min=1).to(compute)[:, None]
    elif regularizer == "l2":
        decay = reg_lambda
    elif regularizer == "difacto":
        decay = reg_lambda * counts.to(compute)[:, None]
    decays = regularizer != "none"

    if optimizer == "sgd":
        # (1 − lr·c)·w − lr·s·G: fewer passes than forming the whole gradient, and the decay is the same either way.
        if decays:
            w.mul_(1.0 - lr * decay)
        w.sub_(total.mul_(grad_scale * lr))
    else:
        g = total.mul_(grad_scale)
        if decays and coupled:
            g.addcmul_(w, decay) if isinstance(decay, Tensor) else g.add_(w, alpha=decay)
        step = _adaptive_step(state0, state1, rows, g, optimizer, eps, betas, bias)
        if decays and not coupled:
            w.mul_(1.0 - lr * decay)
        w.sub_(step.mul_(lr))
    if seed is not None and weight.dtype in (torch.bfloat16, torch.float16):
        w = round_stochastic(w, noise(seed, rows, weight.shape[1]), weight.dtype)
    weight.index_copy_(0, rows, w.to(weight.dtype))


def _adaptive_step(
    state0: Tensor | None,
    state1: Tensor | None,
    rows: Tensor,
    g: Tensor,
    optimizer: str,
    eps: float,
    betas: tuple[float, float],
    bias: float | Tensor,
) -> Tensor:
    """Move the states of ``rows`` on by the gradient ``g`` and return the step before the learning rate."""
    assert state0 is not None
    s0 = state0.index_select(0, rows)
    if optimizer == "adam":
        assert state1 is not None
        s1 = state1.index_select(0, rows)
        s0.lerp_(g, 1.0 - betas[0])
        s1.lerp_(g * g, 1.0 - betas[1])
        state0.index_copy_(0, rows, s0)
        state1.index_copy_(0, rows, s1)
        return s0.mul_(bias).div_(s1.sqrt_().add_(eps))
    if optimizer == "rowwise_adagrad":
        s0 += g.square().mean(1)
        state0.index_copy_(0, rows, s0)
        return g.div_(s0.sqrt_().add_(eps)[:, None])
    s0.addcmul_(g, g)
    state0.index_copy_(0, rows, s0)
    return g.div_(s0.sqrt_().add_(eps))
