"""Problems of the sparse update, and one step of it row by row in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from din_kernels.functional import sparse_update_
from din_kernels.ops.sparse_update.api import STATE_NAMES
from din_kernels.testing import assert_close
from tests.contract.test_contract_sparse import step_by_loops

# Runs whose lengths straddle the borders of chunks of 32 occurrences; their places drift across those borders too.
BORDER_RUNS = (1, 31, 32, 33, 63, 64, 65, 2, 30)


def runs(lengths: tuple[int, ...], *, shuffled: bool = True) -> Tensor:
    """ids [Σ lengths] with row r occurring lengths[r] times."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(1))] if shuffled else ids


def zipf(count: int, rows: int) -> Tensor:
    weights = torch.arange(1, rows + 1).double().pow(-1.05)
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(2))


PATTERNS = {
    "same": torch.full((130,), 3),
    "distinct": torch.randperm(70, generator=torch.Generator().manual_seed(3)),
    "zipf": zipf(200, 60),
    "sorted": zipf(97, 20).sort().values,
    "reversed": zipf(97, 20).sort(descending=True).values,
    "borders": runs(BORDER_RUNS),
    "one": torch.tensor([5]),
    "none": torch.zeros(0, dtype=torch.int64),
    "mostly padding": torch.where(torch.rand(100, generator=torch.Generator().manual_seed(4)) < 0.9, 0, zipf(100, 9)),
    "only padding": torch.zeros(65, dtype=torch.int64),
    "missing": zipf(100, 9) - 2,
    **{f"{n} of one row": torch.full((n,), 2) for n in (31, 32, 33, 63, 64, 65)},
}


@dataclasses.dataclass
class Problem:
    """A table [V, D] of ``dtype``, state that is not fresh, and the arguments of one update."""

    ids: Tensor
    grad: Tensor
    weight: Tensor
    occurrences: Tensor
    state: dict[str, Tensor]
    options: dict[str, Any]

    def run(self, backend: str | None, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(weight, state) after one update of copies."""
        weight, state = self.weight.clone(), {name: value.clone() for name, value in self.state.items()}
        arguments = {**self.options, "occurrences": self.occurrences, "state": state or None, **changes}
        ids, grad = arguments.pop("ids", self.ids), arguments.pop("grad", self.grad)
        sparse_update_(weight, ids, grad, backend=backend, **arguments)
        return weight, state

    def expected(self) -> tuple[Tensor, dict[str, Any]]:
        names = ("lr", "optimizer", "regularizer", "reg_lambda", "grad_scale", "decay", "padding_idx")
        weight = self.weight.double().cpu().numpy().copy()
        state: dict[str, Any] = {name: value.double().cpu().numpy().copy() for name, value in self.state.items()}
        padding = self.options["padding_idx"]
        step_by_loops(
            weight, self.ids.reshape(-1).tolist(), self.grad.reshape(-1, weight.shape[1]).double().cpu().numpy(), state,
            occurrences=self.occurrences.cpu().numpy(),
            **{**{name: self.options[name] for name in names}, "padding_idx": -1 if padding is None else padding},
        )  # fmt: skip
        return torch.from_numpy(weight), {name: torch.as_tensor(value) for name, value in state.items()}

    def untouched(self) -> Tensor:
        """[V] bool: rows that must keep every bit."""
        used = self.ids[self.ids >= 0].long().cpu()
        keep = torch.ones(self.weight.shape[0], dtype=torch.bool)
        keep[used] = False
        if self.options["padding_idx"] is not None:
            keep[self.options["padding_idx"]] = True
        return keep

    def check(self, backend: str, **changes: Any) -> None:
        """Against the loops; rows that take no part keep every bit, their state included."""
        weight, state = self.run(backend, **changes)
        wanted, wanted_state = self.expected()
        length = int(self.ids.clamp(min=0).bincount().max()) if self.ids.numel() else 1
        dtype = (
            torch.promote_types(self.weight.dtype, self.grad.dtype) if weight.dtype is torch.float64 else weight.dtype
        )
        assert_close("weight", weight, wanted, dtype=dtype, length=length, stages=3)
        keep = self.untouched()
        assert torch.equal(weight.cpu()[keep], self.weight.cpu()[keep])
        for name, value in state.items():
            assert_close(name, value, wanted_state[name].reshape(value.shape), length=length, stages=3)
            if value.dim():
                assert torch.equal(value.cpu()[keep], self.state[name].cpu()[keep]), name


def problem(
    ids: Tensor,
    width: int,
    *,
    rows: int | None = None,
    optimizer: str = "sgd",
    regularizer: str | None = "mba",
    decay: str = "coupled",
    padding_idx: int | None = None,
    grad_scale: float = 0.5,
    reg_lambda: float = 0.3,
    lr: float = 0.1,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    index: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rows = (int(ids.max()) + 3 if ids.numel() else 7) if rows is None else rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kept = torch.float64 if dtype is torch.float64 else torch.float32
    shape = (rows,) if optimizer == "rowwise_adagrad" else (rows, width)
    state = {
        name: (normal(*shape) if name == "exp_avg" else normal(*shape).square()).to(device, kept)
        for name in STATE_NAMES[optimizer]
    }
    if optimizer == "adam":
        state["step"] = torch.tensor(4.0)
    return Problem(
        ids=ids.to(device, index),
        grad=normal(ids.numel(), width).to(device, grad_dtype or dtype),
        weight=normal(rows, width).to(device, dtype),
        occurrences=torch.randint(0, 9, (rows,), generator=generator).to(device, index),
        state=state,
        options={
            "lr": lr, "optimizer": optimizer, "regularizer": regularizer, "reg_lambda": reg_lambda, "decay": decay,
            "padding_idx": padding_idx, "grad_scale": grad_scale,
        },
    )  # fmt: skip
