"""Operators of the sparse update, their launches, and the lookup whose backward feeds them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _backend
from ..._launch import FUSED, launch, on_device
from ..._library import define, is_eager, run
from . import torch_impl
from .plan import key_dtype

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
REGULARIZERS = ("none", "mba", "l2", "difacto")

# Sorted occurrences per chunk, and chunks per group. A run of n occurrences costs its program at most
# CHUNK + 2·GROUP + n / (CHUNK·GROUP) row additions one after another.
CHUNK = 32
GROUP = 128
MAX_WIDTH = 1024  # columns one program holds in registers


@dataclass(frozen=True)
class LaunchConfig:
    """Compile-time shape of the kernels for one table width."""

    block_d: int
    lanes: int  # chunks walked side by side by one program
    unroll: int  # occurrences whose memory accesses are in flight together
    rows: int  # carry rows added together by the fix-up kernels
    num_warps: int


@functools.lru_cache(maxsize=256)
def launch_config(width: int, optimizer: str) -> LaunchConfig:
    """Shipped configuration: one warp up to 256 columns, two and four above; never more than 80 registers a thread."""
    block_d = max(2, 1 << (width - 1).bit_length())  # Triton 3.9 fails to compile tiles of one column
    num_warps = max(1, block_d // 256)
    per_thread = max(1, block_d // (32 * num_warps))
    tensors = {"sgd": 2, "rowwise_adagrad": 2, "adagrad": 3, "adam": 4}[optimizer]
    unroll = 4
    while unroll > 1 and unroll * per_thread * tensors > 32:
        unroll //= 2
    rows = max(2, min(16, 16 * 32 * num_warps // block_d))
    return LaunchConfig(block_d, max(1, 32 // block_d), unroll, rows, num_warps)


def plan(ids: Tensor, num_rows: int, padding: int, backend: str | None) -> tuple[Tensor, Tensor]:
    """Sorted keys and order of ``ids``; see ``SparsePlan``."""
    served_by = _backend.resolve(backend, ids.device)
    keys, order = run(_plan_op, is_eager(ids), ids, num_rows, padding, served_by)
    return keys, order


def _plan(ids: Tensor, num_rows: int, padding: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return torch_impl.plan(ids, num_rows, padding)
    from . import kernels

    flat = ids.reshape(-1).contiguous()
    keys = torch.empty(flat.numel(), dtype=key_dtype(num_rows), device=flat.device)
    if flat.numel():
        count, block = flat.numel(), 1024
        operands = {
            "ids": flat, "keys": keys, "N": count, "num_rows": num_rows, "padding_idx": padding, "BLOCK": block
        }  # fmt: skip
        with on_device(flat):
            launch(kernels.make_keys, (-(-count // block),), operands, num_warps=4)
    sorted_keys, order = torch.sort(keys, stable=True)
    return sorted_keys, order


def _plan_fake(ids: Tensor, num_rows: int, padding: int, backend: str) -> tuple[Tensor, Tensor]:
    flat = ids.reshape(-1)
    return flat.new_empty(flat.shape, dtype=key_dtype(num_rows)), flat.new_empty(flat.shape, dtype=torch.int64)


_plan_op = define(
    "sparse_plan(Tensor ids, int num_rows, int padding, str backend) -> (Tensor, Tensor)",
    fake=_plan_fake,
    impls={"CPU": _plan, "CUDA": _plan},
    direct=_plan,
)


def _bias(step: Tensor | None, betas: tuple[float, float]) -> float | Tensor:
    """Adam's √(1 − β₂ᵗ) / (1 − β₁ᵗ) for the step about to be made, in float64 (1 − β₂ᵗ loses digits in float32)."""
    if step is None:
        return 1.0
    if step.device.type == "cpu":
        t = float(step) + 1.0
        return math.sqrt(1.0 - betas[1] ** t) / (1.0 - betas[0] ** t)
    t_dev = step.double() + 1.0
    return ((1.0 - betas[1] ** t_dev).sqrt() / (1.0 - betas[0] ** t_dev)).float()


