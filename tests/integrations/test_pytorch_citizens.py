"""What PyTorch offers around a model works for converted ones: compile, export, sharding, checkpointing, deferred init."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

import din_kernels
from reference.units import Dice, LocalActivationUnit

from ._parity import padded_inputs, randomise


def deepctr(activation, **options):
    sequence = pytest.importorskip("deepctr_torch.layers.sequence")
    layer = sequence.AttentionSequencePoolingLayer((8, 4), activation, embedding_dim=5, **options)
    return layer, lambda query, keys, lengths: (query.unsqueeze(1), keys, lengths.unsqueeze(1))


def fuxictr(activation, **options):
    attention = pytest.importorskip("fuxictr.pytorch.layers.attentions.target_attention")
    layer = attention.DIN_Attention(5, [8, 4], activation, **options)
    return layer, lambda query, keys, lengths: (query, keys, torch.arange(keys.shape[1]) < lengths.unsqueeze(1))


def rechub(activation, **options):
    din = pytest.importorskip("torch_rechub.models.ranking.din")
    return din.ActivationUnit(5, [8, 4], activation, **options), lambda query, keys, lengths: (keys, query)


def case(make, activation, options):
    layer, arrange = make(activation, **options)
    fused, _ = din_kernels.convert(randomise(layer), backend="torch")
    inputs = [x.float() if x.is_floating_point() else x for x in padded_inputs()(0)]
    return fused, arrange(*inputs)


CASES = [
    pytest.param(deepctr, "sigmoid", {"weight_normalization": True}, id="deepctr-softmax"),
    pytest.param(deepctr, "Dice", {}, id="deepctr-dice"),
    pytest.param(fuxictr, "Dice", {}, id="fuxictr-dice"),
    pytest.param(fuxictr, "ReLU", {"batch_norm": True}, id="fuxictr-batchnorm"),
    pytest.param(rechub, "dice", {}, id="rechub-dice"),
]


@pytest.mark.parametrize(("make", "activation", "options"), CASES)
def test_compile_without_graph_breaks(make, activation, options):
    torch.compiler.reset()
    eager, inputs = case(make, activation, options)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for module, run in ((eager, eager), (compiled, call)):
            module.zero_grad()
            out = run(*inputs)
            out.sin().sum().backward()
            results.append((out.detach(), [p.grad for p in module.parameters()], list(module.buffers())))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("make", "activation", "options"), CASES)
def test_export_with_dynamic_batch_and_length(make, activation, options):
    module, inputs = case(make, activation, options)
    module.eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    shapes = tuple({0: batch, 1: length} if x.dim() > 1 and x.shape[1] == 7 else {0: batch} for x in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    larger = tuple(torch.cat([x, x]) for x in inputs)
    larger = tuple(torch.cat([x, x], dim=1) if 1 in shape else x for x, shape in zip(larger, shapes, strict=True))
    torch.testing.assert_close(program.module()(*larger), module(*larger))


@pytest.mark.parametrize(("make", "activation", "options"), CASES)
def test_activation_checkpointing_and_functional_call(make, activation, options):
    module, inputs = case(make, activation, options)
    module.eval()  # in training a second forward updates running statistics again, converted or not
    leaf = inputs[1].clone().requires_grad_()
    inputs = (inputs[0], leaf, *inputs[2:]) if make is not rechub else (inputs[0].requires_grad_(), *inputs[1:])
    expected = module(*inputs)
    grads = torch.autograd.grad(expected.sum(), list(module.parameters()))
    again = torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), list(module.parameters())), grads)
    state = {name: value.clone() * 1.1 for name, value in module.state_dict().items() if value.is_floating_point()}
    called = torch.func.functional_call(module, state, inputs)
    other = copy.deepcopy(module)
    other.load_state_dict(state, strict=False)
    torch.testing.assert_close(called, other(*inputs))


def test_deferred_initialisation_and_meta_tensors():
    with torch.device("meta"):
        model = nn.Sequential(LocalActivationUnit(5, (4,)), Dice(5))
    model, report = din_kernels.convert(model)
    assert len(report.swapped) == 3
    assert model[0](torch.empty(2, 5, device="meta"), torch.empty(2, 3, 5, device="meta")).shape == (2, 5)
    source = nn.Sequential(LocalActivationUnit(5, (4,)), Dice(5))
    model.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=True)
    query, keys = torch.randn(2, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(model[0](query, keys), source[0](query, keys))


def _shard(rank, directory):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    torch.manual_seed(0)
    single, _ = din_kernels.convert(LocalActivationUnit(5, (4, 2), "sigmoid", "product"))
    query, keys = torch.randn(8, 5), torch.randn(8, 6, 5)
    mine = slice(rank * 4, rank * 4 + 4)
    single(query, keys).square().mean().backward()
    expected = [p.grad for p in single.parameters()]
    for wrap in (fully_shard, DistributedDataParallel):
        module = copy.deepcopy(single)
        module.zero_grad()
        module = wrap(module)
        module(query[mine], keys[mine]).square().mean().backward()
        found = [p.grad.full_tensor() if wrap is fully_shard else p.grad for p in module.parameters()]
        torch.testing.assert_close(found, expected)
    dist.destroy_process_group()


def test_fsdp2_and_ddp_over_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(_shard, (str(tmp_path),), nprocs=2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, g++")
@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
def test_aot_inductor_in_a_process_that_has_imported_the_package(activation, tmp_path):
    module, _ = din_kernels.convert(LocalActivationUnit(5, (4,), activation, "product").eval(), backend="torch")
    query, keys, batch = torch.randn(6, 5), torch.randn(6, 7, 5), torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        shapes = {"query": {0: batch}, "keys": {0: batch}}
        program = torch.export.export(module, (query, keys), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "unit.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(compiled(query[:3], keys[:3]), module(query[:3], keys[:3]))
