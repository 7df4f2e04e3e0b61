"""The validated public call: every check is made before any row changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend, _checks
from . import function
from .plan import SparsePlan, resolve_padding

STATE_NAMES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
}
DEFAULT_EPS = {"sgd": 0.0, "adagrad": 1e-10, "rowwise_adagrad": 1e-10, "adam": 1e-8}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Optimizer state is kept in float32 for 16-bit weights: squared gradients would be lost in theirs."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_optimizer(optimizer: str) -> None:
    if optimizer not in function.OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(map(repr, function.OPTIMIZERS))}, got {optimizer!r}")


def check_regularizer(regularizer: str | None, decay: str) -> None:
    if regularizer is not None and regularizer not in function.REGULARIZERS[1:]:
        raise ValueError(f"regularizer must be None, 'mba', 'l2' or 'difacto', got {regularizer!r}")
    if decay not in ("coupled", "decoupled"):
        raise ValueError(f"decay must be 'coupled' or 'decoupled', got {decay!r}")


def init_state(
    weight: Tensor, optimizer: str, *, initial_accumulator_value: float = 0.0, capturable: bool = False
) -> dict[str, Tensor]:
    """Optimizer state for ``weight`` [V, D], all zero (or ``initial_accumulator_value`` in the sums of squares).

    Returns ``{}`` for "sgd"; ``{"sum": [V, D]}`` for "adagrad"; ``{"sum": [V]}`` for "rowwise_adagrad";
    ``{"exp_avg": [V, D], "exp_avg_sq": [V, D], "step": []}`` for "adam". float32 (float64 for float64 weights). ``step`` is
    on the CPU, or on the table's device with ``capturable`` (needed inside a CUDA graph).
    """
    check_optimizer(optimizer)
    dtype = state_dtype(weight.dtype)
    shape: Sequence[int] = weight.shape[:1] if optimizer == "rowwise_adagrad" else weight.shape
    state = {
        name: torch.full(shape, initial_accumulator_value if name == "sum" else 0.0, dtype=dtype, device=weight.device)
        for name in STATE_NAMES[optimizer]
    }
    if optimizer == "adam":
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device if capturable else "cpu")
    return state


def _number(name: str, value: float | Tensor, device: torch.device, *, minimum: float | None = None) -> Tensor | None:
    """Check a hyper-parameter; return it as a float32 device tensor where it is one, else None."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor with one element, got shape {tuple(value.shape)}")
        return value.detach().to(device=device, dtype=torch.float32).reshape(())
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {type(value).__name__}")
    if not math.isfinite(value) or (minimum is not None and value < minimum):
        bound = "" if minimum is None else f" and at least {minimum:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value}")
    return None


class PreparedUpdate(NamedTuple):
    """A checked update that cannot fail on its arguments any more; ``run`` changes the table."""

    weight: Tensor
    state: Mapping[str, Tensor]
    plan: SparsePlan
    grad: Tensor
    occurrences: Tensor | None
    lr: float | Tensor
    grad_scale: float | Tensor
    seed: Tensor | None
    found_inf: Tensor | None
    reg_lambda: float
    eps: float
    betas: tuple[float, float]
    optimizer: str
    regularizer: str
    coupled: bool
    backend: str

    def run(self) -> None:
        names = STATE_NAMES[self.optimizer]
        lr, scale = self.lr, self.grad_scale
        with torch.no_grad():  # as a decorator it would break graphs under torch.compile
            function.apply(
                self.weight.detach(),
                self.state[names[0]] if names else None,
                self.state[names[1]] if len(names) > 1 else None,
                self.state.get("step"),
                self.plan.keys,
                self.plan.order,
                self.grad,
                self.occurrences,
                lr if isinstance(lr, Tensor) else None,
                scale if isinstance(scale, Tensor) else None,
                self.seed,
                self.found_inf,
                0.0 if isinstance(lr, Tensor) else float(lr),
                0.0 if isinstance(scale, Tensor) else float(scale),
                self.reg_lambda,
                self.eps,
                *self.betas,
                self.optimizer,
                self.regularizer,
                self.coupled,
                self.backend,
            )
        if not torch.compiler.is_compiling():
            # Autograd must notice a graph that was recorded with the old values and is used after this.
            torch.autograd.graph.increment_version(self.weight)


def _check_state(state: Mapping[str, Tensor] | None, weight: Tensor, optimizer: str) -> Mapping[str, Tensor]:
    names = STATE_NAMES[optimizer]
    if not names:
        return {}
    if state is None:
        raise ValueError(
            f"optimizer={optimizer!r} needs state, which must live as long as the table: "
            f"state = din_kernels.ops.sparse_update.init_state(weight, {optimizer!r})"
        )
    wanted = names + (("step",) if optimizer == "adam" else ())
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"state has no {missing[0]!r}; make it with init_state(weight, {optimizer!r})")
    shape = weight.shape[:1] if optimizer == "rowwise_adagrad" else weight.shape
    for name in names:
        _checks.check_tensor(
            f"state[{name!r}]", state[name], shape=shape, dtypes=(state_dtype(weight.dtype),), device=weight.device
        )
        if not state[name].is_contiguous():
            raise ValueError(f"state[{name!r}] must be contiguous")
    if optimizer == "adam":
        _checks.check_tensor("state['step']", state["step"], shape=(), dtypes=(torch.float32, torch.float64))
    return state


