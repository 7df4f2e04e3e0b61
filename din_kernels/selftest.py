"""``python -m din_kernels.selftest``: does every operation compute the right numbers on this machine?

Each operation runs on every backend that can serve here and is compared, values and gradients, with a float64 statement of
the paper written out below, which shares no code with the package. Tolerances are those of ``din_kernels.testing``. The exit
status is 0 when everything agrees, 1 otherwise. ``--interpret`` also runs the Triton kernels where there is no GPU, in
Triton's interpreter. Takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend, testing
from .functional import dice, init_state, sparse_update_
from .modules import LocalActivationUnit
from .modules.dice import Dice

LENGTHS = (3, 0, 17, 1, 6)
DIM, HIDDEN = 12, (10, 6)


class Place(NamedTuple):
    """Where a check runs."""

    backend: str
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        kernels = self.backend == "triton" and self.device.type == "cpu"
        name = "triton (interpreter)" if kernels else self.backend
        return f"{name:20} {self.device.type:5} {str(self.dtype).removeprefix('torch.'):9}"


class Outcome(NamedTuple):
    """The worst of a check's results: error and allowance, both relative to the size of the quantity."""

    check: str
    place: Place
    error: float
    allowed: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem


# ---- the statements ------------------------------------------------------------------------------------------


