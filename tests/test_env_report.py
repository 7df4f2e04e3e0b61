"""The report says what would run where, and gives the reason when something would not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from din_kernels import __version__, _backend, env_report


@pytest.fixture
def bare(monkeypatch):
    """A machine without a GPU, nothing switched on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_backend, "_too_old", {})
    for name in env_report.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_gpu(bare, capsys):
    env_report.main([])
    out = capsys.readouterr().out
    for expected in (__version__, torch.__version__, "no GPU that torch can use", "cpu   automatic choice: torch",
                     "not the kernels: backend='triton' was asked for",
                     "1..256", "DIN_KERNELS_DEBUG    (not set)"):  # fmt: skip
        assert expected in out


def test_with_the_interpreter(bare):
    pytest.importorskip("triton")
    bare.setenv("TRITON_INTERPRET", "1")
    bare.setenv("DIN_KERNELS_BACKEND", "triton")
    out = env_report.report()
    assert "cpu   automatic choice: triton" in out
    assert "the kernels can run (in the interpreter)" in out
    bare.setenv("DIN_KERNELS_BACKEND", "fast")
    assert "an error: DIN_KERNELS_BACKEND must be" in env_report.report()


def pretend_gpu(bare, major, minor):
    pytest.importorskip("triton")
    properties = SimpleNamespace(
        name="Test GPU", major=major, minor=minor, multi_processor_count=132, total_memory=80 << 30
    )
    bare.setattr(torch.cuda, "is_available", lambda: True)
    bare.setattr(torch.cuda, "device_count", lambda: 1)
    bare.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    bare.setattr(torch.version, "hip", None)


def test_with_a_gpu(bare):
    pretend_gpu(bare, 9, 0)
    out = env_report.report()
    assert "cuda:0  Test GPU, compute capability 9.0, 132 processors, 80 GiB" in out
    assert "cuda  automatic choice: triton" in out
    lines = list(env_report.unit(64, [512, 80], torch.float32))
    assert lines[0] == "cpu   torch"
    assert lines[1].startswith("cuda  torch: hidden widths (512, 80) are outside")


def test_with_a_gpu_too_old(bare):
    pretend_gpu(bare, 7, 5)
    out = env_report.report()
    assert "compute capability 7.5, 132 processors, 80 GiB, too old for the kernels" in out
    assert "cuda  automatic choice: torch" in out
    assert "not the kernels: backend='triton' was asked for but 'cuda' (Test GPU) has compute capability 7.5" in out
    assert list(env_report.unit(64, [36], torch.float32))[1] == "cuda  torch"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--embedding-dim", "64", "--hidden", "80", "40"], "the kernels serve this unit wherever they can run"),
        (["--embedding-dim", "300"], "do not serve this unit: embedding_dim 300 is outside"),
        (["--embedding-dim", "64", "--hidden", "512"], "do not serve this unit: hidden widths (512,) are outside"),
        (["--embedding-dim", "64", "--dtype", "float64"], "do not serve this unit: the Triton kernels take float32"),
    ],
)
def test_one_unit(bare, capsys, arguments, expected):
    env_report.main(arguments)
    out = capsys.readouterr().out
    assert "cpu   torch" in out
    assert expected in out