def _check_weight(weight: Tensor) -> None:
    _checks.check_tensor("weight", weight, ndim=2, dtypes=_checks.FLOAT_DTYPES, layout_hint=" [V, D]")
    if weight.shape[1] < 1:
        raise ValueError(f"weight must have at least one column, got shape {tuple(weight.shape)}")
    rows_apart = weight.shape[0] < 2 or weight.stride(0) >= weight.shape[1]
    if (weight.shape[1] > 1 and weight.stride(1) != 1) or not rows_apart:
        raise ValueError(
            f"weight must hold its rows contiguously, got strides {weight.stride()}: the update works in place, so a "
            "transposed or expanded table cannot be copied on the way"
        )


def _choose_backend(backend: str | None, weight: Tensor) -> str:
    chosen = _backend.resolve(backend, weight.device)
    if chosen == "triton":
        problem = None
        if weight.dtype is torch.float64:
            problem = "float64 tables"
        elif weight.shape[1] > function.MAX_WIDTH:
            problem = f"tables wider than {function.MAX_WIDTH} columns (this one has {weight.shape[1]})"
        if problem is not None:
            if backend == "triton":
                raise _backend.BackendUnavailable(f"the Triton sparse update does not serve {problem}: backend='torch'")
            _backend.log_once(f"sparse_update_: {problem} run on the torch backend")
            chosen = "torch"
    return chosen


def prepare(
    weight: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float | Tensor,
    optimizer: str = "sgd",
    state: Mapping[str, Tensor] | None = None,
    regularizer: str | None = None,
    reg_lambda: float = 0.0,
    occurrences: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    decay: str = "coupled",
    padding_idx: int | None = None,
    backend: str | None = None,
    eps: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    plan: SparsePlan | None = None,
    stochastic_rounding: bool = False,
    seed: int | Tensor = 0,
    found_inf: Tensor | None = None,
    check_finite: bool | None = None,
) -> PreparedUpdate:
    """Check and sort; change nothing. Arguments as in ``sparse_update_``."""
    check_optimizer(optimizer)
    check_regularizer(regularizer, decay)
    _check_weight(weight)
    device, (num_rows, width) = weight.device, weight.shape
    _checks.check_tensor("ids", ids, dtypes=_checks.INDEX_DTYPES, device=device)
    _checks.check_tensor("grad", grad, dtypes=_checks.FLOAT_DTYPES, device=device)
    if grad.dim() < 1 or grad.shape[-1] != width or grad.numel() != ids.numel() * width:
        raise ValueError(
            f"grad must have one row of {width} per id: [{ids.numel()}, {width}] for ids of shape {list(ids.shape)}, "
            f"got {list(grad.shape)}"
        )
    grad = grad.detach().reshape(-1, width)
    chosen = _choose_backend(backend, weight)
    padding = resolve_padding(padding_idx, num_rows)
    lr_tensor = _number("lr", lr, device, minimum=0.0)
    scale_tensor = _number("grad_scale", grad_scale, device)
    _number("reg_lambda", reg_lambda, device, minimum=0.0)
    eps = DEFAULT_EPS[optimizer] if eps is None else eps
    _number("eps", eps, device, minimum=0.0)
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    checked_state = _check_state(state, weight, optimizer)
    if regularizer == "mba":
        if occurrences is None:
            raise ValueError(
                "regularizer='mba' needs occurrences [V]: in how many samples of the data set each id occurs "
                "(count them with din_kernels.modules.mba_embedding.count_occurrences, or let MBAEmbedding count)"
            )
        _checks.check_tensor("occurrences", occurrences, shape=(num_rows,), dtypes=_checks.INDEX_DTYPES, device=device)
        occurrences = occurrences.contiguous()
    else:
        occurrences = None
    seed_tensor = None
    if stochastic_rounding:
        number = seed if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64, device="cpu")
        seed_tensor = number.detach().reshape(())
        _checks.check_tensor("seed", seed_tensor, dtypes=_checks.INDEX_DTYPES)
    if found_inf is not None:
        found_inf = _number("found_inf", found_inf, device)

    readable = _checks.values_readable(grad)
    if (check_finite or (check_finite is None and readable and _backend.debug_enabled())) and grad.numel():
        bad = ~torch.isfinite(grad).all(dim=1)
        if bool(bad.any()):
            at = int(bad.nonzero()[0, 0])
            raise ValueError(f"grad is not finite in row {at} (id {int(ids.reshape(-1)[at])}); nothing was changed")
    if plan is None:
        plan = SparsePlan.build(ids, num_rows, padding_idx=padding_idx, backend=chosen)
    elif plan.num_rows != num_rows or plan.padding != padding or plan.order.numel() != ids.numel():
        raise ValueError(
            f"plan was made for {plan.order.numel()} ids, {plan.num_rows} rows and padding {plan.padding}; this update has "
            f"{ids.numel()}, {num_rows} and {padding}"
        )
    elif plan.order.device != device:
        raise ValueError(f"plan must be on {device}, got {plan.order.device}")
    return PreparedUpdate(
        weight,
        checked_state,
        plan,
        grad,
        occurrences,
        lr if lr_tensor is None else lr_tensor,
        grad_scale if scale_tensor is None else scale_tensor,
        seed_tensor,
        found_inf,
        float(reg_lambda),
        float(eps),
        (float(betas[0]), float(betas[1])),
        optimizer,
        regularizer or "none",
        decay == "coupled",
        chosen,
    )


