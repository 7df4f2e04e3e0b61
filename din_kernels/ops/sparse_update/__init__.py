"""Sparse embedding update with mini-batch-aware regularization."""

from .api import init_state, sparse_update_
from .function import MBAEmbeddingFunction
from .plan import SparsePlan, TableGroup

__all__ = ["MBAEmbeddingFunction", "SparsePlan", "TableGroup", "init_state", "sparse_update_"]
