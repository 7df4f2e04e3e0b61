"""Public call of Dice: arguments are checked, and x is seen as rows, here."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ... import _backend, _checks
from ..._library import is_compiling
from . import torch_small, torch_traced
from .function import DiceFunction, Running, compute, implementation, is_eager

MAX_WIDTH = 8192  # channels the kernels serve; the torch backend has no limit


def _check_vector(name: str, value: Tensor | None, width: int, x: Tensor) -> None:
    if value is None or (
        isinstance(value, Tensor) and value.shape == (width,) and value.dtype in _checks.FLOAT_DTYPES
        and value.device == x.device
    ):  # fmt: skip
        return
    _checks.check_tensor(name, value, shape=(width,), dtypes=_checks.FLOAT_DTYPES, device=x.device, layout_hint=" [C]")


def _is_plain(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, mask: Tensor | None,
    mean: Tensor | None, var: Tensor | None, tracked: Tensor | None, momentum: float | None, eps: float, training: bool,
) -> bool:  # fmt: skip
    """Whether these are what nearly every call passes, and right: small calls need not pay for ``_check``."""
    if not (type(x) is Tensor and isinstance(alpha, Tensor) and isinstance(mean, Tensor) and isinstance(var, Tensor)):
        return False
    dtype, kept = x.dtype, mean.dtype
    if x.dim() < 1:
        return False
    width = x.size(-1)
    if not (weight is bias is None) and not (
        isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dtype is kept and bias.dtype is kept
        and weight.shape == bias.shape == (width,) and weight.device == bias.device == x.device
    ):  # fmt: skip
        return False
    if shift is not None and not (
        isinstance(shift, Tensor) and shift.dtype in _checks.FLOAT_DTYPES and shift.shape == (width,)
        and shift.device == x.device
    ):  # fmt: skip
        return False
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == x.shape[:-1] and mask.device == x.device
    ):
        return False
    # Numbers of elements and dimensions, because to compare shapes takes several times as long.
    slopes = alpha.numel()
    return (
        (kept is torch.float32 or kept is dtype) and alpha.dtype is kept and var.dtype is kept
        and dtype in _checks.FLOAT_DTYPES and width > 0
        and ((slopes == width and alpha.dim() == 1) or (slopes == 1 and alpha.dim() <= 2))
        and mean.numel() == width == var.numel() and mean.dim() == 1 == var.dim()
        and mean.is_contiguous() and var.is_contiguous()
        and ((type(momentum) is float and 0.0 <= momentum <= 1.0) or (momentum is None and not training))
        and type(eps) is float and eps >= 0.0
        and (tracked is None or (isinstance(tracked, Tensor) and tracked.dtype is torch.int64 and tracked.dim() == 0))
        and _are_together(x, alpha, mean, var, tracked)
    )  # fmt: skip


def _is_small_evaluation(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    momentum: float | None, eps: float, backend: str | None,
) -> bool:  # fmt: skip
    """Whether these are right, and for torch to evaluate few elements in one dtype on a CPU: what rankers without GPUs do all
    day, where most checks would take longer than an operation."""
    if not (
        type(x) is Tensor and x.is_cpu and isinstance(mean, Tensor) and isinstance(var, Tensor) and isinstance(alpha, Tensor)
        and (weight is None or isinstance(weight, Tensor)) and (bias is None or isinstance(bias, Tensor))
        and torch_small.is_uniform(x, alpha, weight, bias, mean, var)
    ):  # fmt: skip
        return False
    width = mean.numel()
    if not (weight is bias is None) and not (
        weight is not None and bias is not None and weight.is_cpu and bias.is_cpu
        and weight.shape == bias.shape == (width,)
    ):  # fmt: skip
        return False
    slopes = alpha.numel()
    return (
        x.dim() > 0 and 0 < width == x.size(-1) and var.numel() == width and mean.dim() == 1 == var.dim()
        and ((slopes == width and alpha.dim() == 1) or (slopes == 1 and alpha.dim() <= 2))
        and mean.is_cpu and var.is_cpu and alpha.is_cpu and mean.is_contiguous() and var.is_contiguous()
        and type(eps) is float and eps >= 0.0 and (momentum is None or (type(momentum) is float and 0.0 <= momentum <= 1.0))
        and torch_small.serves(x, False) and is_eager(x)
        and (backend == "torch" or (backend is None and _backend.requested() is None))
    )  # fmt: skip


def _are_together(x: Tensor, alpha: Tensor, mean: Tensor, var: Tensor, tracked: Tensor | None) -> bool:
    """Whether all are on one device; to compare devices takes longer than to ask whether they are the CPU."""
    if x.is_cpu:
        return alpha.is_cpu and mean.is_cpu and var.is_cpu and (tracked is None or tracked.is_cpu)
    device = x.device
    return (
        alpha.device == device and mean.device == device and var.device == device
        and (tracked is None or tracked.device == device)
    )  # fmt: skip


def _check(
    x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, mask: Tensor | None,
    mean: Tensor | None, var: Tensor | None, tracked: Tensor | None, momentum: float | None, eps: float, training: bool,
) -> None:  # fmt: skip
    _checks.check_tensor("x", x, dtypes=_checks.FLOAT_DTYPES)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., C] with at least one channel, got {list(x.shape)}")
    width = x.shape[-1]
    _checks.check_tensor("alpha", alpha, dtypes=_checks.FLOAT_DTYPES, device=x.device)
    if (alpha.numel() != 1 and alpha.numel() != width) or alpha.dim() > 2:  # not ``in``: sizes may be symbolic
        raise ValueError(f"alpha must have shape [C], [C, 1] or [1] for C = {width} channels, got {list(alpha.shape)}")
    for name, value in (
        ("weight", weight), ("bias", bias), ("shift", shift), ("running_mean", mean), ("running_var", var)
    ):  # fmt: skip
        _check_vector(name, value, width, x)
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()}: it is updated in place")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must be given together, or neither")
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must be given together, or neither")
    if mean is None and not training:
        raise ValueError("running_mean and running_var are needed when training=False: Dice normalises with them")
    if tracked is not None:
        _checks.check_tensor("num_batches_tracked", tracked, shape=(), dtypes=(torch.int64,), device=x.device)
    for name, number in (("eps", eps), ("momentum", momentum)):
        if number is not None and not isinstance(number, (numbers.Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if momentum is None:
        if training and mean is not None and tracked is None:
            raise ValueError("momentum=None averages over all batches and needs num_batches_tracked to count them")
    elif not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be None or between 0 and 1, got {momentum}")
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if mask is not None:
        _checks.check_tensor(
            "mask", mask, shape=x.shape[:-1], dtypes=(torch.bool,), device=x.device, layout_hint=" [...]"
        )


def choose_backend(backend: str | None, x: Tensor, width: int) -> str:
    """The backend for ``width`` channels in the dtype and on the device of x: an explicit "triton" that cannot serve raises,
    an automatic one falls back, logged once."""
    served_by = _backend.resolve(backend, x.device)
    if served_by == "torch":
        return served_by
    reason = None
    if x.dtype == torch.float64:
        reason = "float64"
    elif width > MAX_WIDTH:
        reason = f"more than {MAX_WIDTH} channels"
    if reason is None:
        return "triton"
    if backend == "triton":
        raise _backend.BackendUnavailable(f"backend='triton' cannot serve this call: {reason}; use backend='torch'")
    _backend.log_once(f"dice: {reason}; the torch backend serves it")
    return "torch"


def dice(
    x: Tensor,
    alpha: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-8,
    process_group: Any = None,
    overwrite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Data-adaptive activation: ``y = p·x + (1 − p)·α·x``, ``p = σ((x − E[x]) / √(Var[x] + ε))`` (paper eq. 8-9).

    Zhou et al., KDD 2018 (arXiv 1706.06978), section 5.2. E and Var are per channel, over all other dimensions; the biased
    variance normalises, the unbiased one is accumulated, as in ``torch.nn.functional.batch_norm``.

    Args:
        x: [..., C], channel last, any strides (copied only where its rows cannot be walked with one stride).
        alpha: [C], [C, 1] or [1]; slope of the part that p switches off.
        running_mean, running_var: [C], updated in place in training; normalise in evaluation. May be None in training.
        weight, bias: [C], applied to the normalised x inside the sigmoid (an affine BatchNorm); both or neither.
        shift: [C], added to x before anything else: the bias that the layer before left out. Costs no pass (Triton), and its
            gradient none either. Not with ``process_group``.
        mask: [...] bool, True where a row counts in the statistics of training. Rows outside are computed all the same,
            and their gradients count. With fewer than two rows that count the running statistics (mean 0 and variance 1 if
            None) normalise and stay as they are.
        num_batches_tracked: [] int64, counts the updates.
        training: normalise with the statistics of this batch.
        momentum: weight of the new batch in the running statistics; None: the average over all batches.
        eps: ε; the paper's 1e-8 is kept exactly: statistics are never E[x²] − E[x]².
        process_group: statistics over the rows of all processes of this ``torch.distributed`` group.
        overwrite: x is not needed afterwards: in evaluation, where no gradient is recorded, y is then returned in the
            memory of x if that is contiguous. Has no effect elsewhere.
        backend: None, "triton" or "torch"; see ``din_kernels._backend``.

    Returns:
        y, shaped as x, in its dtype; statistics are taken in float32 (float64 for float64). Gradients flow to x (through
        the batch's statistics too), alpha, weight, bias and shift, once: there is no double backward.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; training on a single row without
            ``mask`` or ``process_group``, which has no variance.
        BackendUnavailable: an explicit backend that cannot serve here.
    """
    if (
        not training and mask is shift is num_batches_tracked is None and not torch.is_grad_enabled()
        and _is_small_evaluation(x, alpha, weight, bias, running_mean, running_var, momentum, eps, backend)
    ):  # fmt: skip
        assert running_mean is not None
        assert running_var is not None
        in_place = overwrite and x.is_contiguous()
        return torch_small.inference(x, alpha, weight, bias, running_mean, running_var, eps, in_place=in_place)
    described = (
        x, alpha, weight, bias, shift, mask, running_mean, running_var, num_batches_tracked, momentum, eps, training
    )  # fmt: skip
    if not _is_plain(*described):
        _check(*described)
        # Kernels, and what is kept for a shape, tell 1 from 1.0.
        eps, momentum = float(eps), None if momentum is None else float(momentum)
    shape = x.shape
    width = shape[-1]
    served_by = choose_backend(backend, x, width)
    if shift is not None and process_group is not None:
        raise ValueError("shift and process_group cannot be combined: add the shift to x")
    # In evaluation small inputs need not be rows. A view would be one more node for autograd to visit.
    rows = x if len(shape) == 2 or (not training and len(shape) > 2) else x.reshape(-1, width)
    if training and mask is None and process_group is None and rows.shape[0] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if alpha.dim() == 2:
        alpha = alpha.reshape(-1)
    if mask is not None:
        mask = (mask if len(shape) == 2 else mask.reshape(-1)) if training else None
    recorded = torch.is_grad_enabled() and (
        x.requires_grad or alpha.requires_grad
        or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        or (shift is not None and shift.requires_grad)
    )  # fmt: skip
    eager = is_eager(rows)
    if served_by == "torch" and eager and shift is process_group is None and torch_small.serves(rows, training):
        y = torch_small.dice(
            rows, alpha, weight, bias, mask, running_mean, running_var, num_batches_tracked, momentum, eps,
            training=training, recorded=recorded, in_place=overwrite and rows.is_contiguous(),
        )  # fmt: skip
        return y if rows is x else y.reshape(shape)
    if rows.dim() != 2:
        rows = x.reshape(-1, width)
    if alpha.shape != (width,):
        alpha = alpha.expand(width)
    running = Running(running_mean, running_var, num_batches_tracked, momentum, eps)
    if served_by == "torch" and process_group is None and is_compiling():
        y = torch_traced.dice(rows, shift, alpha, weight, bias, mask, running, training)
        return y if len(shape) == 2 else y.reshape(shape)
    call = (rows, alpha, weight, bias, mask, running, training, process_group, served_by, shift)
    if recorded:
        y = DiceFunction.apply(*call)
    elif eager and not training:
        assert running_mean is not None
        assert running_var is not None
        y = implementation(served_by).inference(
            rows,
            shift,
            alpha,
            weight,
            bias,
            running_mean,
            running_var,
            eps,
            in_place=overwrite and rows.is_contiguous(),
        )
        if overwrite and served_by == "triton" and rows.is_contiguous():
            torch.autograd.graph.increment_version(rows)  # a graph that holds on to x must notice
    else:
        y = compute(*call)[0]
    if training and served_by == "triton" and not torch.compiler.is_compiling():
        # Autograd must notice a graph that was recorded with the old values and is used after this.
        torch.autograd.graph.increment_version([t for t in (running_mean, running_var) if t is not None])
    return y if len(shape) == 2 else y.reshape(shape)
