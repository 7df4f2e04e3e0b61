"""Statistics over two processes equal those of one process that has all rows: values, gradients, running statistics."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from din_kernels.modules import Dice, LinearDice, LocalActivationUnit, convert_sync_dice

from ._cases import Case, make_case

# backend, rows of the two processes, masked
CALLS = [
    ("torch", (7, 5), False),
    ("torch", (1, 1), False),
    ("torch", (6, 0), True),
    ("triton", (1100, 30), True),
    ("triton", (4, 3), False),
]


def whole_case(rows: tuple[int, int], masked: bool) -> Case:
    return make_case((sum(rows), 5), masked=masked, affine=True)


def build(case: Case, backend: str) -> Dice:
    module = Dice(5, affine=True, backend=backend)
    with torch.no_grad():
        module.alpha.copy_(case.alpha), module.weight.copy_(case.weight), module.bias.copy_(case.bias)
        module.running_mean.copy_(case.running_mean), module.running_var.copy_(case.running_var)
    return module


def step(module: Dice, case: Case, rows: slice) -> list[torch.Tensor]:
    """[y, dx] of these rows, then the gradients of the parameters and the running statistics."""
    x = case.x[rows].clone().requires_grad_()
    y = module(x, None if case.mask is None else case.mask[rows])
    y.backward(case.grad[rows])
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), module.running_mean, module.running_var]


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for backend, rows, masked in CALLS:
        case = whole_case(rows, masked)
        module = convert_sync_dice(nn.Sequential(build(case, backend)))[0]
        mine = slice(0, rows[0]) if rank == 0 else slice(rows[0], sum(rows))
        results.append(step(module, case, mine))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (backend, rows, masked), one, two in zip(CALLS, first, second, strict=True):
        case = whole_case(rows, masked)
        alone = step(build(case, backend), case, slice(None))
        found = [torch.cat((a, b)) for a, b in zip(one[:2], two[:2], strict=True)]
        found += [a + b for a, b in zip(one[2:-2], two[2:-2], strict=True)]
        for got, want in zip(found, alone[:-2], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
        for got in (one, two):
            torch.testing.assert_close(got[-2:], alone[-2:], rtol=1e-5, atol=1e-6)
        assert torch.equal(one[-1], two[-1])  # the same bits: processes never drift apart
        assert torch.equal(one[-2], two[-2])


def test_conversion(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(3, 4), Dice(4), LinearDice(4, 2), LocalActivationUnit(4, (3,)))
    with pytest.raises(ValueError, match="init_process_group"):
        convert_sync_dice(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with caplog.at_level(logging.WARNING, "din_kernels"):
            assert convert_sync_dice(model) is model
        assert "LocalActivationUnit" in caplog.text
        assert model[1].process_group is model[2].dice.process_group is dist.group.WORLD
        assert model[3].activations[0].process_group is None
        y = model[1](torch.ones(1, 4))  # one row in all: the running statistics serve
        torch.testing.assert_close(y, Dice(4).eval()(torch.ones(1, 4)))
    finally:
        dist.destroy_process_group()
