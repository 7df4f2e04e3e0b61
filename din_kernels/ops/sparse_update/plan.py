"""The plan of a sparse update: which occurrence goes to which row. It depends on the ids alone.

Ids are known before the loss, so a plan can be made during the forward pass (on another stream, if wanted) and reused by
every update with the same ids. It never synchronises with the host: there is no ``unique`` in it; kernels find the
borders of a row's run by comparing neighbouring keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _checks

NO_PADDING = -1  # negative ids never take part, so this value switches nothing off


def key_dtype(num_rows: int) -> torch.dtype:
    """Narrowest dtype that holds every row and the key ``num_rows`` of skipped ids: a radix sort pays for every byte."""
    if num_rows <= torch.iinfo(torch.int16).max:
        return torch.int16
    if num_rows <= torch.iinfo(torch.int32).max:
        return torch.int32
    return torch.int64


def resolve_padding(padding_idx: int | None, num_rows: int) -> int:
    """``padding_idx`` as a row number (negative values count from the end, as in ``nn.Embedding``), or ``NO_PADDING``."""
    if padding_idx is None:
        return NO_PADDING
    if not isinstance(padding_idx, int) or isinstance(padding_idx, bool):
        raise TypeError(f"padding_idx must be an int or None, got {type(padding_idx).__name__}")
    if not -num_rows <= padding_idx < num_rows:
        raise ValueError(f"padding_idx must be within the {num_rows} rows of the table, got {padding_idx}")
    return padding_idx % num_rows


@dataclass(frozen=True)
class SparsePlan:
    """Occurrences sorted by row.

    keys       [N] int16, int32 or int64, ascending: the row of the i-th sorted occurrence, ``num_rows`` for skipped ones
    order      [N] int64: its position in the flattened ids; equal rows keep their order (the sort is stable), which fixes
               the order of summation and with it every bit of the result
    num_rows   rows of the table
    padding    the row left out, or −1
    ids        the ids the plan was made from (kept so that an optimizer can recognise them)
    """

    keys: Tensor
    order: Tensor
    num_rows: int
    padding: int
    ids: Tensor

    @staticmethod
    def build(ids: Tensor, num_rows: int, *, padding_idx: int | None = None, backend: str | None = None) -> SparsePlan:
        """Sort ``ids`` (int32 or int64, any shape; flattened).

        Negative ids and ``padding_idx`` take no part. Ids of ``num_rows`` and above raise ``IndexError`` on a CPU and, with
        ``DIN_KERNELS_DEBUG=1``, on a GPU; a GPU in normal mode skips them, as checking would wait for the device.
        """
        from . import function

        _checks.check_tensor("ids", ids, dtypes=_checks.INDEX_DTYPES)
        _checks.check_ids(ids, num_rows)
        padding = resolve_padding(padding_idx, num_rows)
        keys, order = function.plan(ids, num_rows, padding, backend)
        return SparsePlan(keys, order, num_rows, padding, ids)

    def made_from(self, ids: Tensor) -> bool:
        """Whether the plan was made from the very memory of ``ids`` (which the plan keeps alive, so it is not reused)."""
        return (
            self.ids.data_ptr() == ids.data_ptr()
            and self.ids.numel() == ids.numel()
            and self.ids.dtype == ids.dtype
            and self.ids.device == ids.device
        )


class TableGroup:
    """Several tables of one width, updated together: one key space, one sort, one launch.

    The tables are packed into one ``[V_1 + V_2 + …, D]`` tensor, and each given tensor is pointed at its part (its ``.data``
    becomes a view), so kernels need no table of addresses and modules that own the parameters keep working. Do not move or
    resize the tables afterwards: call ``.to(...)`` on the model before grouping.

        group = TableGroup([items.weight, categories.weight])
        ids = group.row_ids([item_ids, category_ids])        # each [N]; rows of the packed table
        group.update_(ids, grad, lr=0.1)                     # grad [N, D] of the first table, then [N, D] of the second

    With behaviours stored as ``cat(item, category)`` rows of width 2·D no copy of the gradient is needed: stack the ids as
    [N, 2] (``row_ids(..., dim=-1)``) and view the gradient as [2·N, D].

    tables        tensors [V_t, D], same dtype and device
    occurrences   optional list of int64 [V_t], packed likewise
    padding_idx   one entry per table (or None)
    """

    def __init__(
        self,
        tables: Sequence[Tensor],
        *,
        occurrences: Sequence[Tensor] | None = None,
        padding_idx: Sequence[int | None] | None = None,
    ) -> None:
        if not tables:
            raise ValueError("tables must hold at least one tensor")
        first = tables[0]
        for i, table in enumerate(tables):
            _checks.check_tensor(f"tables[{i}]", table, shape=(None, first.shape[-1]), dtypes=(first.dtype,))
            _checks.check_tensor(f"tables[{i}]", table, device=first.device)
        self.sizes = [int(table.shape[0]) for table in tables]
        self.base = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.num_rows = sum(self.sizes)
        paddings = list(padding_idx) if padding_idx is not None else [None] * len(self.sizes)
        if len(paddings) != len(self.sizes):
            raise ValueError(f"padding_idx must have one entry per table, {len(self.sizes)}, got {len(paddings)}")
        self.padding = [resolve_padding(p, n) for p, n in zip(paddings, self.sizes, strict=True)]
        self.occurrences: Tensor | None = None
        if occurrences is not None:
            if [o.numel() for o in occurrences] != self.sizes:
                raise ValueError(f"occurrences must hold one count per row of each table, {self.sizes}")
            self.occurrences = torch.cat([o.detach().to(first.device, torch.int64) for o in occurrences])
        with torch.no_grad():
            self.weight = torch.cat([table.detach() for table in tables])
        self.tables = list(tables)
        for table, base, size in zip(self.tables, self.base, self.sizes, strict=True):
            table.data = self.weight[base : base + size]

    def row_ids(self, ids: Sequence[Tensor], *, dim: int = 0) -> Tensor:
        """Rows of the packed table for per-table ids of equal shape, stacked along a new ``dim``; −1 where skipped."""
        if len(ids) != len(self.sizes):
            raise ValueError(f"ids must have one tensor per table, {len(self.sizes)}, got {len(ids)}")
        rows = []
        for i, (own, size, base, padding) in enumerate(zip(ids, self.sizes, self.base, self.padding, strict=True)):
            _checks.check_tensor(f"ids[{i}]", own, dtypes=_checks.INDEX_DTYPES, device=self.weight.device)
            _checks.check_ids(own, size, name=f"ids[{i}]")
            # Without the upper bound a bad id would silently train a row of the next table.
            skip = (own < 0) | (own >= size) | (own == padding)
            rows.append(torch.where(skip, -1, own.long() + base))
        return torch.stack(rows, dim=dim)

    def plan(self, row_ids: Tensor, *, backend: str | None = None) -> SparsePlan:
        """Sort the result of ``row_ids`` once, for all tables."""
        return SparsePlan.build(row_ids, self.num_rows, backend=backend)

    def update_(self, row_ids: Tensor, grad: Tensor, *, lr: float | Tensor, **options: object) -> None:
        """``sparse_update_`` on all tables; options as there (state: ``init_state(group.weight, optimizer)``)."""
        from .api import sparse_update_

        for table, base in zip(self.tables, self.base, strict=True):
            if table.numel() and table.data_ptr() != self.weight[base].data_ptr():
                raise RuntimeError("a table of this TableGroup was moved or replaced; build the group again")
        options.setdefault("occurrences", self.occurrences if options.get("regularizer") == "mba" else None)
        sparse_update_(self.weight, row_ids, grad, lr=lr, **options)  # type: ignore[arg-type]
        torch.autograd.graph.increment_version(self.tables)
