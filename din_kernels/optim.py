"""Optimizers for embedding tables with sparse gradients, with the paper's regularizer.

They take the gradients of ``MBAEmbedding``, ``nn.Embedding(sparse=True)`` or ``nn.EmbeddingBag(sparse=True)`` as autograd
leaves them, uncoalesced, and update every row the batch touched once: sort, sum and step are one operation
(``functional.sparse_update_``; formulas and the meaning of ``decay`` there). Rows the batch did not touch keep every bit.

    optimizer = SparseAdam(table.parameters(), lr=1e-3, regularizer="mba", reg_lambda=0.01)
    loss.backward()
    optimizer.step()

They are ordinary ``torch.optim.Optimizer`` objects: param groups, schedulers, closures, ``state_dict``, gradient
accumulation (the gradients of several backward passes are one batch: a row decays once per step), ``GradScaler`` (a step with
an infinite gradient is skipped whole). A step is checked for all tables before the first row of any changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _backend, _checks
from .ops.sparse_update import registry
from .ops.sparse_update.api import PreparedUpdate, check_regularizer, init_state, prepare, state_dtype

__all__ = ["SparseAdagrad", "SparseAdam", "SparseRowwiseAdagrad", "SparseSGD"]


class _SparseOptimizer(torch.optim.Optimizer):
    """What the four have in common; ``kind`` is the name ``functional.sparse_update_`` knows them by."""

    kind: str
    _step_supports_amp_scaling = True  # GradScaler hands over its scale and verdict instead of touching the gradients

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        regularizer: str | None,
        reg_lambda: float,
        decay: str,
        occurrences: Tensor | None,
        padding_idx: int | None,
        stochastic_rounding: bool,
        seed: int,
        capturable: bool,
        backend: str | None,
        **own: Any,
    ) -> None:
        self._tickets: dict[Tensor, _Ticket] = {}
        self._half_done = False
        defaults = {
            "lr": lr, "regularizer": regularizer, "reg_lambda": reg_lambda, "decay": decay, "occurrences": occurrences,
            "padding_idx": padding_idx, "stochastic_rounding": stochastic_rounding, "seed": seed, "capturable": capturable,
            "backend": backend, **own,
        }  # fmt: skip
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tickets, self._half_done = {}, False
        for group in self.param_groups:
            for parameter in group["params"]:
                registry.set_updater(parameter, self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_half_done()
        return {key: value for key, value in super().__getstate__().items() if key != "_tickets"}  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """As in ``torch.optim.Optimizer``; raises where a step was interrupted half-way, which no checkpoint should hold."""
        self._refuse_half_done()
        return super().state_dict()

    def _refuse_half_done(self) -> None:
        if self._half_done:
            raise RuntimeError(
                "an optimizer step was interrupted between the first and the last row it changes (an exception, or Ctrl-C): "
                "load weights and optimizer state of a checkpoint before going on"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``, with the options checked: nothing is accepted that would be ignored."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        for parameter in self.param_groups[-1]["params"]:
            registry.set_updater(parameter, self)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_regularizer(group["regularizer"], group["decay"])
        _backend.check_name(group["backend"])
        for name in ("lr", "reg_lambda", "eps", "initial_accumulator_value"):
            value = group.get(name, 0.0)
            if value is not None and not isinstance(value, Tensor) and not value >= 0.0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        betas = group.get("betas", (0.0, 0.0))
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        given = group["occurrences"]
        if given is not None and len(group["params"]) != 1:
            raise ValueError(
                f"occurrences belong to one table, but this param group has {len(group['params'])} parameters: give each table "
                "a param group of its own, or keep the counts in MBAEmbedding"
            )
        for parameter in group["params"]:
            if parameter.dim() != 2:
                raise ValueError(
                    f"{type(self).__name__} updates embedding tables [V, D], got a parameter of shape "
                    f"{tuple(parameter.shape)}: give dense parameters to an optimizer of torch.optim"
                )
            own = getattr(registry.owner(parameter), "padding_idx", None)
            if None not in (own, group["padding_idx"]) and own != group["padding_idx"] % parameter.shape[0]:
                raise ValueError(
                    f"padding_idx={group['padding_idx']} contradicts the {own} of the table's MBAEmbedding"
                )
            if given is not None:
                _checks.check_tensor("occurrences", given, shape=(parameter.shape[0],), dtypes=_checks.INDEX_DTYPES)
            if group["regularizer"] == "mba" and given is None and registry.owner(parameter) is None:
                raise ValueError(
                    "regularizer='mba' needs to know in how many samples of the data set each id occurs: give occurrences=[V], "
                    "or use MBAEmbedding, which counts"
                )

    # -- one table ---------------------------------------------------------------------------------------------------

    def _settings(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Tensor | None, int | None]:
        """(occurrences, padding_idx): the group's own, or those of the table's ``MBAEmbedding``."""
        owner = registry.owner(parameter)
        occurrences, padding_idx = group["occurrences"], group["padding_idx"]
        if owner is not None:
            occurrences = owner.occurrences if occurrences is None else occurrences
            padding_idx = owner.padding_idx if padding_idx is None else padding_idx
        if occurrences is not None and occurrences.device != parameter.device:
            occurrences = group["occurrences"] = occurrences.to(parameter.device)
        return occurrences, padding_idx

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """State as it is, or fresh; stored only when the update runs."""
        state = self.state.get(parameter)
        if state:
            return state
        fresh = init_state(
            parameter.detach(), self.kind, capturable=group["capturable"],
            initial_accumulator_value=group.get("initial_accumulator_value", 0.0),
        )  # fmt: skip
        if group["stochastic_rounding"]:
            fresh["seed"] = torch.tensor(group["seed"], device=parameter.device if group["capturable"] else "cpu")
        return fresh

    def _prepare(
        self, parameter: Tensor, group: dict[str, Any], ids: Tensor, grad: Tensor, scale: float | Tensor, found_inf: Any
    ) -> tuple[PreparedUpdate, dict[str, Tensor]]:
        occurrences, padding_idx = self._settings(parameter, group)
        owner = registry.owner(parameter)
        plan = owner.take_plan(ids) if owner is not None and padding_idx == owner.padding_idx else None
        state = self._state_of(parameter, group)
        own = {name: group[name] for name in ("eps", "betas") if name in group}
        update = prepare(
            parameter.detach(), ids, grad, lr=group["lr"], optimizer=self.kind, state=state,
            regularizer=group["regularizer"], reg_lambda=group["reg_lambda"], occurrences=occurrences, grad_scale=scale,
            decay=group["decay"], padding_idx=padding_idx, backend=group["backend"], plan=plan,
            stochastic_rounding=group["stochastic_rounding"], seed=state.get("seed", 0), found_inf=found_inf, **own,
        )  # fmt: skip
        return update, state

    def _run(self, updates: list[tuple[Tensor, PreparedUpdate, dict[str, Tensor]]]) -> None:
        """Change the tables. What an exception in here leaves behind can be neither saved nor trained on."""
        self._refuse_half_done()
        self._half_done = True
        for parameter, update, state in updates:
            update.run()
            torch.autograd.graph.increment_version(parameter)
            if "seed" in state:
                state["seed"].add_(1)
            self.state[parameter] = state
        self._half_done = False

    # -- one step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every table that has a gradient. Raises, before anything changes, for a gradient that is not sparse."""
        fused = [p for group in self.param_groups for p in group["params"] if registry.in_backward(p) is self]
        scaler = getattr(self, "found_inf", None)
        if fused and (closure is not None or scaler is not None):
            what = "a closure" if closure is not None else "GradScaler"
            raise RuntimeError(
                f"a table is updated in backward, so {what} cannot be honoured: update_in_backward(None)"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._close_tickets(fused)
        scale: float | Tensor = 1.0
        if getattr(self, "grad_scale", None) is not None:
            scale = 1.0 / self.grad_scale.float()  # type: ignore[attr-defined]
        updates = []
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.layout is not torch.sparse_coo or grad.sparse_dim() != 1:
                    raise TypeError(
                        f"{type(self).__name__} takes sparse gradients, got a {grad.layout} one of shape "
                        f"{tuple(grad.shape)}: make the table with MBAEmbedding or nn.Embedding(sparse=True), or use an "
                        "optimizer of torch.optim"
                    )
                ids, values = grad._indices()[0], grad._values()
                verdict = None if scaler is None else scaler.to(parameter.device)
                updates.append((parameter, *self._prepare(parameter, group, ids, values, scale, verdict)))
        self._run(updates)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; sums and moments stay float32 beside 16-bit tables."""
        super().load_state_dict(state_dict)
        self._half_done = False
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name not in ("step", "seed"):
                    value = value.detach().to(parameter.device, state_dtype(parameter.dtype), copy=True)
                    self.state[parameter][name] = value
                elif name == "seed":  # an integer all along
                    self.state[parameter][name] = value.detach().to(torch.int64, copy=True)

    # -- update in backward ------------------------------------------------------------------------------------------

    def issue_ticket(self, parameter: Tensor) -> _Ticket:
        """Called by the forward pass of a table that is updated in backward: the right to one update."""
        if parameter in self._tickets:
            raise RuntimeError(
                "a table that is updated in backward was looked up twice in one step: every step is one forward, one backward, "
                "one optimizer.step(). For several lookups or gradient accumulation call update_in_backward(None)"
            )
        ticket = self._tickets[parameter] = _Ticket(self)
        return ticket

    def _close_tickets(self, fused: list[Tensor]) -> None:
        for parameter in fused:
            if parameter.grad is not None:
                raise RuntimeError(
                    "a table that is updated in backward also has a gradient, from a lookup that did not go through its "
                    "MBAEmbedding: update_in_backward(None), or drop that lookup"
                )
        self._tickets.clear()


class _Ticket:
    """One lookup's right to update its table in backward, once."""

    def __init__(self, optimizer: _SparseOptimizer) -> None:
        self.optimizer = optimizer
        self.spent = False

    @torch.no_grad()
    def spend(self, parameter: Tensor, ids: Tensor, grad: Tensor) -> None:
        optimizer = self.optimizer
        if self.spent:
            raise RuntimeError(
                "backward ran twice through a table that is updated in backward: update_in_backward(None)"
            )
        if optimizer._tickets.get(parameter) is not self:
            raise RuntimeError("optimizer.step() closed this step before its backward pass: call backward first")
        (group,) = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        update, state = optimizer._prepare(parameter, group, ids, grad, 1.0, None)
        self.spent = True
        optimizer._run([(parameter, update, state)])


_COMMON = """

    Args:
        params: embedding tables [V, D] (float32, bfloat16, float16), or param groups of them.
        lr: number, or one-element tensor (read on the device).{own}
        regularizer: "mba" λ/n_j, the paper's; "l2" λ; "difacto" λ·(occurrences of j in the batch); None. With "difacto" look a
            table up once a step: autograd, adding the gradients of several lookups, merges equal ids as soon as there are
            more of them than the table has elements, and then they can no longer be counted.
        reg_lambda: λ.
        decay: "coupled": the decay joins the gradient before the state sees it; "decoupled": it is applied to the row apart.
        occurrences: n_j [V] int32 or int64 for "mba", the samples *of the data set* with id j (0 counts as 1). Default: those
            that ``MBAEmbedding`` counts.
        padding_idx: row that never changes. Default: that of ``MBAEmbedding``.
        stochastic_rounding, seed: for 16-bit tables, see ``functional.sparse_update_``; the seed advances every step.
        capturable: keep step counts on the device, as a CUDA graph needs.
        backend: None (automatic), "triton" or "torch".

    Raises ``TypeError`` for a dense gradient, ``ValueError`` for options that do not fit, before any row changes.
    """


def _documented(own: str) -> Callable[[type], type]:
    def decorate(cls: type) -> type:
        cls.__doc__ = (cls.__doc__ or "").rstrip() + _COMMON.format(own=own)
        return cls

    return decorate


@_documented("")
class SparseSGD(_SparseOptimizer):
    """``w_j ← w_j − lr·(Σ grad + c_j·w_j)``: with "mba" the paper's eq. 7."""

    kind = "sgd"

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, *, regularizer: str | None = None, reg_lambda: float = 0.0,
        decay: str = "coupled", occurrences: Tensor | None = None, padding_idx: int | None = None,
        stochastic_rounding: bool = False, seed: int = 0, capturable: bool = False, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, regularizer=regularizer, reg_lambda=reg_lambda, decay=decay, occurrences=occurrences,
            padding_idx=padding_idx, stochastic_rounding=stochastic_rounding, seed=seed, capturable=capturable, backend=backend,
        )  # fmt: skip