def _apply(
    weight: Tensor,
    state0: Tensor | None,
    state1: Tensor | None,
    step: Tensor | None,
    keys: Tensor,
    order: Tensor,
    grad: Tensor,
    occurrences: Tensor | None,
    lr_tensor: Tensor | None,
    scale_tensor: Tensor | None,
    seed: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    grad_scale: float,
    reg_lambda: float,
    eps: float,
    beta1: float,
    beta2: float,
    optimizer: str,
    regularizer: str,
    coupled: bool,
    backend: str,
) -> None:
    if found_inf is not None and step is not None and step.device.type != found_inf.device.type:
        # A step count on the host must know whether the step happens: this waits for the device. Keep the count on the
        # device (``capturable=True``) to avoid it.
        if bool(found_inf):
            return
        found_inf = None
    bias = _bias(step if optimizer == "adam" else None, (beta1, beta2))
    if keys.numel():
        if backend == "torch":
            torch_impl.apply(
                weight,
                state0,
                state1,
                keys,
                order,
                grad,
                occurrences,
                found_inf,
                seed,
                lr=lr if lr_tensor is None else lr_tensor,
                grad_scale=grad_scale if scale_tensor is None else scale_tensor,
                bias=bias,
                reg_lambda=reg_lambda,
                eps=eps,
                betas=(beta1, beta2),
                optimizer=optimizer,
                regularizer=regularizer,
                coupled=coupled,
            )
        else:
            hyper: dict[str, Any] = {
                "lr": lr if lr_tensor is None else lr_tensor,
                "grad_scale": grad_scale if scale_tensor is None else scale_tensor,
                "reg_lambda": reg_lambda,
                "eps": eps,
                "beta1": beta1,
                "beta2": beta2,
                "bias": bias,
                "seed": 0 if seed is None else (int(seed) if seed.device.type == "cpu" else seed),
            }
            _launch_update(
                weight, state0, state1, keys, order, grad, occurrences, found_inf, hyper, optimizer, regularizer, coupled,
                seed is not None and weight.dtype in (torch.bfloat16, torch.float16),
            )  # fmt: skip
    if step is not None:
        # Last, so that an error above leaves the count where it was.
        step.add_(1.0 if found_inf is None else (found_inf.reshape(()) == 0).to(step.dtype))