def _exact_dice(x: Tensor, alpha: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    p = torch.sigmoid((x - mean) / torch.sqrt(var + eps))
    return p * x + (1 - p) * alpha * x


def _exact_unit(unit: LocalActivationUnit, query: Tensor, keys: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Pooled [B, D]: the concatenation or outer product of every pair is formed and sent through the layers."""
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    v, depth = query[sample], len(unit.hidden_units)
    if unit.interaction == "outer":
        h = torch.cat([keys, torch.einsum("na,nb->nab", keys, v).flatten(1), v], 1)
    else:
        h = torch.cat([v, keys, v - keys, v * keys], 1)
    for layer in range(depth):
        h = h @ parameters[f"linears.{layer}.weight"].t() + parameters[f"linears.{layer}.bias"]
        if unit.activation == "sigmoid":
            h = torch.sigmoid(h)
        elif unit.activation == "relu":
            h = torch.relu(h)
        elif unit.activation == "prelu":
            h = torch.where(h > 0, h, h * parameters[f"activations.{layer}.weight"])
        else:
            h = _exact_dice(h, parameters[f"activations.{layer}.alpha"], h.mean(0), h.var(0, correction=0), 1e-8)
    scores = (h @ parameters[f"linears.{depth}.weight"].t() + parameters[f"linears.{depth}.bias"]).squeeze(1)
    if unit.softmax:
        scores = torch.cat([torch.softmax(s, 0) for s in torch.split(scores, list(LENGTHS))])
    return torch.stack([rows.sum(0) for rows in torch.split(scores.unsqueeze(1) * keys, list(LENGTHS))])


def _exact_update(
    weight: Tensor, ids: Tensor, grad: Tensor, occurrences: Tensor, optimizer: str, lr: float, reg_lambda: float
) -> Tensor:
    """One coupled step from zero state, row by row (paper eq. 7 for "sgd")."""
    weight = weight.clone()
    for row in ids.unique().tolist():
        g = grad[ids == row].sum(0) + reg_lambda / max(int(occurrences[row]), 1) * weight[row]
        if optimizer == "adagrad":
            g = g / (g.abs() + 1e-10)
        elif optimizer == "rowwise_adagrad":
            g = g / (g.square().mean().sqrt() + 1e-10)
        elif optimizer == "adam":
            scale = (1 - 0.999) ** 0.5
            g = scale * g / (scale * g.abs() + 1e-8)
        weight[row] -= lr * g
    return weight


# ---- the checks ----------------------------------------------------------------------------------------------


def _compare(
    found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, stages: int
) -> tuple[float, float, str]:
    """(error, allowed, problem) of the worst quantity; gradients may cancel, so the largest of them sets the size."""
    size = max((float(e.square().mean().sqrt()) for name, e in exact.items() if name.startswith("grad")), default=0.0)
    tolerance = testing.tolerance(dtype, length=sum(LENGTHS) * max(DIM, *HIDDEN), stages=stages)
    worst, problem = 0.0, ""
    for name, want in exact.items():
        result = testing.compare(found[name], want, tolerance, scale=size if name.startswith("grad") else None)
        worst = max(worst, result.rms_ratio)
        if not result.ok and not problem:
            problem = f"{name}: {result}"
    return worst, tolerance.rms, problem


def _check_unit(place: Place, interaction: str, activation: str, softmax: bool) -> tuple[float, float, str]:
    torch.manual_seed(0)
    unit = LocalActivationUnit(DIM, HIDDEN, activation, interaction, softmax, backend=place.backend)
    with torch.no_grad():
        for module in unit.activations:
            if isinstance(module, Dice):
                module.alpha.normal_(0.2, 0.3)
    unit = unit.to(place.device, place.dtype)
    batch = testing.jagged_batch(LENGTHS, DIM, dtype=place.dtype, device=place.device)
    query, keys = batch.query.requires_grad_(), batch.keys.requires_grad_()
    grad = testing.jagged_batch(LENGTHS, DIM, dtype=place.dtype, seed=1).query

    def gradients(pooled: Tensor, query: Tensor, keys: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {"query": query, "keys": keys, **parameters}
        found = torch.autograd.grad(pooled, list(leaves.values()), grad.to(pooled))
        return {"pooled": pooled.detach(), **{f"grad {n}": g for n, g in zip(leaves, found, strict=True)}}

    exact_query, exact_keys = (t.detach().cpu().double().requires_grad_() for t in (query, keys))
    exact_parameters = {n: p.detach().cpu().double().requires_grad_() for n, p in unit.named_parameters()}
    exact_pooled = _exact_unit(unit, exact_query, exact_keys, exact_parameters)
    exact = gradients(exact_pooled, exact_query, exact_keys, exact_parameters)
    pooled = unit(query, keys, offsets=batch.offsets)
    assert isinstance(pooled, Tensor)
    found = gradients(pooled, query, keys, dict(unit.named_parameters()))
    return _compare(found, exact, place.dtype, stages=4)


def _check_dice(place: Place) -> tuple[float, float, str]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(130, 20, generator=generator).to(place.device, place.dtype) for _ in range(2))
    alpha = torch.randn(20, generator=generator).to(place.device, place.dtype)

    def run(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, alpha: Tensor) -> dict[str, Tensor]:
        leaves = (x.detach().requires_grad_(), alpha.detach().requires_grad_())
        y = call(*leaves)
        dx, dalpha = torch.autograd.grad(y, leaves, grad.to(y))
        return {"y": y.detach(), "dx": dx, "dalpha": dalpha}

    exact = run(
        lambda x, alpha: _exact_dice(x, alpha, x.mean(0), x.var(0, correction=0), 1e-8),
        x.cpu().double(),
        alpha.cpu().double(),
    )
    found = run(lambda x, alpha: dice(x, alpha, training=True, backend=place.backend), x, alpha)
    return _compare(found, exact, place.dtype, stages=3)


def _check_update(place: Place, optimizer: str) -> tuple[float, float, str]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (90,), generator=generator)
    ids[:40] = 7  # one row takes many gradients
    weight, grad = (torch.randn(n, DIM, generator=generator).to(place.dtype) for n in (20, 90))
    occurrences = torch.randint(0, 9, (20,), generator=generator)
    exact = _exact_update(weight.double(), ids, grad.double(), occurrences, optimizer, 0.1, 0.05)
    table = weight.to(place.device)
    sparse_update_(
        table, ids.to(place.device), grad.to(place.device), lr=0.1, optimizer=optimizer,
        state=init_state(table, optimizer), regularizer="mba", reg_lambda=0.05,
        occurrences=occurrences.to(place.device), backend=place.backend,
    )  # fmt: skip
    return _compare({"weight": table}, {"weight": exact}, place.dtype, stages=2)


CHECKS: dict[str, Callable[[Place], tuple[float, float, str]]] = {
    "local_activation product sigmoid": lambda p: _check_unit(p, "product", "sigmoid", False),
    "local_activation product dice": lambda p: _check_unit(p, "product", "dice", False),
    "local_activation product prelu softmax": lambda p: _check_unit(p, "product", "prelu", True),
    "local_activation outer sigmoid softmax": lambda p: _check_unit(p, "outer", "sigmoid", True),
    "local_activation outer dice": lambda p: _check_unit(p, "outer", "dice", False),
    "local_activation outer relu": lambda p: _check_unit(p, "outer", "relu", False),
    "dice": _check_dice,
    "sparse_update sgd + mba": lambda p: _check_update(p, "sgd"),
    "sparse_update adagrad + mba": lambda p: _check_update(p, "adagrad"),
    "sparse_update rowwise_adagrad + mba": lambda p: _check_update(p, "rowwise_adagrad"),
    "sparse_update adam + mba": lambda p: _check_update(p, "adam"),
}


def places() -> Iterator[Place]:
    """Every backend, device and dtype that can serve here."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            yield Place("torch", device, dtype)
        try:
            _backend.resolve("triton", device)
        except _backend.BackendUnavailable:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            yield Place("triton", device, dtype)


def run() -> Iterator[Outcome]:
    for place in places():
        for name, check in CHECKS.items():
            try:
                error, allowed, problem = check(place)
            except Exception as failure:  # a crash is a result too: the table goes on
                error, allowed, problem = float("nan"), 0.0, f"{type(failure).__name__}: {failure}"
            yield Outcome(name, place, error, allowed, problem)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m din_kernels.selftest", description="Parity of every operation, here."
    )
    parser.add_argument(
        "--interpret", action="store_true", help="run the Triton kernels on the CPU, in the interpreter"
    )
    if parser.parse_args(arguments).interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # nothing has imported Triton yet
    failed = total = 0
    print(f"{'':4} {'check':40} {'backend':20} {'on':5} {'dtype':9} {'error':>9} {'allowed':>9}")
    for outcome in run():
        total, failed = total + 1, failed + (not outcome.ok)
        status = "ok" if outcome.ok else "FAIL"
        print(f"{status:4} {outcome.check:40} {outcome.place} {outcome.error:9.2e} {outcome.allowed:9.2e}", flush=True)
        if outcome.problem:
            print(f"     {outcome.problem}")
    print(f"{total - failed} of {total} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
