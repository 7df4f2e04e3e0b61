"""The small kernels around Dice's statistics against float64 over the rows themselves."""

from __future__ import annotations

import pytest
import torch

from din_kernels.ops.local_activation import dice_statistics
from din_kernels.ops.local_activation.dice_statistics import Moments, Used

from ._mutants import load_mutant


def parts_of(rows: torch.Tensor, counts: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Moments of consecutive parts of ``rows`` [N, H] float64, as programs leave them."""
    parts = rows.split(counts)
    means = torch.stack([p.mean(0) if len(p) else torch.zeros(rows.shape[1], dtype=rows.dtype) for p in parts])
    m2s = torch.stack([(p - m).square().sum(0) for p, m in zip(parts, means, strict=True)])
    return torch.tensor(counts).to(device), means.float().to(device), m2s.float().to(device)


def check_finish(rows: torch.Tensor, counts: list[int], device: torch.device, eps: float = 1e-8) -> None:
    running = (torch.randn(rows.shape[1]), torch.rand(rows.shape[1]) + 0.1)
    parts = parts_of(rows, counts, device)
    found = dice_statistics.finish(*parts, *(r.to(device) for r in running), eps)
    merged = dice_statistics.merge(*parts)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], merged, strict=True))
    total = sum(counts)
    mean, var = rows.mean(0), rows.var(0, unbiased=False)
    if total < 2:
        mean, var = running[0].double(), running[1].double()
    want = Used(
        torch.tensor(float(total), dtype=torch.float64), rows.mean(0) if total else torch.zeros(rows.shape[1]).double(),
        (rows - rows.mean(0)).square().sum(0), mean, (var + eps).rsqrt(),
        torch.tensor(1 / total if total >= 2 else 0.0).double(),
    )  # fmt: skip
    by_torch = dice_statistics.used(merged, *(r.to(device) for r in running), eps)
    for name, got, expected, twin in zip(Used._fields, found, want, by_torch, strict=True):
        scale = 1.0 if name != "m2" else float(total)  # parts come rounded to float32
        torch.testing.assert_close(
            got.double().cpu(), expected, rtol=3e-6, atol=1e-6 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
        torch.testing.assert_close(
            twin.double().cpu(), expected, rtol=3e-6, atol=1e-6 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


COUNTS = ([700], [1], [0], [0, 0, 1, 0], [3, 0, 5, 1], [2, *[0] * 40, 9, 1, 30], [5] * 33)


@pytest.mark.parametrize("width", [1, 16, 17, 36])
@pytest.mark.parametrize("counts", COUNTS, ids=len)
def test_finish(counts, width, device, poison_scratch):
    torch.manual_seed(len(counts) + width)
    check_finish(torch.randn(sum(counts), width, dtype=torch.float64) * 3 + 5, counts, device)


@pytest.mark.parametrize(
    ("old", "new"), [("rows[:, None] * away * away", "0.0 * away"), ("weighted += rows", "weighted = rows")]
)
def test_finish_broken(old, new, device, monkeypatch, tmp_path):
    """Without what the distance of the parts' means adds, or with the last parts' means alone."""
    load_mutant(monkeypatch, tmp_path, ("kernels_statistics",), "kernels_statistics", old, new)
    with pytest.raises(AssertionError):
        check_finish(torch.randn(200, 5, dtype=torch.float64), [2] * 100, device)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_update_running(count, dtype, momentum, device):
    torch.manual_seed(count)
    moments = Moments(torch.tensor(float(count), dtype=torch.float64), torch.randn(19), torch.rand(19) * max(count, 1))
    mean, var, tracked = torch.randn(19, dtype=dtype), torch.rand(19, dtype=dtype), torch.tensor(3)
    step = 1 / 4 if momentum is None else momentum
    unbiased = moments.m2.double() / max(count - 1, 1)
    want = [mean.double(), var.double()]
    if count >= 2:
        want = [old + step * (new - old) for old, new in zip(want, (moments.mean.double(), unbiased), strict=True)]
    for update in (dice_statistics.update_running, dice_statistics.launch_update_running):
        buffers = [mean.clone().to(device), var.clone().to(device)]
        counter = tracked.clone().to(device) if momentum is None or count != 50 else None
        versions = [b._version for b in buffers]
        update(Moments(*(t.to(device) for t in moments)), *buffers, counter, momentum)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        for got, expected in zip(buffers, want, strict=True):
            torch.testing.assert_close(got.double().cpu(), expected, rtol=tolerance, atol=tolerance)
        assert counter is None or int(counter) == 3 + (count >= 2)
        assert all(b._version > v for b, v in zip(buffers, versions, strict=True))