def _launch_update(
    weight: Tensor,
    state0: Tensor | None,
    state1: Tensor | None,
    keys: Tensor,
    order: Tensor,
    grad: Tensor,
    occurrences: Tensor | None,
    found_inf: Tensor | None,
    hyper: dict[str, Any],
    optimizer: str,
    regularizer: str,
    coupled: bool,
    rounding: bool,
) -> None:
    """Chunks, then groups of carries where there are any, then the runs cut by a border."""
    from . import kernels

    n, (num_rows, width) = keys.numel(), weight.shape
    config = launch_config(width, optimizer)
    chunks = -(-n // CHUNK)
    groups = chunks // GROUP
    carry = torch.empty((2, chunks, width), dtype=torch.float32, device=weight.device)
    carry_in, carry_out = carry.unbind(0)
    counts_in = counts_out = keys
    if regularizer == "difacto":
        counts_in, counts_out = torch.empty((2, chunks), dtype=torch.int32, device=weight.device).unbind(0)
    group_sums = carry
    if groups > 1:
        group_sums = torch.empty((groups, width), dtype=torch.float32, device=weight.device)
    # Arguments a specialisation never touches still need a pointer.
    operands: dict[str, Any] = {
        "keys": keys,
        "order": order,
        "grad": grad,
        "weight": weight,
        "state0": weight if state0 is None else state0,
        "state1": weight if state1 is None else state1,
        "occurrences": keys if occurrences is None else occurrences,
        "carry_in": carry_in,
        "carry_out": carry_out,
        "counts_in": counts_in,
        "counts_out": counts_out,
        "group_sums": group_sums,
        "found_inf": carry if found_inf is None else found_inf,
        "N": n,
        "num_rows": num_rows,
        "stride_gn": grad.stride(0),
        "stride_gd": grad.stride(1),
        "stride_w": weight.stride(0),
        **hyper,
        "D": width,
        "BLOCK_D": config.block_d,
        "CHUNK": CHUNK,
        "LANES": config.lanes,
        "UNROLL": config.unroll,
        "GROUP": GROUP,
        "ROWS": config.rows,
        "GROUPED": groups > 1,
        "OPTIMIZER": OPTIMIZERS.index(optimizer),
        "REGULARIZER": REGULARIZERS.index(regularizer),
        # For SGD both kinds of decay are one formula; one choice makes them equal to the bit.
        "COUPLED": coupled or optimizer == "sgd",
        "ROUNDING": rounding,
        "HAS_FOUND_INF": found_inf is not None,
        "LR_POINTER": isinstance(hyper["lr"], Tensor),
        "SCALE_POINTER": isinstance(hyper["grad_scale"], Tensor),
        "BIAS_POINTER": isinstance(hyper["bias"], Tensor),
        "SEED_POINTER": isinstance(hyper["seed"], Tensor),
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, **FUSED}
    with on_device(weight):
        launch(kernels.update_chunks, (-(-chunks // config.lanes),), operands, **options)
        if chunks == 1:
            return
        if groups > 1:
            launch(kernels.sum_groups, (groups,), operands, num_warps=config.num_warps)
        launch(kernels.finish_cut_runs, (chunks - 1,), operands, **options)


_apply_op = define(
    "sparse_update_(Tensor(a!) weight, Tensor(b!)? state0, Tensor(c!)? state1, Tensor(d!)? step, Tensor keys, Tensor order, "
    "Tensor grad, Tensor? occurrences, Tensor? lr_tensor, Tensor? scale_tensor, Tensor? seed, Tensor? found_inf, "
    "float lr, float grad_scale, float reg_lambda, float eps, float beta1, float beta2, "
    "str optimizer, str regularizer, bool coupled, str backend) -> ()",
    fake=lambda *args, **kwargs: None,
    impls={"CPU": _apply, "CUDA": _apply},
    direct=_apply,
)


def apply(*arguments: Any) -> None:
    """The operator, where autograd records nothing. weight, keys and grad are the first, fifth and seventh argument."""
    run(_apply_op, is_eager(arguments[0], arguments[4], arguments[6]), *arguments)


class MBAEmbeddingFunction(torch.autograd.Function):
    """``weight[ids]``, with a gradient that stays a list of occurrences.

    ``apply(weight, ids, padding_idx=-1, missing=False, keep_skipped=False, ticket=None)``

    weight        [V, D] leaf parameter
    ids           int32 or int64, any shape
    padding_idx   row that gets no gradient (≥ 0), or −1
    missing       negative ids are allowed, give zero rows and take no part in the update
    keep_skipped  leave the entries of ``padding_idx`` and of negative ids in the gradient as they are: cheaper, right only
                  when the optimizer skips them itself, as those of ``din_kernels.optim`` do. Otherwise their values are
                  set to zero (and negative ids to a valid row), so that any optimizer over sparse gradients is safe.
    ticket        update in backward: an object whose ``spend(weight, ids, grad)`` takes the gradient; ``weight.grad`` then
                  stays ``None`` (see ``MBAEmbedding.update_in_backward``)

    Returns [*ids.shape, D]. Backward gives ``weight`` an uncoalesced sparse COO gradient: the ids as they came, and the
    incoming gradient viewed as [N, D]. Nothing of the table's size is made, nothing is sorted, nothing waits for the device
    (``nn.Embedding(sparse=True, padding_idx=...)`` waits to drop the padding).
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        padding_idx: int = -1,
        missing: bool = False,
        keep_skipped: bool = False,
        ticket: Any = None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = weight if ticket is not None else None
        ctx.shape, ctx.padding_idx, ctx.missing = weight.shape, padding_idx, missing
        ctx.keep_skipped, ctx.ticket = keep_skipped, ticket
        if not missing:
            return torch.embedding(weight, ids)
        rows = torch.embedding(weight, ids.clamp(min=0))
        return rows.masked_fill_((ids < 0).unsqueeze(-1), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        values = grads[0].reshape(-1, ctx.shape[1])
        flat = ids.reshape(-1)
        if ctx.ticket is not None:
            ctx.ticket.spend(ctx.table, flat, values)
            return (None,) * 6
        indices = flat.to(torch.int64)
        if not ctx.keep_skipped and (ctx.missing or ctx.padding_idx >= 0):
            drop = (indices < 0) | (indices == ctx.padding_idx)
            values = values.masked_fill(drop.unsqueeze(-1), 0)
            if ctx.missing:
                indices = indices.clamp(min=0)
        gradient = torch.sparse_coo_tensor(
            indices.unsqueeze(0), values, ctx.shape, check_invariants=False, is_coalesced=False
        )
        return gradient, None, None, None, None, None
