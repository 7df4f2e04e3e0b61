"""The sparse embedding update, in place: sum the gradients of equal ids, decay each present row by λ/n_j, step (SGD).

Three races. ``update``: ids and per-occurrence gradients are given. ``lookup+update``: a lookup, its backward and the step,
so that libraries which hide the update in their backward (FBGEMM; it has no mini-batch-aware decay, so λ = 0 there) can
take part. ``lookup+decayed update``: the same with the decay, beside what the step costs *without* any (such a contestant
computes something else; the decay is added to its result before that is checked). ``fused, sorted before`` finds the sort
of the ids done, as a data loader's worker would leave it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from din_kernels import MBAEmbedding
from din_kernels.functional import sparse_update_
from din_kernels.ops.sparse_update.plan import SparsePlan
from din_kernels.testing import SAFETY, Tolerance, tolerance, unit_roundoff

from . import peers
from .arena import Arena, Contestant, Expected, Options, Race
from .record import FIRST
from .roofline import sparse_floor
from .workloads import SPARSE, SPARSE_CPU, SparseWorkload

LR, LAMBDA = 0.5, 0.01


@dataclasses.dataclass
class UpdateInputs:
    """ids [N], their gradients [N, D], and the plan (sort) of the ids."""

    ids: Tensor
    grad: Tensor
    plan: SparsePlan


@dataclasses.dataclass(frozen=True)
class Case:
    workload: SparseWorkload
    measure: str

    def __str__(self) -> str:
        return f"{self.workload.name}-{self.measure}"


def cases(options: Options) -> list[Case]:
    shapes = list((SPARSE if options.device.type == "cuda" else SPARSE_CPU).values())
    if options.smoke:
        shapes = [SparseWorkload("smoke", 40, 30, 4)]
    return [Case(w, m) for w in shapes for m in ("update", "lookup+update", "lookup+decayed update")]


def delta_expected(before: Tensor, after: Tensor, base: Tolerance) -> Expected:
    """The change of a table [V, D], float64: writing w + Δ rounds w, not Δ."""
    delta = after - before.double()
    rounding = unit_roundoff(before.dtype) * float(before.double().square().mean().sqrt())
    size = float(delta.square().mean().sqrt())
    return Expected(delta, Tolerance(base.rms + SAFETY * rounding / size, base.worst))


def test_sparse_update(arena: Arena, benchmark: Any, case: Case) -> None:
    workload, device = case.workload, arena.device
    update_only = case.measure == "update"
    reg_lambda = 0.0 if case.measure == "lookup+update" else LAMBDA
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(workload.table, workload.dim, generator=generator, device=device) * 0.1
    counts = torch.randint(1, 100, (workload.table,), generator=generator, device=device)

    def inputs_of(seed: int) -> UpdateInputs:
        ids = workload.ids(seed).to(device)
        grad = torch.randn(workload.occurrences, workload.dim, generator=generator, device=device) * 0.01
        return UpdateInputs(ids, grad, SparsePlan.build(ids, workload.table))

    grad_bytes = workload.occurrences * workload.dim * 4
    inputs = [inputs_of(seed) for seed in range(min(arena.copies(grad_bytes), 8))]
    first = inputs[0]

    exact = weight.double()
    rows, place = first.ids.unique(return_inverse=True)
    gradient = torch.zeros(len(rows), workload.dim, dtype=torch.float64, device=device)
    gradient.index_add_(0, place, first.grad.double())
    decay = reg_lambda / counts[rows].double().unsqueeze(1) * exact[rows]
    most = int(place.bincount().max())
    after = exact.clone()
    after[rows] -= LR * (gradient + decay)
    expected = {"result": delta_expected(weight, after, tolerance(torch.float32, length=most, stages=2))}
    shrinkage = (LR * decay).float()
    del exact, gradient, decay, after

    def named(result: Tensor, _: UpdateInputs) -> dict[str, Tensor]:
        return {"result": result.detach() - weight}

    def undecayed(result: Tensor, _: UpdateInputs) -> dict[str, Tensor]:
        delta = result.detach() - weight
        delta[rows] -= shrinkage
        return {"result": delta}

    def fused(with_plan: bool) -> Callable[[UpdateInputs], Tensor]:
        table = weight.clone()

        def call(i: UpdateInputs) -> Tensor:
            plan = i.plan if with_plan else None
            return sparse_update_(
                table, i.ids, i.grad, lr=LR, regularizer="mba", reg_lambda=LAMBDA, occurrences=counts, plan=plan
            )

        return call

    def fused_lookup(decay: float) -> Callable[[UpdateInputs], Tensor]:
        from din_kernels.optim import SparseSGD

        module = MBAEmbedding(workload.table, workload.dim, counts, _weight=weight.clone())
        optimizer = SparseSGD(module.parameters(), lr=LR, regularizer="mba" if decay else None, reg_lambda=decay)

        def call(i: UpdateInputs) -> Tensor:
            module(i.ids).backward(i.grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return module.weight

        return call

    def autograd(sparse: bool, decay: float = reg_lambda) -> Callable[[UpdateInputs], Tensor]:
        """nn.Embedding and torch.optim.SGD; the penalty λ/2 Σ ‖w_j‖²/n_j over the present rows goes through autograd."""
        module = nn.Embedding(workload.table, workload.dim, sparse=sparse, _weight=weight.clone())
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)

        def call(i: UpdateInputs) -> Tensor:
            loss = (module(i.ids) * i.grad).sum()
            if decay:
                present = i.ids.unique()
                loss = loss + decay / 2 * (module(present).square().sum(1) / counts[present]).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return module.weight

        return call

    def by_hand() -> Callable[[UpdateInputs], Tensor]:
        """What one would write in torch: unique, sum by index_add, update the rows."""
        table = weight.clone()

        def call(i: UpdateInputs) -> Tensor:
            present, place = torch.unique(i.ids, return_inverse=True)
            total = i.grad.new_zeros(len(present), workload.dim).index_add_(0, place, i.grad)
            total += (reg_lambda / counts[present]).unsqueeze(1) * table[present]
            return table.index_add_(0, present, total, alpha=-LR)

        return call

    def fbgemm() -> Callable[[UpdateInputs], Tensor]:
        table = peers.fbgemm_table(weight, LR)
        offsets = torch.arange(workload.occurrences + 1, device=device)

        def call(i: UpdateInputs) -> Tensor:
            table(i.ids, offsets).backward(i.grad)
            return table.split_embedding_weights()[0]  # type: ignore[operator]

        return call

    if update_only:
        contestants = [
            Contestant(FIRST, lambda: fused(False), named),
            Contestant("fused, sorted before", lambda: fused(True), named),
            Contestant("by hand", by_hand, named),
            Contestant("sparse gradient, penalty by autograd", lambda: autograd(True), named),
            Contestant("dense gradient, penalty by autograd", lambda: autograd(False), named),
        ]
    elif reg_lambda:
        contestants = [
            Contestant(FIRST, lambda: fused_lookup(LAMBDA), named),
            Contestant("fused, no decay", lambda: fused_lookup(0.0), undecayed),
            Contestant("sparse gradient, no decay", lambda: autograd(True, 0.0), undecayed),
            Contestant("sparse gradient, penalty by autograd", lambda: autograd(True), named),
            Contestant("dense gradient, penalty by autograd", lambda: autograd(False), named),
        ]
    else:
        contestants = [
            Contestant(FIRST, lambda: fused_lookup(0.0), named),
            Contestant("sparse gradient", lambda: autograd(True), named),
            Contestant("dense gradient", lambda: autograd(False), named),
            Contestant("fbgemm", fbgemm, named),
        ]
    distinct = len(rows)
    floor = sparse_floor(workload, distinct=distinct) if update_only else None
    race = Race(
        "sparse_update", workload.name, case.measure, torch.float32, inputs, expected, floor,
        details={
            "occurrences": workload.occurrences, "table": workload.table, "dim": workload.dim, "distinct": distinct,
            "most": most, "copies": len(inputs),
        },
    )  # fmt: skip
    arena.race(race, contestants, benchmark)
