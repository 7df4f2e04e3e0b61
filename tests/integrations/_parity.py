"""One comparison for all libraries: a module and its converted copy, through training steps and evaluation."""

from __future__ import annotations

import copy
import pickle

import torch

import din_kernels

CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 2e-5, "atol": 2e-6}}


def randomise(module):
    """Move everything off its initial value: weights of 1e-4 and alphas of 0 would hide mistakes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.4)
            if name.endswith("bn.weight") or (parameter.dim() == 1 and "weight" in name):
                parameter.abs_().add_(0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def assert_parity(module, make_inputs, call, *, dtype=torch.float64, swapped=None):
    """``make_inputs(seed)`` -> list of tensors (floating ones get gradients); ``call(module, inputs)`` -> output."""
    close = CLOSE[dtype]
    original = randomise(module).to(dtype)
    converted, report = din_kernels.convert(copy.deepcopy(original), backend="torch")
    assert report.swapped, report
    if swapped is not None:
        assert {entry.kind for entry in report.swapped} == swapped
    # Old checkpoints load strictly both ways, and the converted module moves, copies and pickles.
    converted.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(converted.state_dict(), strict=True)
    converted = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert isinstance(converted, type(original))
    for seed, training in ((0, True), (1, True), (2, False)):
        original.train(training), converted.train(training)
        results = []
        for each in (original, converted):
            torch.manual_seed(seed)  # dropout draws alike
            inputs = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in make_inputs(seed)]
            leaves = [x for x in inputs if x.requires_grad]
            each.zero_grad()
            out = call(each, inputs)
            weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape).sin()
            (out * weights).sum().backward()
            parameters = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
            results.append((out.detach(), [x.grad for x in leaves], parameters, dict(each.named_buffers())))
        (out, inputs, parameters, buffers), (out2, inputs2, parameters2, buffers2) = results
        assert out.shape == out2.shape
        torch.testing.assert_close(out2, out, **close)
        for one, two in zip(inputs, inputs2, strict=True):
            if one is not None:
                torch.testing.assert_close(two, one, **close)
        assert parameters.keys() == parameters2.keys()
        scale = max((g.abs().max().item() for g in parameters.values()), default=1.0)
        for name, one in parameters.items():
            torch.testing.assert_close(
                parameters2[name],
                one,
                rtol=close["rtol"],
                atol=close["atol"] * max(1.0, scale),
                msg=lambda m, n=name: f"{n}: {m}",
            )
        for name, one in buffers.items():
            torch.testing.assert_close(buffers2[name], one, **close)
    return report


def padded_inputs(batch=6, length=7, dim=5, *, empty=True):
    """seed -> (query [B, D], keys [B, T, D], lengths [B]): padding holds live numbers, as the libraries' embeddings do."""

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        if empty:
            lengths[1] = 0
        query = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
        keys = torch.randn(batch, length, dim, generator=generator, dtype=torch.float64)
        return query, keys, lengths

    return make
