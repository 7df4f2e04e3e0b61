"""An embedding table that knows how often its ids occur, as mini-batch-aware regularization needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.sparse_update import registry
from ..ops.sparse_update.function import MBAEmbeddingFunction
from ..ops.sparse_update.plan import NO_PADDING, SparsePlan, resolve_padding

COUNTS = ("samples", "positions")


@torch.no_grad()
def add_occurrences_(
    occurrences: Tensor,
    ids: Tensor,
    *,
    offsets: Tensor | None = None,
    padding_idx: int | None = None,
    count: str = "samples",
) -> Tensor:
    """Add a batch to the counts ``occurrences`` [V] (int64, in place) and return them.

    ids        int32 or int64. With ``offsets`` [B+1]: flat, sample b holds ids[offsets[b]:offsets[b+1]]. Without: the first
               dimension is the sample, so [B, T] is one history per row and [B] one id per sample
    count      "samples": an id twice in one sample counts once (the n_j of the paper's eq. 4); "positions": it counts twice

    Negative ids and ``padding_idx`` are not counted. Integer sums: the result does not depend on the order. Nothing waits for
    the device. Raises ``IndexError`` for an id ≥ V (on a GPU in debug mode only; there such ids are not counted otherwise).
    """
    _checks.check_tensor("occurrences", occurrences, ndim=1, dtypes=(torch.int64,))
    _checks.check_tensor("ids", ids, dtypes=_checks.INDEX_DTYPES, device=occurrences.device)
    if count not in COUNTS:
        raise ValueError(f"count must be 'samples' or 'positions', got {count!r}")
    num_rows = occurrences.numel()
    _checks.check_ids(ids, num_rows)
    padding = resolve_padding(padding_idx, num_rows)
    flat = ids.reshape(-1).long()
    used = (flat >= 0) & (flat < num_rows) & (flat != padding)
    if offsets is not None:
        _checks.check_tensor("offsets", offsets, ndim=1, dtypes=_checks.INDEX_DTYPES, device=ids.device)
        _checks.check_offsets(offsets, flat.numel())
    many_per_sample = offsets is not None or (ids.dim() > 1 and ids.numel() > ids.shape[0])
    if count == "samples" and many_per_sample:
        position = torch.arange(flat.numel(), device=flat.device)
        if offsets is not None:
            sample = torch.searchsorted(offsets.long(), position, right=True)
        else:
            sample = position // (ids.numel() // ids.shape[0])
        # Sorted by id, and within an id by sample (the sort is stable): repeats inside a sample are neighbours.
        flat, order = torch.sort(torch.where(used, flat, num_rows), stable=True)
        sample = sample[order]
        used = flat < num_rows
        used[1:] &= (flat[1:] != flat[:-1]) | (sample[1:] != sample[:-1])
    return occurrences.index_add_(0, flat.clamp(0, max(num_rows - 1, 0)), used.long()) if num_rows else occurrences


def count_occurrences(
    ids: Tensor,
    num_embeddings: int,
    *,
    offsets: Tensor | None = None,
    padding_idx: int | None = None,
    count: str = "samples",
) -> Tensor:
    """Occurrences int64 [num_embeddings] of a data set's ids; see ``add_occurrences_``."""
    occurrences = torch.zeros(num_embeddings, dtype=torch.int64, device=ids.device)
    return add_occurrences_(occurrences, ids, offsets=offsets, padding_idx=padding_idx, count=count)


class MBAEmbedding(nn.Embedding):
    """``nn.Embedding`` with sparse gradients and the counts n_j of mini-batch-aware regularization.

    Train it with ``din_kernels.optim.Sparse*``: they take the counts and the padding row from here. Other optimizers over
    sparse gradients work too (without the regularizer).

    occurrences   [num_embeddings] int: in how many samples of the data set each id occurs; kept as given. None: counted
                  while training, each forward in training mode adding its ids before the update uses them
    padding_idx   row without gradient, decay or count; initialised to zero
    count         what is counted: "samples" (the paper's n_j: an id twice in a history counts once) or "positions"; with
                  2-D ids or offsets only can the two differ
    missing_ids   negative ids mean "no id": they give zero rows and take no part. Otherwise they raise as in nn.Embedding
    hoist_plan    sort the ids during the forward pass; the optimizer step then finds the sort done (one lookup per step)

    Streaming counts grow with every epoch. The paper's n_j is the count over the data set once: set ``counting = False`` after
    the first epoch, or count beforehand with ``count_``. An id seen by two calls (history and candidate) counts twice: to count
    the union, switch counting off and give ``count_`` the concatenated [B, T + 1] ids.

    State: ``weight`` [V, D], ``occurrences`` [V] int64 (persistent buffer). ``max_norm``, ``scale_grad_by_freq`` raise.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        occurrences: Tensor | None = None,
        padding_idx: int | None = None,
        *,
        count: str = "samples",
        missing_ids: bool = False,
        hoist_plan: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_norm is not None or scale_grad_by_freq or not sparse:
            raise ValueError("MBAEmbedding has sparse gradients only, and neither max_norm nor scale_grad_by_freq")
        if count not in COUNTS:
            raise ValueError(f"count must be 'samples' or 'positions', got {count!r}")
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, sparse=True,
            _weight=_weight, _freeze=_freeze, device=device, dtype=dtype,
        )  # fmt: skip
        if occurrences is not None:
            _checks.check_tensor("occurrences", occurrences, shape=(num_embeddings,))
            if occurrences.is_floating_point() or occurrences.dtype is torch.bool:
                raise TypeError(f"occurrences must be integers, got {occurrences.dtype}")
            counts = occurrences.detach().to(self.weight.device, torch.int64, copy=True)
        else:
            counts = torch.zeros(num_embeddings, dtype=torch.int64, device=self.weight.device)
        self.register_buffer("occurrences", counts)
        self.occurrences: Tensor
        self.counting = occurrences is None
        self.count = count
        self.missing_ids = missing_ids
        self.hoist_plan = hoist_plan
        self._plan: SparsePlan | None = None
        registry.set_owner(self.weight, self)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, occurrences: Tensor | None = None, **options: Any) -> MBAEmbedding:
        """An ``MBAEmbedding`` on the same ``Parameter`` as ``embedding`` (optimizers holding it stay valid)."""
        if embedding.max_norm is not None or embedding.scale_grad_by_freq:
            raise ValueError("embeddings with max_norm or scale_grad_by_freq cannot become an MBAEmbedding")
        made = cls(
            embedding.num_embeddings, embedding.embedding_dim, occurrences, embedding.padding_idx,
            _weight=embedding.weight.detach(), **options,
        )  # fmt: skip
        made.weight = embedding.weight
        registry.set_owner(made.weight, made)
        made.train(embedding.training)
        return made

    @torch.no_grad()
    def count_(self, ids: Tensor, *, offsets: Tensor | None = None) -> None:
        """Add the ids of some samples to ``occurrences``; see ``add_occurrences_``."""
        add_occurrences_(self.occurrences, ids, offsets=offsets, padding_idx=self.padding_idx, count=self.count)

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Rows [*ids.shape, D] of ``ids``. ``offsets`` [B+1] only says which of the flat ids form a sample, for counting."""
        if not self.missing_ids:
            _check_no_missing(ids)
        if self.training and self.counting:
            self.count_(ids, offsets=offsets)
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            padding = NO_PADDING if self.padding_idx is None else self.padding_idx
            return MBAEmbeddingFunction.apply(self.weight, ids, padding, self.missing_ids)
        registry.set_owner(self.weight, self)
        if self.hoist_plan:
            ids = ids.long()  # the gradient will hold these very ids, by which the optimizer knows the plan
            self._plan = SparsePlan.build(ids, self.num_embeddings, padding_idx=self.padding_idx)
        fused = registry.in_backward(self.weight)
        return MBAEmbeddingFunction.apply(
            self.weight,
            ids,
            NO_PADDING if self.padding_idx is None else self.padding_idx,
            self.missing_ids,
            registry.updater(self.weight) is not None,
            fused.issue_ticket(self.weight) if fused is not None else None,
        )

    def lookup(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Rows [N, D] of jagged ids: ``values`` [N], sample b holding values[offsets[b]:offsets[b+1]]."""
        _checks.check_tensor("values", values, ndim=1, dtypes=_checks.INDEX_DTYPES)
        return self(values, offsets)

    def update_in_backward(self, optimizer: Any) -> None:
        """Let ``optimizer`` (one of ``din_kernels.optim``, holding this table) update the table during backward; None: off.

        The gradient of the table then never outlives the backward pass. In exchange a training step is exactly one forward
        through this module, one backward, and one ``optimizer.step()`` (which closes the step). No gradient accumulation, no
        clipping (``weight.grad`` stays ``None``), no ``GradScaler``, no closures: those that can be seen raise.
        """
        if optimizer is not None and registry.updater(self.weight) is not optimizer:
            raise ValueError("optimizer must be an optimizer of din_kernels.optim that holds this module's weight")
        registry.set_in_backward(self.weight, optimizer)

    def take_plan(self, ids: Tensor) -> SparsePlan | None:
        """The plan made in forward, if it was made from the memory of ``ids`` (and it is forgotten)."""
        plan, self._plan = self._plan, None
        return plan if plan is not None and plan.made_from(ids) else None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_plan"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or an unpickled module owns its table from the start: an optimizer may be built before its first forward."""
        super().__setstate__(state)
        registry.set_owner(self.weight, self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        registry.set_owner(self.weight, self)  # with assign=True the table is another Parameter

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, count={self.count!r}, counting={self.counting}"


def _check_no_missing(ids: Tensor) -> None:
    """Where values may be read, say what negative ids need; the lookup itself raises for those that are too large."""
    if _checks.values_readable(ids) and ids.numel() and int(ids.min()) < 0:
        raise IndexError(
            f"ids must not be negative, got {int(ids.min())}: MBAEmbedding(..., missing_ids=True) skips them"
        )
