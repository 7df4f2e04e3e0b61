"""Floors against small problems counted by hand, and workloads against what they claim."""

from __future__ import annotations

import pytest
import torch

from benchmarks.roofline import MACHINES, Floor, Machine, activation_floor, dice_floor, main, measure_cpu, sparse_floor
from benchmarks.workloads import (
    ACTIVATION,
    ACTIVATION_CPU,
    SPARSE_CPU,
    ActivationWorkload,
    DiceWorkload,
    Lengths,
    SparseWorkload,
    make_activation,
)  # fmt: skip

SMALL = ActivationWorkload("small", 2, Lengths("full", 3, 3), dim=4, hidden=(5,))


def test_forward_floor_of_a_small_unit() -> None:
    floor = activation_floor(SMALL, torch.float32)
    rows, queries = 6, 2
    parameters = 3 * 4 * 5 + 5  # the factorised first layer's three distinct matrices, and the output layer
    assert floor.bytes == 4 * (rows * 4 + 2 * queries * 4) + 8 * 2 + 4 * parameters
    first, heads = 2 * rows * 4 * 5, 2 * rows * 5 + 2 * rows * 4  # A_b e; output layer and pooling
    per_query = 4 * queries * 4 * 5
    assert floor.flops == first + heads + per_query
    assert floor.special == 2 * rows * 5


def test_backward_floor_reads_and_writes_the_rows() -> None:
    forward, backward = activation_floor(SMALL, torch.float32), activation_floor(SMALL, torch.float32, backward=True)
    assert backward.bytes - forward.bytes == 4 * (6 * 4 + 2 * 2 * 4)
    assert backward.special == forward.special  # hidden layers are recomputed


def test_candidates_share_their_list() -> None:
    one, many = (activation_floor(SMALL.with_(candidates=c), torch.float32) for c in (1, 8))
    assert many.bytes - one.bytes == 4 * 2 * 7 * 2 * 4  # queries and results only
    assert many.flops == 8 * one.flops


def test_dice_and_sparse_floors() -> None:
    workload = DiceWorkload("d", 10, 4)
    assert dice_floor(workload, torch.float32).bytes == 3 * 40 * 4
    assert dice_floor(workload, torch.float32, backward=True).bytes == 5 * 40 * 4
    assert dice_floor(workload, torch.float32, cached=True).bytes == 2 * 40 * 4
    sparse = sparse_floor(SparseWorkload("s", 100, 50, 8), distinct=20)
    assert sparse.bytes == 100 * (32 + 8) + 20 * (2 * 32 + 8)


def test_the_binding_limit_is_the_longest() -> None:
    machine = Machine("m", bandwidth=10, bf16=100, tf32=50, fp32=20, special=5, issue=2, cache=0, source="")
    floor = Floor(bytes=10, flops=100, special=5, instructions=8)
    assert floor.times(machine, torch.float32) == {"bytes": 1, "arithmetic": 5, "special": 1, "issue": 4}
    assert floor.binding(machine, torch.float32) == ("arithmetic", 5)
    assert floor.binding(machine, torch.bfloat16) == ("issue", 4)
    assert (floor + floor).instructions == 16
    assert (floor + Floor(1, 1)).instructions is None  # unknown plus known is unknown


def test_this_machine_has_peaks() -> None:
    machine = measure_cpu(seconds=0.01)
    assert min(machine.bandwidth, machine.bf16, machine.fp32, machine.special) > 1e7


def test_command_prints_every_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--machine", "H200"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name} forward+backward" in text for name in ACTIVATION)
    assert "data sheet" in text
    assert set(MACHINES) == {"A100-80GB", "H100-SXM", "H200"}


def test_workloads_are_what_they_say() -> None:
    assert ACTIVATION["S3"].lengths.sample(4000).double().mean() == pytest.approx(20, rel=0.15)
    for workload in (*ACTIVATION.values(), *ACTIVATION_CPU.values()):
        lengths = workload.lengths.sample(workload.batch)
        assert workload.lengths.low <= int(lengths.min())
        assert int(lengths.max()) <= workload.padded_length
    with pytest.raises(ValueError, match="kind"):
        Lengths("normal", 1, 2).sample(3)


def test_both_layouts_hold_the_same_rows_and_copies_the_same_lengths() -> None:
    workload = ActivationWorkload("w", 5, Lengths("uniform", 1, 4), 3, (2,))
    one, other = make_activation(workload), make_activation(workload, value_seed=1)
    mask = torch.arange(4) < one.lengths[:, None]
    assert torch.equal(one.padded[mask], one.keys)
    assert float(one.padded[~mask].abs().sum()) == 0
    assert torch.equal(one.lengths, other.lengths)
    assert not torch.equal(one.keys, other.keys)


def test_popular_ids_are_popular() -> None:
    workload = next(iter(SPARSE_CPU.values()))
    ids = workload.ids()
    assert ids.numel() == workload.occurrences
    assert int(ids.max()) < workload.table
    counts = ids.bincount().sort(descending=True).values
    assert float(counts[: workload.table // 100].sum()) > 0.4 * workload.occurrences
