"""Statistics where they are delicate: small variance beside a large mean, outliers, few rows, momentum, counting."""

from __future__ import annotations

import shutil

import pytest
import torch

from din_kernels import functional
from din_kernels.modules import Dice
from din_kernels.ops.dice import torch_small, torch_statistics, triton_impl
from din_kernels.ops.dice.function import forward_op, moments_op
from din_kernels.ops.dice.torch_statistics import moments_of

from ._cases import by_definition, make_case

BACKENDS = ("torch", "triton")
SUMMED = (*BACKENDS, "columns")


def found_moments(x: torch.Tensor, backend: str, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, biased variance) [C] in float64. "columns": of the kernel that holds channels on chip."""
    if backend == "columns":
        asked = triton_impl._one_forward.cache_info()
        alpha, mean, var = (torch.zeros(x.shape[1], device=x.device) for _ in range(3))
        forward_op(x, None, mask, None, alpha, None, None, mean, var, None, None, 1.0, 1e-8, "triton")
        assert triton_impl._one_forward.cache_info() != asked
        rows = len(x) if mask is None else int(mask.sum())
        return mean.double().cpu(), var.double().cpu() * (rows - 1) / rows
    count, mean, m2 = moments_op(x, mask, backend).double().cpu().unbind(0)
    return mean, m2 / count


def delicate(rows: int, deviation: float, mean: float, device: torch.device) -> torch.Tensor:
    """float32 values whose exact variance is close to ``deviation``² beside ``mean``."""
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(rows, 6, generator=generator, dtype=torch.float64) * deviation + mean).float().to(device)


@pytest.mark.parametrize("backend", SUMMED)
@pytest.mark.parametrize(("deviation", "mean"), [(1e-7, 1e-3**0.5), (1e-3, 100.0), (1.0, 0.0), (1e-4, -1.0)])
@pytest.mark.parametrize("rows", [64, 4000])
def test_small_variance(rows, deviation, mean, backend, device):
    """Variance 1e-14 beside a squared mean of 1e-3: E[x²] − E[x]² in float32 would be off by 1e-11, a thousand times more."""
    x = delicate(rows, deviation, mean, device)
    wide = x.double().cpu()
    got_mean, got_var = found_moments(x, backend)
    ulp = abs(mean) * 2.0**-23
    torch.testing.assert_close(got_mean, wide.mean(0), rtol=0, atol=ulp + 3e-6 * deviation)
    # means are handed on in float32: that moves a variance by the square of what was rounded off
    rounding = 1e-5 + 2 * (ulp / deviation) ** 2
    torch.testing.assert_close(got_var, wide.var(0, unbiased=False), rtol=rounding, atol=0)
    if ulp:
        naive = x.square().mean(0) - x.mean(0).square()
        wrong = (naive.double().cpu() - wide.var(0, unbiased=False)).abs().max()
        assert wrong > 5 * rounding * deviation**2  # the test can fail


@pytest.mark.parametrize("backend", BACKENDS)
def test_epsilon_is_kept(backend, device):
    """ε = 1e-8 beside variance 1e-14 decides the result: x̂ of 1e-3 and not 1."""
    x = delicate(64, 1e-7, 1e-3**0.5, device)
    zeros, ones = torch.zeros(6, device=device), torch.ones(6, device=device)
    normalised = {}
    for eps in (1e-8, 1e-14):
        # weight 1000 makes the gate a magnifier
        y = functional.dice(x, zeros, weight=1000 * ones, bias=zeros, training=True, eps=eps, backend=backend)
        wide = x.double().cpu()
        z64, one64 = zeros.double().cpu(), ones.double().cpu()
        want, *_ = by_definition(wide, z64, z64, one64, 1000 * one64, z64, None, True, eps)
        normalised[eps] = y
        gate, gate_want = y.double().cpu() / wide, want / wide
        # rounding the mean to float32 moves x̂ by up to 2e-9/√(var + ε)
        torch.testing.assert_close(gate, gate_want, rtol=0, atol=250 * 2.5e-9 / (1e-14 + eps) ** 0.5 + 1e-5)
    assert (normalised[1e-8] - normalised[1e-14]).abs().max() > 0.005


@pytest.mark.parametrize(("deviation", "mean"), [(1e-7, 1e-3**0.5), (1e-3, 100.0), (1.0, 0.0), (1e-4, -1.0)])
@pytest.mark.parametrize("rows", [2, 1024])
@pytest.mark.parametrize("all_threads", [False, True])
def test_small_inputs(all_threads, rows, deviation, mean, monkeypatch):
    """The torch backend's paths for small inputs on CPUs: float32 sums, of differences from the first row."""
    monkeypatch.setattr(torch_small, "_SERIAL", 0 if all_threads else 1 << 15)
    x = delicate(rows, deviation, mean, torch.device("cpu"))
    x[1:3, 1] += 30 * deviation * rows**0.5  # rows far from the first one, and the first one far from the others
    x[0, 2] -= 30 * deviation * rows**0.5
    wide = x.double()
    ones, zeros, tracked = torch.ones(6), torch.zeros(6), torch.tensor(0)
    running = ones.clone(), ones.clone()
    y, normaliser = forward_op(x, None, None, None, zeros, None, None, *running, tracked, None, 0.25, 1e-30, "torch")
    rstd = wide.var(0, unbiased=False).rsqrt()
    rounding = 1e-5 * rows**0.5 / 32 + 1e-6
    torch.testing.assert_close(normaliser[1].double(), rstd, rtol=rounding, atol=0)
    ulp = abs(mean) * 2.0**-23
    torch.testing.assert_close(normaliser[0].double(), wide.mean(0), rtol=0, atol=ulp + rounding * 2000 * deviation)
    gate = torch.sigmoid((wide - wide.mean(0)) * rstd)
    torch.testing.assert_close(y.double() / wide, gate, rtol=0, atol=rounding)
    off = (running[0].double() - 0.75 - 0.25 * wide.mean(0)).abs()
    assert (off <= 1e-6 + ulp + rounding / rstd).all()
    torch.testing.assert_close(running[1].double(), 0.75 + 0.25 * wide.var(0), rtol=1e-5, atol=1e-6)
    assert tracked == 1
    if ulp:
        naive = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 1e-30)
        assert ((naive[2].double() / rstd - 1).abs() > 2 * rounding).any() or (
            naive[0] - (wide - wide.mean(0)) * rstd
        ).abs().max() > 4 * rounding


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch.compile needs one for C++")
@pytest.mark.parametrize("masked", [False, True])
def test_small_variance_compiled(masked):
    """What torch.compile makes of Dice on a CPU adds up in an order of its own, and loses nothing."""
    torch._dynamo.reset()
    compiled = torch.compile(functional.dice, fullgraph=True)
    alpha = torch.zeros(6)
    for deviation, mean in ((1e-7, 1e-3**0.5), (1e-3, 100.0), (1.0, 0.0)):
        x = delicate(4000, deviation, mean, torch.device("cpu"))
        mask = torch.arange(len(x)) % 3 != 0 if masked else None
        running = torch.zeros(6), torch.zeros(6)
        y = compiled(x, alpha, *running, mask=mask, training=True, momentum=1.0, eps=1e-30, backend="torch")
        wide = x.double()
        counted = wide if mask is None else wide[mask]
        ulp = abs(mean) * 2.0**-23
        torch.testing.assert_close(running[0].double(), counted.mean(0), rtol=0, atol=ulp + 3e-6 * deviation)
        rounding = 1e-5 + (2 * (ulp / deviation) ** 2 if masked else 0.0)
        torch.testing.assert_close(running[1].double(), counted.var(0), rtol=rounding, atol=0)
        z = (wide - counted.mean(0)) / counted.std(0, unbiased=False)
        torch.testing.assert_close(
            y.double() / wide, z.sigmoid(), rtol=0, atol=1e-5 + (ulp / deviation if masked else 0.0)
        )