def sparse_update_(
    weight: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float | Tensor,
    optimizer: str = "sgd",
    state: Mapping[str, Tensor] | None = None,
    regularizer: str | None = None,
    reg_lambda: float = 0.0,
    occurrences: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    decay: str = "coupled",
    padding_idx: int | None = None,
    backend: str | None = None,
    eps: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    plan: SparsePlan | None = None,
    stochastic_rounding: bool = False,
    seed: int | Tensor = 0,
    found_inf: Tensor | None = None,
    check_finite: bool | None = None,
) -> Tensor:
    """Update the rows of an embedding table that a batch touched, in place, with mini-batch-aware regularization.

    For every row j that occurs among ``ids`` (once, however often it occurs; also when its gradients sum to zero):

        G_j = grad_scale · Σ of its grads,   c_j = λ·(mba: 1/max(n_j, 1);  l2: 1;  difacto: occurrences of j in ids)
        coupled:    the optimizer steps with G_j + c_j·w_j           (the paper's eq. 7 with optimizer "sgd")
        decoupled:  it steps with G_j, then w_j loses lr·c_j·w_j     (equal for "sgd")

    Zhou et al., KDD 2018 (arXiv 1706.06978), section 5.1: with the 1/|B| of the mean loss already in ``grad`` this is eq. 7,
    and the step descends loss + λ/2 · Σ_j α_j/n_j ‖w_j‖². Rows that do not occur keep every bit, their state included.

    weight        [V, D] float32, bfloat16, float16 (float64 on the torch backend); rows contiguous
    ids           int32 or int64, any shape, N in all, repeats allowed; negative ids and ``padding_idx`` take no part
    grad          [N, D] (or ids.shape + [D]), one row per occurrence, any strides, any float dtype; summed in float32
    lr            number, or one-element tensor on the device (read there: fit for CUDA graphs); so is ``grad_scale``,
                  which multiplies gradients only, never the decay
    optimizer     "sgd" | "adagrad" | "rowwise_adagrad" | "adam" (lazy: moments of absent rows rest, as torch's SparseAdam)
    state         tensors from ``init_state(weight, optimizer)``, changed in place; not needed for "sgd"
    regularizer   "mba" | "l2" | "difacto" | None (no decay; ``reg_lambda`` is then unused)
    occurrences   n_j [V] int32 or int64: the number of *samples of the data set* that hold id j, not its count in this batch;
                  used by "mba" only; 0 counts as 1
    eps, betas    as torch's: eps 1e-10 for Adagrad, 1e-8 for Adam
    plan          ``SparsePlan.build(ids, V, padding_idx=...)`` made earlier, to keep the sort off the critical path
    stochastic_rounding, seed   bfloat16/float16 weights are rounded up or down at random, by a hash of (seed, row, column)
                  that does not depend on the launch; change the seed every step. Without it a decay of lr·λ/n below 2⁻⁹
                  is lost in bfloat16 (below 3·10⁻⁸ even in float32)
    found_inf     one-element tensor: when not zero nothing changes (``GradScaler``), decided on the device
    check_finite  True: NaN or ∞ in ``grad`` raises before anything changes (waits for the device). Default: in debug mode
                  (DIN_KERNELS_DEBUG=1) only; otherwise gradients are applied as given

    Returns ``weight``. Same inputs give the same bits. With the Triton backend nothing waits for the device; the torch backend
    on a GPU waits once. Raises ``IndexError`` for an id ≥ V before any row changes (on a GPU in debug mode only; otherwise
    such an id takes no part), ``ValueError``/``TypeError`` for arguments that do not fit.
    """
    prepare(
        weight,
        ids,
        grad,
        lr=lr,
        optimizer=optimizer,
        state=state,
        regularizer=regularizer,
        reg_lambda=reg_lambda,
        occurrences=occurrences,
        grad_scale=grad_scale,
        decay=decay,
        padding_idx=padding_idx,
        backend=backend,
        eps=eps,
        betas=betas,
        plan=plan,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        found_inf=found_inf,
        check_finite=check_finite,
    ).run()
    return weight
