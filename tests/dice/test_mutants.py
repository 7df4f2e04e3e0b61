"""Each check of the Dice kernels catches the kind of mistake it is there for: kernels broken on purpose."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import din_kernels.ops.dice as package
from din_kernels.ops.dice import triton_impl
from tests.support.memory_monitor import OutOfBounds, Race, memory_monitor

from ._cases import make_case
from .conftest import NEVER, forget
from .test_linear import check as check_shift
from .test_linear import shifted_case
from .test_statistics import delicate, found_moments

pytest.importorskip("triton")

NAMES = ("kernels", "kernels_backward", "kernels_columns")


@pytest.fixture(autouse=True)
def _one_launch_up_to_1024_rows(constants):
    constants(COLUMNS_MAX_ROWS=1024)


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """broken(old, new, …): the kernels with ``old`` replaced, everywhere it stands."""

    def load(*changes: str) -> None:
        folder = Path(package.__file__).parent
        sources = {name: (folder / f"{name}.py").read_text() for name in NAMES}
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert any(old in source for source in sources.values()), f"nothing to break: {old!r}"
            sources = {name: source.replace(old, new) for name, source in sources.items()}
        for name, source in sources.items():  # in this order: later ones import from earlier ones
            path = tmp_path / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(f"{package.__name__}.{name}", path)
            assert spec is not None
            assert spec.loader is not None
            mutant = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
            spec.loader.exec_module(mutant)
            monkeypatch.setattr(triton_impl, name, mutant)
        forget()

    yield load
    forget()


def run(rows: int = 1200, **options) -> None:
    make_case((rows, 9), affine=True, masked=True, **options).check("triton")


def run_both() -> None:
    """Two launches of three parts of two tiles each, then one launch."""
    run(2400)
    run(1000)


WRONG_NUMBERS = [
    ("slope[None, :] + (1.0 - slope)[None, :] * p", "slope[None, :] * p + (1.0 - slope)[None, :]", "y"),
    ("count * off * off", "0.0", "y|dx|running_var"),
    ("delta * delta * (count * (more / both))", "0.0", "y|dx|running_var"),
    ("counts = counts & (tl.load(mask", "counts = counts | (tl.load(mask", "y"),
    ("through = tl.where(counts[:, None], through, 0.0)", "through = through", "dx"),
    ("slanted += dz * centred", "slanted += dz", "dx"),
    ("direct += dz", "direct = dz", "dx"),
    ("closed += q_part", "closed += dz", "dalpha"),
    ("level = scale * inverse * sum_dz", "level = rstd * inverse * sum_dz", "dx"),
    ("m2 / tl.maximum(count - 1.0, 1.0)", "m2 / tl.maximum(count, 1.0)", "running_var"),
    ("old + step * (value - old)", "old + (1.0 - step) * (value - old)", "running_mean"),
    ("offset = _vector(bias, cols, C) * (-LOG2E)", "offset = _vector(bias, cols, C)", "y"),
]


@pytest.mark.parametrize(("old", "new", "where"), WRONG_NUMBERS, ids=lambda v: str(v)[:24])
def test_wrong_numbers(broken, constants, old, new, where):
    broken(old, new)
    constants(BLOCK_P_ELEMENTS=16)  # parts are read two at a time
    with pytest.raises(AssertionError, match=f"^({where}):"):
        run_both()


WRONG_COLUMNS = [
    ("away = tl.where(counts, value - mean[None, :], 0.0)", "away = value - mean[None, :]", "y|running_var"),
    ("tl.sum(away * away, 0) - left * left * count", "tl.sum(away * away, 0) + count", "y|running_var"),
    ("tl.where(counts, 1.0, 0.0)", "1.0", "y|running_var"),
    ("tl.sum(dz * centred, 0)", "tl.sum(dz, 0)", "dx"),
    ("through = tl.where(counts[:, None], through, 0.0)\n    result", "result", "dx"),
    ("(rest * scale)[None, :] * dz - through", "scale[None, :] * dz - through", "dx"),
    ("tl.sum(closed, 0), sum_dx", "tl.sum(dz, 0), sum_dx", "dalpha"),
    ("direct = g * (slope[None, :] + rest[None, :] * p)", "direct = g * p", "dx"),
]


@pytest.mark.parametrize(("old", "new", "where"), WRONG_COLUMNS, ids=range(len(WRONG_COLUMNS)))
def test_wrong_columns(broken, old, new, where):
    """The kernels that hold channels on chip."""
    broken(old, new)
    with pytest.raises(AssertionError, match=f"^({where}):"):
        run(1000)


def test_a_poor_mean_is_corrected(broken):
    """The second pass of ``_tile_moments`` makes up for what the first mean is off by; without it the case would fail."""
    poor = (
        "tl.sum(tl.where(counts, value, 0.0), 0) / at_least_one",
        "tl.sum(tl.where(counts, value, 0.0), 0) / (count + 8)",
    )
    broken(*poor)
    run(1000)
    broken("left = tl.sum(away, 0) / at_least_one", "left = tl.zeros_like(mean)", *poor)
    with pytest.raises(AssertionError):
        run(1000)


WRONG_SHIFTS = [
    ("used_mean = tl.where(enough, used_mean, -moved)", "used_mean = used_mean", {"one_row": True}, "y"),
    ("value += moved[None, :]", "value = value", {}, "y"),
    ("mean -= _vector(shift, cols, C)", "mean += _vector(shift, cols, C)", {"training": False}, "y"),
    ("opened += g * (slope[None, :] + rest[None, :] * p)", "opened += g * p", {}, "dshift"),
    ("tl.where(inverse == 0, scale * sum_dz, 0.0)", "scale * sum_dz", {}, "dshift"),
    ("tl.where(inverse == 0, scale * sum_dz, 0.0)", "0.0", {"training": False}, "dshift"),
    (
        "tl.sum(direct, 0) + tl.where(inverse == 0, ",
        "tl.sum(dz, 0) + tl.where(inverse == 0, ",
        {"columns": True},
        "dshift",
    ),
    ("value += _moved(shift, cols, C, HAS_SHIFT)[None, :]", "value += 0.0", {"columns": True}, "dx"),
]


@pytest.mark.parametrize(("old", "new", "options", "where"), WRONG_SHIFTS, ids=range(len(WRONG_SHIFTS)))
def test_wrong_shifts(broken, constants, old, new, options, where):
    """The branches for a shift, which the cases above do not enter."""
    broken(old, new)
    if "columns" not in options:
        constants(COLUMNS_MAX_ROWS=NEVER)
    case, shift = shifted_case(40, training=options.get("training", True))
    if "one_row" in options:
        case.mask = torch.arange(40) == 20
    with pytest.raises(AssertionError, match=f"^({where}):"):
        check_shift(case, shift, "triton")


def test_wrong_number_of_rows(broken):
    """Parts differ in length: 1200 rows are not a multiple of a tile. A lost tail shows as unwritten, poisoned memory."""
    broken("tl.minimum(num_rows - first, rows_per_part)", "tl.minimum(num_rows - first - 1, rows_per_part)")
    with pytest.raises(AssertionError, match=r"^y:"):
        run()


def test_naive_variance(broken, device):
    """E[x²] − E[x]² instead of differences from an origin loses a small variance."""
    x = delicate(20000, 1e-7, 1e-3**0.5, device)
    want = x.double().var(0, unbiased=False).cpu()
    torch.testing.assert_close(found_moments(x, "triton")[1], want, rtol=0.01, atol=0)
    broken("origin = tl.where((count == 0)[:, None], value, origin)", "origin = origin")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found_moments(x, "triton")[1], want, rtol=0.01, atol=0)


def test_everybody_updates(broken):
    """Running statistics written by every part, not one."""
    broken("return (part == 0).to(tl.int32) * C", "return C")
    with memory_monitor(), pytest.raises(Race):
        run(2400)


def test_running_statistics_read_while_written(broken):
    """Programs that read what the first part writes."""
    broken("serve = inside & (count < 2)", "serve = inside & (count >= 0)")
    with memory_monitor(), pytest.raises(Race):
        run(2400)


def test_one_row_too_many(broken):
    broken("counts = start + slot < rows\n", "counts = start + slot <= rows\n")
    with memory_monitor(), pytest.raises(OutOfBounds):
        run()


def test_one_channel_too_many(broken):
    broken("inside = (cols < C)[None, :]", "inside = (cols <= C)[None, :]")
    with memory_monitor(), pytest.raises((OutOfBounds, Race)):
        run()


def test_unwritten_part(broken, poison_scratch):
    """A program that does not leave its numbers shows as NaN, because scratch is poisoned."""
    broken("tl.store(pointer + C + cols, second, mask=mask)", "pass")
    with pytest.raises(AssertionError, match="nan"):
        run()


def test_unbroken(broken):
    """The machinery itself breaks nothing."""
    broken("LOG2E", "LOG2E")
    with memory_monitor():
        run()
