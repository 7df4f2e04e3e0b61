"""Statistics over the rows of all processes of a group: exact, by merging moments, with two small exchanges a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_moments(moments: Tensor, group: Any) -> Tensor:
    """Moments [3, C] of every process -> [W, 3, C], the same bits on all of them."""
    gathered = moments.new_empty((dist.get_world_size(group), *moments.shape))
    dist.all_gather_into_tensor(gathered, moments.contiguous(), group=group)
    return gathered


def reduce_sums(sums: Tensor, group: Any) -> Tensor:
    """Sums [3, C] of the backward pass added over all processes, in the order of their ranks."""
    gathered = sums.new_empty((dist.get_world_size(group), *sums.shape))
    dist.all_gather_into_tensor(gathered, sums.contiguous(), group=group)
    return torch.sum(gathered, dim=0)