@pytest.mark.parametrize("backend", SUMMED)
def test_sums_have_a_good_origin(backend, device):
    """First rows far from the others, values sorted, constant columns: nothing cancels."""
    rows = 4000 if backend == "columns" else 6000
    x = delicate(rows, 1.0, 0.0, device).sort(0).values
    x[:, 1] = 7.25
    x[0, 2] = 1e4
    x[:64, 3] += 1e3
    x[:, 4] += 1e4
    x[::2, 5] = -3e4
    got_mean, got_var = found_moments(x, backend)
    wide = x.double().cpu()
    deviation = wide.std(0, unbiased=False)
    assert ((got_mean - wide.mean(0)).abs() <= 2e-7 * wide.mean(0).abs() + 3e-6 * deviation).all()
    # sorted rows: means of parts, handed on in float32, differ by as much as the rows do
    rounding = 2e-5 + 0.2 * wide.mean(0).abs() * 2.0**-23 / deviation.clamp(min=1e-30)
    assert ((got_var - deviation.square()).abs() <= rounding * deviation.square()).all()


@pytest.mark.parametrize("kind", ["random", "sorted", "outliers", "transposed"])
@pytest.mark.parametrize(("deviation", "mean"), [(1e-7, 1e-3**0.5), (1e-3, 100.0), (1.0, 0.0), (1.0, 1e4)])
@pytest.mark.parametrize("rows", [4096, 9000])
def test_sums_of_batch_normalisation(rows, deviation, mean, kind):
    """The torch backend's statistics of large inputs on CPUs: float32 sums in turn, over few rows and from near the mean."""
    x = torch.randn(rows, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) * deviation + mean
    x = x.float()
    if kind == "sorted":
        x = x.sort(0).values
    elif kind == "outliers":
        x[0] += 1e4 * deviation
        x[rows // 2] -= 3e3 * deviation
    elif kind == "transposed":
        x = x.T.contiguous().T
    assert x.numel() >= torch_statistics._NATIVE_ELEMENTS
    count, got_mean, m2 = moments_of(x, None)
    wide = x.double()
    assert count == rows
    off = (got_mean - wide.mean(0)).abs()
    assert (off <= abs(mean) * 2.0**-24 + 2e-6 * wide.std(0)).all()
    torch.testing.assert_close(m2.double() / rows, wide.var(0, unbiased=False), rtol=5e-5, atol=0)


def test_sums_of_batch_normalisation_need_the_differences():
    """Handed the values as they are, it loses far more than ``test_sums_of_batch_normalisation`` allows."""
    x = (
        torch.randn(4096, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4096)) * 1e-3 + 100.0
    ).float()
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    wide = x.double()
    off = (mean.double() - wide.mean(0)).abs()
    assert (off > 2 * (100.0 * 2.0**-24 + 2e-6 * wide.std(0))).any()
    assert ((var.double() / wide.var(0, unbiased=False) - 1).abs() > 2 * 5e-5).any()


