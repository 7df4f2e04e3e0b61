"""The self test passes here, and fails when an operation is wrong."""

from __future__ import annotations

import pytest
import torch

from din_kernels import _backend, selftest

TORCH = selftest.Place("torch", torch.device("cpu"), torch.float32)


def test_passes_here(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "places", lambda: iter([TORCH, TORCH._replace(dtype=torch.float64)]))
    assert selftest.main([]) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith(f"{2 * len(selftest.CHECKS)} of {2 * len(selftest.CHECKS)} checks passed")
    assert "FAIL" not in out


def test_kernels_pass_here(device):
    pytest.importorskip("triton")
    place = selftest.Place("triton", device, torch.float32)
    for name in ("local_activation product dice", "dice", "sparse_update adagrad + mba"):
        _, _, problem = selftest.CHECKS[name](place)
        assert not problem, name


def test_places_are_those_that_can_serve(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {p.backend for p in selftest.places()} == {"torch"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if _backend.has_triton():
        assert {p.backend for p in selftest.places()} == {"torch", "triton"}


@pytest.mark.parametrize("break_it", ["gradient", "value", "crash"])
def test_a_wrong_operation_fails(break_it, capsys, monkeypatch):
    from din_kernels.ops.local_activation import torch_impl

    forward, backward = torch_impl.forward, torch_impl.backward

    def wrong_value(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        return outputs._replace(pooled=outputs.pooled * 1.01)

    def wrong_gradient(*args, **kwargs):
        found = backward(*args, **kwargs)
        return found._replace(query=found.query.flip(0))

    def crash(*_, **__):
        raise RuntimeError("out of luck")

    name, function = {
        "value": ("forward", wrong_value), "gradient": ("backward", wrong_gradient), "crash": ("forward", crash)
    }[break_it]  # fmt: skip
    monkeypatch.setattr(torch_impl, name, function)
    monkeypatch.setattr(selftest, "places", lambda: iter([TORCH]))
    assert selftest.main([]) == 1
    out = capsys.readouterr().out
    assert "FAIL local_activation product sigmoid" in out
    assert "ok   sparse_update sgd + mba" in out  # the table goes on
    assert {"value": "pooled: ", "gradient": "grad query: ", "crash": "RuntimeError: out of luck"}[break_it] in out
