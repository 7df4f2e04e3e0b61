"""The fused operations as validated functions."""

from .ops.dice.api import dice
from .ops.gathered_activation.api import gathered_activation
from .ops.local_activation.api import RunningStatistics, local_activation
from .ops.sparse_update.api import init_state, sparse_update_

__all__ = ["RunningStatistics", "dice", "gathered_activation", "init_state", "local_activation", "sparse_update_"]
