"""Which implementation serves a GPU, by what it can run."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

import din_kernels
from din_kernels import BackendUnavailable, _backend

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch, caplog):
    """GPUs of given compute capabilities, as torch would report them, and the times it was asked."""
    pytest.importorskip("triton")
    capabilities: list[tuple[int, int]] = []
    asked: list[torch.device] = []

    def properties(device):
        asked.append(device)
        major, minor = capabilities[device.index or 0]
        return SimpleNamespace(name="Test GPU", major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_backend, "_too_old", {})
    monkeypatch.setattr(_backend, "_said", set())
    monkeypatch.delenv("DIN_KERNELS_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    caplog.set_level(logging.WARNING, logger="din_kernels")
    return SimpleNamespace(capabilities=capabilities, asked=asked, log=caplog, patch=monkeypatch)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_supported(gpus, capability):
    gpus.capabilities.append(capability)
    for backend in (None, "triton", None):
        assert _backend.resolve(backend, GPU) == "triton"
    assert len(gpus.asked) == 1
    assert not gpus.log.records


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_too_old(gpus, capability):
    """Chosen automatically torch serves, and that is said once; by name the kernels raise."""
    gpus.capabilities.append(capability)
    said = f"'cuda:0' (Test GPU) has compute capability {capability[0]}.{capability[1]}, and Triton needs 8.0 or newer"
    for _ in range(3):
        assert _backend.resolve(None, GPU) == "torch"
    assert [record.message for record in gpus.log.records] == [f"{said}; the torch backend serves it"]
    with pytest.raises(BackendUnavailable) as error:
        _backend.resolve("triton", GPU)
    assert str(error.value).startswith(f"backend='triton' was asked for but {said}: use backend='torch'")
    gpus.patch.setenv("DIN_KERNELS_BACKEND", "triton")
    with pytest.raises(BackendUnavailable):
        _backend.resolve(None, GPU)
    gpus.patch.setenv("DIN_KERNELS_BACKEND", "auto")
    assert _backend.resolve(None, GPU) == "torch"
    assert _backend.resolve("torch", GPU) == "torch"
    gpus.patch.setenv("TRITON_INTERPRET", "1")  # the interpreter needs no GPU
    assert _backend.resolve("triton", GPU) == "triton"
    assert len(gpus.asked) == 1
    assert len(gpus.log.records) == 1


def test_each_gpu_for_itself(gpus):
    gpus.capabilities += [(9, 0), (7, 5)]
    assert [_backend.resolve(None, torch.device("cuda", i)) for i in (0, 1, 0, 1)] == ["triton", "torch"] * 2
    assert len(gpus.asked) == 2
    # "the current device" is another one from call to call: not remembered
    assert _backend.resolve(None, torch.device("cuda")) == "triton"
    gpus.capabilities.reverse()
    assert _backend.resolve(None, torch.device("cuda")) == "torch"


def test_rocm_counts_otherwise(gpus):
    gpus.capabilities.append((1, 0))
    gpus.patch.setattr(torch.version, "hip", "6.4")
    assert _backend.resolve(None, GPU) == _backend.resolve("triton", GPU) == "triton"
    assert not gpus.asked


def test_a_gpu_that_is_not_here(gpus):
    """Fake tensors of a GPU, traced where there is none."""
    assert _backend.resolve(None, GPU) == "triton"


def test_compiled(gpus):
    """Neither the question nor what is logged breaks a graph, and the answer is no reason to compile again."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def shifted(x):
        return x + 1 if _backend.resolve(None, GPU) == "torch" else x - 1

    gpus.patch.setitem(_backend._too_old, GPU, "it is old")
    for _ in range(3):
        assert shifted(torch.zeros(2)).tolist() == [1.0, 1.0]
    _backend._too_old[torch.device("cuda", 1)] = ""
    assert shifted(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert len(graphs) == 1
    assert [record.message for record in gpus.log.records] == ["it is old; the torch backend serves it"]


def test_what_the_kernels_do_not_serve_compiles(gpus):
    """A unit that is too wide for them falls back in a compiled model too, and says so."""
    torch.compiler.reset()
    gpus.patch.setattr(_backend, "resolve", lambda backend, device: "triton")  # as on a GPU
    unit = din_kernels.LocalActivationUnit(4, (512,), "sigmoid", "product").eval()
    query, keys = torch.randn(2, 4), torch.randn(2, 3, 4)
    compiled = torch.compile(unit, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, keys), unit(query, keys))
    assert len(gpus.log.records) == 1
    assert "hidden widths (512,) are outside" in gpus.log.records[0].message
