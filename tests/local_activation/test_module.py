"""LocalActivationUnit as a citizen of PyTorch: parameters and buffers, copies, moves, training loops, many processes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

import din_kernels
from reference.units import LocalActivationUnit as Reference

D = 6
OPTIONS = [
    {"activation": activation, "interaction": interaction}
    for activation in ("dice", "prelu", "sigmoid", "relu")
    for interaction in ("outer", "product")
]


def make_unit(**options):
    torch.manual_seed(0)
    unit = din_kernels.LocalActivationUnit(D, (5, 3), backend="torch", **options)
    with torch.no_grad():
        for module in unit.activations:
            if isinstance(module, din_kernels.Dice):
                module.alpha.normal_()
    return unit


def batch(rows=4, length=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype)
    keys = torch.randn(rows, length, D, generator=generator, dtype=torch.float64).to(dtype)
    return query, keys, torch.randint(0, length + 1, (rows,), generator=generator)


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_is_that_of_the_reference(options):
    fused, exact = make_unit(**options), Reference(D, (5, 3), **options)
    assert list(fused.state_dict()) == list(exact.state_dict())
    exact.load_state_dict(fused.state_dict(), strict=True)
    other = make_unit(**options)
    with torch.no_grad():
        for tensor in exact.state_dict().values():
            tensor.add_(1)
    other.load_state_dict(exact.state_dict(), strict=True)
    for name, value in other.state_dict().items():
        assert torch.equal(value, exact.state_dict()[name])
    without_bias = din_kernels.LocalActivationUnit(D, bias=False, **options)
    assert not any(name.endswith("bias") for name in without_bias.state_dict())


def test_same_initialisation_as_the_reference():
    torch.manual_seed(3)
    fused = din_kernels.LocalActivationUnit(D, (5, 3))
    torch.manual_seed(3)
    exact = Reference(D, (5, 3))
    for (name, a), b in zip(fused.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_follow_the_reference(momentum):
    """Over several batches, one of them too small to have a variance."""
    fused, exact = make_unit().double(), Reference(D, (5, 3)).double()
    exact.load_state_dict(fused.state_dict())
    for module in (*fused.activations, *exact.activations):
        module.momentum = momentum
    for lengths in ([5, 2, 0, 3], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [5, 5, 5, 5]):
        query, keys = torch.randn(4, D, dtype=torch.float64), torch.randn(4, 5, D, dtype=torch.float64)
        how = {"lengths": torch.tensor(lengths)}
        torch.testing.assert_close(fused(query, keys, **how), exact(query, keys, **how), rtol=1e-10, atol=1e-10)
    assert int(fused.activations[0].num_batches_tracked) == 3
    for (name, got), want in zip(fused.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    before = {name: buffer.clone() for name, buffer in fused.named_buffers()}
    query, keys, lengths = batch(dtype=torch.float64)
    got, want = (module.eval()(query, keys, lengths=lengths) for module in (fused, exact))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(buffer, before[name]) for name, buffer in fused.named_buffers())


@pytest.mark.parametrize("options", OPTIONS[::2])
def test_copies_and_files(options):
    unit = make_unit(**options)
    query, keys, lengths = batch()
    unit(query, keys, lengths=lengths)  # running statistics are no longer those of construction
    file = io.BytesIO()
    torch.save(unit.state_dict(), file)
    file.seek(0)
    loaded = make_unit(**options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = unit.eval()(query, keys, lengths=lengths)
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit)), loaded.eval()):
        assert torch.equal(other(query, keys, lengths=lengths), expected)
        assert repr(other) == repr(unit)


def test_moves_and_casts():
    unit = make_unit()
    query, keys, lengths = batch(dtype=torch.float64)
    assert unit.double()(query, keys, lengths=lengths).dtype == torch.float64
    unit.bfloat16()
    assert unit(query.bfloat16(), keys.bfloat16(), lengths=lengths).dtype == torch.bfloat16
    empty = unit.to("meta").to_empty(device="cpu")  # deferred initialisation
    assert empty.linears[0].weight.device.type == "cpu"


def test_constructor_errors():
    build = din_kernels.LocalActivationUnit
    for arguments, options, message in (
        ((0,), {}, "embedding_dim must be at least 1, got 0"),
        ((D, ()), {}, r"hidden_units must name at least one layer of width 1 or more, got \(\)"),
        ((D, (4, 0)), {}, r"hidden_units .* got \(4, 0\)"),
        ((D,), {"activation": "gelu"}, "activation must be one of .*, got 'gelu'"),
        ((D,), {"interaction": "inner"}, "interaction must be one of .*, got 'inner'"),
        ((D,), {"backend": "cuda"}, "backend must be None, 'triton' or 'torch', got 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(*arguments, **options)


def test_activations_may_be_replaced_by_their_kind_only():
    query, keys, lengths = batch()
    unit = make_unit(activation="prelu")
    unit.activations[0] = torch.nn.PReLU(5)
    assert unit(query, keys, lengths=lengths).shape == query.shape
    unit.activations[1] = torch.nn.Sigmoid()
    with pytest.raises(
        TypeError, match=r"activations\[1\] is Sigmoid, but this unit was built with activation='prelu'"
    ):
        unit(query, keys, lengths=lengths)
    unit = make_unit(activation="dice")
    unit.activations[0] = din_kernels.Dice(5, affine=True)
    with pytest.raises(ValueError, match=r"activations\[0\] is an affine Dice"):
        unit(query, keys, lengths=lengths)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_activation_checkpointing(use_reentrant, activation):
    """Same gradients. Reentrant checkpointing runs the whole forward again, so Dice counts the batch once more, as
    nn.BatchNorm1d does; the other kind stops once it has what backward needs, which is before the update."""
    plain = make_unit(activation=activation)
    unit = copy.deepcopy(plain)
    results = []
    for module in (plain, unit):
        query, keys, lengths = batch()
        query.requires_grad_(), keys.requires_grad_()

        def call(query, keys, module=module, lengths=lengths):
            return module(query, keys, lengths=lengths)

        out = checkpoint(call, query, keys, use_reentrant=use_reentrant) if module is unit else call(query, keys)
        out.square().sum().backward()
        results.append([query.grad, keys.grad, *[p.grad for p in module.parameters()]])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    if activation == "dice":
        assert int(unit.activations[0].num_batches_tracked) == (2 if use_reentrant else 1)


def test_functional_call_and_ensembles():
    unit = make_unit(activation="prelu")
    query, keys, lengths = batch()
    zeros = {name: torch.zeros_like(p) for name, p in unit.named_parameters()}
    out = torch.func.functional_call(unit, zeros, (query, keys), {"lengths": lengths})
    assert torch.equal(out, torch.zeros_like(query))
    assert not torch.equal(unit(query, keys, lengths=lengths), out)


def test_grad_scaler():
    """Scaled float16 gradients come back unscaled, and a step with infinities is skipped."""
    unit = make_unit(activation="sigmoid")
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    query, keys, lengths = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = unit(query, keys, lengths=lengths).float().square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaled = [p.grad.clone() for p in unit.parameters()]
    unit.zero_grad()
    unit(query, keys, lengths=lengths).square().sum().backward()
    for got, p in zip(scaled, unit.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=0.1, atol=0.1 * float(p.grad.abs().max()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in unit.parameters()]
    optimizer.zero_grad()
    scaler.scale(unit(query, keys, lengths=lengths).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, b) for p, b in zip(unit.parameters(), before, strict=True))


def test_learns():
    """A list's answer is the behaviour nearest to the candidate: the unit must learn to look at the candidate."""
    torch.manual_seed(0)
    unit = din_kernels.LocalActivationUnit(4, (16,), "dice", "product", softmax=True, backend="torch")
    optimizer = torch.optim.Adam(unit.parameters(), lr=0.02)
    losses = []
    for _ in range(120):
        keys = torch.nn.functional.normalize(torch.randn(64, 6, 4), dim=2)
        place = torch.randint(0, 6, (64,))
        query = keys[torch.arange(64), place] + 0.1 * torch.randn(64, 4)
        _, weights = unit(query, keys, return_weights=True)
        loss = -weights[torch.arange(64), place].clamp(min=1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


def _train(rank, world, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    unit = make_unit(activation="prelu").double()
    parallel = torch.nn.parallel.DistributedDataParallel(unit)
    query, keys, lengths = batch(8, dtype=torch.float64)
    mine = slice(rank * 4, rank * 4 + 4)
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(query[mine], keys[mine], lengths=lengths[mine]).square().mean().backward()
        optimizer.step()
    if rank == 0:
        torch.save(unit.state_dict(), results)
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    """DistributedDataParallel over gloo: halves of the batch on two processes give the step of the whole batch."""
    results = tmp_path / "state.pt"
    mp.spawn(_train, (2, tmp_path / "rendezvous", results), nprocs=2)
    unit = make_unit(activation="prelu").double()
    query, keys, lengths = batch(8, dtype=torch.float64)
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        unit(query, keys, lengths=lengths).square().mean().backward()
        optimizer.step()
    for name, value in torch.load(results, weights_only=True).items():
        torch.testing.assert_close(
            value, unit.state_dict()[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