@pytest.mark.parametrize("backend", SUMMED)
def test_masked_rows_may_hold_anything(backend, device):
    """Rows outside the mask do not count, whatever they hold; the running statistics stay finite."""
    x = delicate(1500, 1.0, 2.0, device)
    mask = torch.arange(1500, device=device) % 3 != 0
    want = x[mask].double().cpu()
    for junk in (float("nan"), float("inf"), -1e30):
        x[~mask] = junk
        mean, var = found_moments(x, backend, mask)
        torch.testing.assert_close(mean, want.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(var, want.var(0, unbiased=False), rtol=1e-5, atol=0)
        module = Dice(6, backend="triton" if backend == "columns" else backend).to(device)
        y = module(x, mask)
        assert torch.isfinite(y[mask]).all()
        assert torch.isfinite(module.running_mean).all()
        assert torch.isfinite(module.running_var).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", [0, 1])
@pytest.mark.parametrize("rows", [9, 1500])
def test_too_few_rows_count(rows, chosen, backend, device, launches):
    """A mask of no row, or one: the running statistics serve, no gradient goes through them, and nothing is updated."""
    case = make_case((rows, 5), device=device)
    case.mask = torch.zeros(rows, dtype=torch.bool, device=device)
    case.mask[rows // 2 : rows // 2 + chosen] = True
    before = case.running_mean.clone(), case.running_var.clone(), case.tracked.clone()
    case.check(backend)
    for was, now in zip(before, (case.running_mean, case.running_var, case.tracked), strict=True):
        assert torch.equal(was, now)
    without = functional.dice(case.x, case.alpha, training=True, mask=case.mask, backend=backend)
    zeros, ones = torch.zeros_like(case.running_mean), torch.ones_like(case.running_var)
    torch.testing.assert_close(without, functional.dice(case.x, case.alpha, zeros, ones, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_raises(backend, device):
    module = Dice(4, backend=backend).to(device)
    batch_norm = torch.nn.BatchNorm1d(4).to(device)
    with pytest.raises(ValueError, match="more than 1 value per channel when training") as theirs:
        batch_norm(torch.ones(1, 4, device=device))
    with pytest.raises(ValueError, match="more than 1 value per channel when training") as ours:
        module(torch.ones(1, 4, device=device))
    assert str(ours.value) == str(theirs.value)
    assert int(module.num_batches_tracked) == 0
    module.eval()
    assert module(torch.ones(1, 4, device=device)).shape == (1, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_running_statistics_are_batch_norms(momentum, backend, device):
    """Over several batches, with and without gradients, exactly one update a call."""
    ours = Dice(7, momentum=momentum, backend=backend).to(device)
    theirs = torch.nn.BatchNorm1d(7, momentum=momentum).to(device)
    for step, rows in enumerate((5, 1200, 3), start=1):
        x = torch.randn(rows, 7, device=device) * 3 + 1
        with torch.set_grad_enabled(step != 2):
            ours(x)
            theirs(x)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=1e-6)
        assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == step
    ours.eval()
    kept = ours.running_mean.clone(), ours.running_var.clone()
    ours(torch.randn(5, 7, device=device))
    assert torch.equal(ours.running_mean, kept[0])
    assert torch.equal(ours.running_var, kept[1])
    assert int(ours.num_batches_tracked) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_changed_running_statistics_are_noticed(backend, device):
    """A graph that was recorded with running statistics must not be differentiated with others unnoticed: they are kept."""
    module = Dice(4, backend=backend).to(device).eval()
    with torch.no_grad():
        module.running_mean.uniform_(-1, 1)
    x = torch.randn(6, 4, device=device, requires_grad=True)
    y = module(x)
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    module.train()
    module(torch.randn(50, 4, device=device) * 9)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, want)
    version = module.running_mean._version
    module(torch.randn(50, 4, device=device))
    assert module.running_mean._version > version
