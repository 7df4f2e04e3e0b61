"""What people do to a model besides training it: hooks, frozen parts, synchronised BatchNorm, odd shapes and dtypes.

A converted module reads its parts itself instead of calling them, so each case here is one where that could show.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import din_kernels

from ._parity import padded_inputs, randomise


def deepctr(activation="sigmoid", **options):
    sequence = pytest.importorskip("deepctr_torch.layers.sequence")
    return randomise(sequence.AttentionSequencePoolingLayer((8, 4), activation, embedding_dim=5, **options)).double()


def fuxictr(activation="Sigmoid", **options):
    attention = pytest.importorskip("fuxictr.pytorch.layers.attentions.target_attention")
    return randomise(attention.DIN_Attention(5, [8, 4], activation, **options)).double()


def rechub(activation="prelu", **options):
    din = pytest.importorskip("torch_rechub.models.ranking.din")
    return randomise(din.ActivationUnit(5, [8, 4], activation, **options)).double()


def call(module, seed=0, dtype=torch.float64):
    """The module's output on one batch, whatever its library's argument order."""
    query, keys, lengths = (x.to(dtype) if x.is_floating_point() else x for x in padded_inputs()(seed))
    library = next(base.__module__ for base in type(module).__mro__ if not base.__module__.startswith("din_kernels"))
    if library.startswith("deepctr_torch"):
        return module(query.unsqueeze(1), keys, lengths.unsqueeze(1))
    if library.startswith("fuxictr"):
        return module(query, keys, mask=torch.arange(keys.shape[1]) < lengths.unsqueeze(1))
    return module(keys, query)


def converted(module):
    fused, report = din_kernels.convert(copy.deepcopy(module), backend="torch")
    assert report.swapped
    return fused


def assert_same(original, fused, *, steps=2):
    """Outputs, gradients and buffers over some batches."""
    for seed in range(steps):
        results = []
        for module in (original, fused):
            torch.manual_seed(seed)
            module.zero_grad()
            out = call(module, seed)
            out.sin().sum().backward()
            results.append((out.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(original.named_buffers()))


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
def test_weight_norm_made_before_or_after_conversion(make):
    """The old ``weight_norm`` computes the weight in a hook before the layer's forward."""

    def first_linear(module):
        return next(m for m in module.modules() if isinstance(m, nn.Linear))

    module, before, after = make(), make(), make()
    before.load_state_dict(module.state_dict())
    after.load_state_dict(module.state_dict())
    din_kernels.convert(before)
    for each in (module, before, after):
        torch.nn.utils.weight_norm(first_linear(each))
        with torch.no_grad():
            first_linear(each).weight_g.mul_(1.5)
    din_kernels.convert(after)
    for each in (before, after):
        torch.testing.assert_close(call(each), call(module), rtol=1e-9, atol=1e-9)
        for one in (each, module):
            call(one).sin().sum().backward()
        torch.testing.assert_close(first_linear(each).weight_g.grad, first_linear(module).weight_g.grad)
        module.zero_grad()


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
def test_parametrized_layers(make):
    module = make()
    for linear in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        torch.nn.utils.parametrizations.weight_norm(linear)
    assert_same(module, converted(module))


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
def test_hooks_of_inner_modules_run(make):
    seen = []
    module = make()
    fused = converted(module)
    for each in fused.modules():
        each.register_forward_hook(lambda m, _, out: seen.append(type(m).__name__))
    call(fused)
    original = copy.deepcopy(seen)
    seen.clear()
    for each in module.modules():
        each.register_forward_hook(lambda m, _, out: seen.append(type(m).__name__))
    call(module)
    assert sorted(n.replace("Fused", "").replace("_", "") for n in original) == sorted(n.replace("_", "") for n in seen)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (deepctr, {"activation": "Dice"}),
        (fuxictr, {"activation": "Dice"}),
        (fuxictr, {"batch_norm": True}),
        (fuxictr, {"dropout_rate": 0.4, "activation": "Dice"}),
        (rechub, {}),
    ],
)
def test_parts_in_another_mode_than_the_module(make, options):
    """Fine-tuning freezes BatchNorm alone; Monte Carlo dropout keeps dropout alone in training; a layer at a time too."""
    for training, kind, how_many in [
        (True, nn.BatchNorm1d, 9), (True, nn.BatchNorm1d, 1), (False, nn.BatchNorm1d, 9),
        (False, nn.BatchNorm1d, 1), (True, nn.Dropout, 9), (False, nn.Dropout, 9),
    ]:  # fmt: skip
        module = make(**options)
        fused = converted(module)
        for each in (module, fused):
            each.train(training)
            for part in [m for m in each.modules() if isinstance(m, kind)][:how_many]:
                part.train(not training)
        assert_same(module, fused)


