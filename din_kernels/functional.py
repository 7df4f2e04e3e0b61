"""The three fused operations as validated functions."""

from .ops.dice.api import dice
from .ops.local_activation.api import RunningStatistics, local_activation
from .ops.sparse_update.api import init_state, sparse_update_

__all__ = ["RunningStatistics", "dice", "init_state", "local_activation", "sparse_update_"]