_EPS = "\n        eps, initial_accumulator_value: as in ``torch.optim.Adagrad``."


@_documented(_EPS)
class SparseAdagrad(_SparseOptimizer):
    """Adagrad on the touched rows; with λ = 0 the numbers of ``torch.optim.Adagrad``."""

    kind = "adagrad"

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-2, eps: float = 1e-10, initial_accumulator_value: float = 0.0, *,
        regularizer: str | None = None, reg_lambda: float = 0.0, decay: str = "coupled", occurrences: Tensor | None = None,
        padding_idx: int | None = None, stochastic_rounding: bool = False, seed: int = 0, capturable: bool = False,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, regularizer=regularizer, reg_lambda=reg_lambda, decay=decay, occurrences=occurrences,
            padding_idx=padding_idx, stochastic_rounding=stochastic_rounding, seed=seed, capturable=capturable, backend=backend,
            eps=eps, initial_accumulator_value=initial_accumulator_value,
        )  # fmt: skip


@_documented(_EPS)
class SparseRowwiseAdagrad(SparseAdagrad):
    """Adagrad with one number of state per row: the mean of its squared gradients."""

    kind = "rowwise_adagrad"


@_documented("\n        betas, eps: as in ``torch.optim.SparseAdam``.")
class SparseAdam(_SparseOptimizer):
    """Adam on the touched rows, lazily: moments of absent rows rest. With λ = 0 the numbers of ``torch.optim.SparseAdam``."""

    kind = "adam"

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, *,
        regularizer: str | None = None, reg_lambda: float = 0.0, decay: str = "coupled", occurrences: Tensor | None = None,
        padding_idx: int | None = None, stochastic_rounding: bool = False, seed: int = 0, capturable: bool = False,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, regularizer=regularizer, reg_lambda=reg_lambda, decay=decay, occurrences=occurrences,
            padding_idx=padding_idx, stochastic_rounding=stochastic_rounding, seed=seed, capturable=capturable, backend=backend,
            betas=betas, eps=eps,
        )  # fmt: skip