@pytest.mark.parametrize("make", [deepctr, fuxictr])
def test_batch_norm_without_running_statistics(make):
    module = make("Dice")
    for norm in [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    fused = converted(module)
    for training in (True, False):
        module.train(training), fused.train(training)
        assert_same(module, fused)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_momentum_of_batch_norm(momentum):
    module = fuxictr("Dice")
    for norm in [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]:
        norm.momentum = momentum
    assert_same(module, converted(module), steps=4)


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
@pytest.mark.parametrize("frozen", ["weight", "all", "query"])
def test_frozen_parameters(make, frozen):
    module = make()
    for name, parameter in module.named_parameters():
        if frozen == "all" or (frozen == "weight" and name.endswith("weight")):
            parameter.requires_grad_(False)
    if frozen == "all":
        with torch.no_grad():
            torch.testing.assert_close(call(converted(module)), call(module))
    else:
        assert_same(module, converted(module))


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_output_dtype_of_low_precision_modules(make, dtype, training):
    module = make().to(dtype).train(training)
    expected, got = call(module, dtype=dtype), call(converted(module), dtype=dtype)
    assert got.dtype == expected.dtype
    close = {} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
@pytest.mark.parametrize("training", [True, False])
def test_output_dtype_under_autocast(make, training):
    module = make().float().train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = call(module, dtype=torch.float32), call(converted(module), dtype=torch.float32)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("make", [deepctr, fuxictr])
def test_one_row_in_training_raises_as_batch_norm_does(make):
    module = make("Dice")
    for each in (module, converted(module)):
        query, keys = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 1, 5, dtype=torch.float64)
        arguments = (query.unsqueeze(1), keys, torch.ones(1, 1)) if make is deepctr else (query, keys)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            each(*arguments)


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
def test_an_empty_batch(make):
    module = make().eval()
    query, keys = torch.randn(0, 5, dtype=torch.float64), torch.randn(0, 7, 5, dtype=torch.float64)
    for each in (module, converted(module)):
        if make is deepctr:
            assert each(query.unsqueeze(1), keys, torch.ones(0, 1)).shape == (0, 1, 5)
        else:
            assert (each(query, keys) if make is fuxictr else each(keys, query)).shape == (0, 5)


@pytest.mark.parametrize("make", [deepctr, fuxictr, rechub])
def test_views_with_hostile_strides(make):
    module = make()
    fused = converted(module)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 6, generator=generator, dtype=torch.float64).t()
    keys = torch.randn(7, 5, 6, generator=generator, dtype=torch.float64).permute(2, 0, 1)
    lengths = torch.tensor([[3], [0], [7], [1], [2], [5]])
    results = []
    for each in (module, fused):
        q, k = query.clone().requires_grad_(), keys.detach().requires_grad_()
        if make is deepctr:
            out = each(q.unsqueeze(1), k, lengths)
        else:
            out = each(q, k) if make is fuxictr else each(k, q)
        out.sum().backward()  # an expanded gradient
        results.append((out.detach(), q.grad, k.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
