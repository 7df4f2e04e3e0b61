"""Values, gradients and running statistics of both backends against the definition in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from din_kernels import BackendUnavailable
from din_kernels.functional import dice
from din_kernels.modules import Dice
from din_kernels.ops.dice import api, tiling, torch_small, triton_impl
from din_kernels.ops.dice.api import MAX_WIDTH
from din_kernels.testing import assert_close

from ._cases import STRIDES, make_case, random_case


@pytest.fixture(params=["small", "any size", "traced"])
def path(request, monkeypatch):
    """Small inputs take a path of their own on CPUs; "any size": the other one; "traced": what is compiled by torch."""
    if request.param == "any size":
        monkeypatch.setattr(torch_small, "serves", lambda x, training: False)
    if request.param == "traced":
        monkeypatch.setattr(api, "is_eager", lambda *_: False)
        monkeypatch.setattr(api, "is_compiling", lambda: True)


@pytest.mark.parametrize("seed", range(60))
def test_torch(seed, device, path):
    random_case(seed, max_rows=300, dtype=torch.float64, device=device).check("torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_torch_precisions(seed, dtype, device, path):
    random_case(seed, max_rows=300, dtype=dtype, device=device).check("torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_triton(seed, dtype, device, launches, poison_scratch):
    random_case(100 + seed, max_rows=400, dtype=dtype, device=device).check("triton")


# Several tiles and parts, and the merging of parts.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "how"),
    [(3000, 36, "contiguous"), (1300, 80, "sliced"), (2500, 3, "transposed"), (20000, 1, "contiguous")],
)
def test_triton_parts(rows, width, how, masked, device, two_launches, poison_scratch):
    case = make_case(
        (rows, width), how=how, masked=masked, affine=masked, momentum=None if masked else 0.1, device=device
    )
    case.check("triton")


# Channels held on chip: as many rows as a tile has, one less, one more; blocks of one channel to 32.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "how"),
    [(4096, 5, "contiguous"), (2049, 12, "sliced"), (1024, 3, "transposed"), (1023, 33, "contiguous"), (4095, 1, "contiguous"),
     (513, 257, "every second row"), (5, 300, "contiguous")],
)  # fmt: skip
def test_triton_columns(rows, width, how, masked, device, poison_scratch, one_launch):
    case = make_case(
        (rows, width), how=how, masked=masked, affine=masked, momentum=None if masked else 0.1, device=device
    )
    case.check("triton")
    assert set(one_launch) == {"forward_columns", "backward_columns"}


@pytest.mark.parametrize("masked", [False, True])
def test_triton_parts_in_turns(masked, device, poison_scratch, constants):
    """More parts than are read at a time, some of which no row of the mask lies in."""
    constants(BLOCK_P_ELEMENTS=8)
    case = make_case((6000, 16), masked=masked, device=device)
    plan = triton_impl._planned(case.x)
    assert plan.numbers["num_parts"] > 2 * plan.numbers["BLOCK_P"]
    if masked:
        case.mask[:1536] = False
        case.mask[3072:4608] = False
    case.check("triton")


def test_triton_wide(device, poison_scratch):
    make_case((40, 257), dtype=torch.bfloat16, parameter_dtype=torch.bfloat16, device=device).check("triton")
    widest = make_case((2, MAX_WIDTH), training=False, device=device)
    y = dice(widest.x, widest.alpha, widest.running_mean, widest.running_var, backend="triton")
    assert_close("y", y, widest.expected()[0], stages=3)
    with pytest.raises(BackendUnavailable, match="more than 8192 channels"):
        Dice(MAX_WIDTH + 1, backend="triton").to(device)(torch.zeros(2, MAX_WIDTH + 1, device=device))
    with pytest.raises(BackendUnavailable, match="float64"):
        Dice(3, backend="triton").to(device)(torch.zeros(2, 3, dtype=torch.float64, device=device))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", STRIDES)
def test_strides(how, training, device, path, launches):
    for backend in ("torch", "triton"):
        make_case((5, 9, 12), how=how, training=training, device=device).check(backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rows(backend, device):
    for training in (False, True):
        case = make_case((0, 5), training=training, device=device)
        before = case.running_mean.clone(), case.running_var.clone()
        y, grads = case.run(backend)
        assert y.shape == (0, 5)
        assert grads["x"].shape == (0, 5)
        assert grads["alpha"].tolist() == [0.0] * 5
        assert torch.equal(case.running_mean, before[0])
        assert torch.equal(case.running_var, before[1])
        assert int(case.tracked) == 3


@pytest.mark.parametrize("training", [False, True])
def test_default_device(training):
    """Tensors that the backend keeps for itself are where x is, not where the caller makes new ones; and they serve outside
    the mode in which they were made."""
    torch_small._constant.cache_clear()
    case = make_case((9, 7), training=training)
    with torch.device("meta"), torch.inference_mode():
        dice(
            case.x, case.alpha, case.running_mean.clone(), case.running_var.clone(), training=training, backend="torch"
        )
    case.check("torch")


@pytest.mark.parametrize("deviations", [0.0, 1.0, 17.0, 1e4])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(1024, 64), (13, 100, 64), (1023, 64), (70000, 1), (9, 70)])
def test_evaluation_far_from_the_mean(shape, affine, deviations, device):
    """x·rate + level is only for where it does not cancel: means of so many deviations, in all channels or one."""
    assert torch_small._FOLDED == 1024 * 64
    for everywhere in (True, False):
        case = make_case(shape, affine=affine, training=False, device=device, eps=1e-30)
        case.running_var.fill_(0.01)
        case.running_mean.zero_()
        case.running_mean[slice(None) if everywhere else -1] = 0.1 * deviations
        # As far from the mean as three deviations, which float32 holds to a few thousandths of one.
        case.x = case.running_mean + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        y_want, *_ = case.expected()
        leaves = case.leaves()
        arguments = {"weight": leaves.get("weight"), "bias": leaves.get("bias"), "eps": case.eps, "backend": "torch"}
        with torch.no_grad():
            y = dice(case.x, case.alpha, case.running_mean, case.running_var, **arguments)
        assert_close("y", y, y_want, stages=3)
        case.check("torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_evaluation_without_gradients(seed, dtype, device, path):
    case = random_case(seed, max_rows=200, dtype=dtype, device=device)
    case.training, case.mask = False, None
    if seed % 6 == 5:
        case.x, case.grad = case.x.reshape(-1, case.x.shape[-1])[0], case.grad.reshape(-1, case.x.shape[-1])[0]
    y_want, *_ = case.expected()
    for overwrite in (False, True):
        with torch.no_grad():
            y = dice(
                case.x.clone(), case.alpha, case.running_mean, case.running_var, weight=case.weight, bias=case.bias,
                eps=case.eps, overwrite=overwrite, backend="torch",
            )  # fmt: skip
        assert y.dtype == dtype
        assert_close("y", y, y_want, stages=3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"), [(2, 1), (1024, 3), (1025, 3), (1024, 32), (1024, 33), (1023, 256), (1024, 257)]
)
def test_torch_borders(rows, width, affine, training, device):
    """Sizes at which the paths for small inputs end."""
    assert torch_small._MOST_ROWS == 1024
    assert torch_small._SERIAL == 1024 * 32
    assert torch_small._MOST_ELEMENTS == 1024 * 256
    make_case((rows, width), affine=affine, training=training, device=device).check("torch")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 5, 36, 80, 200, 256, 8192])
@pytest.mark.parametrize("rows", [0, 1, 4096, 65536, 2**31])
def test_tilings_cover(rows, width, itemsize):
    """Parts cover all rows, none is empty, each fits 32-bit numbers, and reading parts costs less than reading rows."""
    for backward, strided in itertools.product((False, True), (False, True)):
        tile = tiling.columns_tile(rows, width, itemsize, backward=backward, strided=strided)
        if tile is not None:
            assert rows <= tile[0] <= max(16, 2 * rows)
            assert tile[0] * tile[1] <= 16384 // (1 + backward) // (1 + 3 * strided)
            assert tiling.columns_options(*tile)["num_warps"] <= 16
        else:
            assert rows > tiling.COLUMNS_MAX_ROWS or width == 8192 or strided
    for processors in (1, 108, 132, 304):
        t = tiling.tiling(rows, width, itemsize, processors)
        assert (t.parts - 1) * t.rows_per_part < max(rows, 1) <= max(1, t.parts * t.rows_per_part)
        assert t.rows_per_part % t.block_r == 0
        assert t.rows_per_part < 2**31
        assert t.parts < 65536
        if rows >= 4096:
            assert t.parts * 12 <= 0.5 * 2 * itemsize * t.rows_per_part
