"""FSDP2 over gloo: two processes with sharded parameters take the gradients of one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from din_kernels import LocalActivationUnit

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no fully_shard", allow_module_level=True)


def _gradients(rank, rendezvous, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    unit = LocalActivationUnit(8, (16,), "prelu", "product").double()
    whole = copy.deepcopy(unit)
    fsdp.fully_shard(unit, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    query, keys = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 5, 8, dtype=torch.float64)
    mine = slice(rank * 4, rank * 4 + 4)
    unit(query[mine], keys[mine]).square().mean().backward()
    whole(query, keys).square().mean().backward()
    found = {name: p.grad.full_tensor() for name, p in unit.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save([found, {name: p.grad for name, p in whole.named_parameters()}], results)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*returned a view tensor.*")
def test_gradients_of_sharded_parameters(tmp_path):
    results = tmp_path / "gradients.pt"
    mp.spawn(_gradients, (tmp_path / "rendezvous", results), nprocs=2)
    found, expected = torch.load(results, weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
