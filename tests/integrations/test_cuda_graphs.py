"""Training steps captured in a CUDA graph and replayed give the bits of the same steps made one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import din_kernels
from benchmarks.clock import capturing
from din_kernels.optim import SparseSGD

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def unit(activation: str, interaction: str) -> nn.Module:
    return din_kernels.LocalActivationUnit(32, (36,), activation=activation, interaction=interaction).cuda()


def of_unit(module: nn.Module) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step(query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = module(query, keys, lengths=lengths).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def of_rows(module: nn.Module) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step(query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = module(keys.flatten(0, 1)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def of_table(module: nn.Module) -> Step:
    optimizer = SparseSGD(module.parameters(), lr=0.1, regularizer="mba", reg_lambda=0.01)

    def step(query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = module(lengths.view(-1, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


CASES = {
    "unit": (lambda: unit("sigmoid", "product"), of_unit),
    "unit, Dice": (lambda: unit("dice", "product"), of_unit),
    "unit, outer": (lambda: unit("sigmoid", "outer"), of_unit),
    "unit, outer, Dice": (lambda: unit("dice", "outer"), of_unit),
    "Dice": (lambda: din_kernels.Dice(32).cuda(), of_rows),
    "Dice, average": (lambda: din_kernels.Dice(32, momentum=None).cuda(), of_rows),
    "LinearDice": (lambda: din_kernels.LinearDice(32, 20).cuda(), of_rows),
    "table": (lambda: din_kernels.MBAEmbedding(40, 8).cuda(), of_table),
}


def batches(number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(64, 32, generator=generator).cuda(), torch.randn(64, 30, 32, generator=generator).cuda() / 8,
            torch.randint(0, 31, (64,), generator=generator).cuda(),
        )
        for _ in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_replay_is_training(name: str) -> None:
    make, step_of = CASES[name]
    torch.manual_seed(1)
    module = make()
    twin = copy.deepcopy(module)
    given = batches(5)
    one_by_one = step_of(twin)
    for _ in range(3):
        one_by_one(*given[0])

    step, inputs = step_of(module), [tensor.clone() for tensor in given[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        loss = step(*inputs)
    for batch in given:
        for place, tensor in zip(inputs, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        assert torch.equal(loss, one_by_one(*batch))
    for found, want in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(found, want)
