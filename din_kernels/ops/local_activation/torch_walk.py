"""The torch backend's walk over the rows: one step per chunk, in one of two forms (see ``torch_plan.py``).

A step knows its behaviours and how they meet the first layer; what lies above that layer is the same for all steps and
lives in ``torch_hidden.py``. A *pair* is a (behaviour, candidate) combination; pairs are numbered packed row by packed
row, candidates fastest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .factorise import FirstLayer, FirstLayerGradients, first_layer
from .problem import UnitConfig, UnitTensors, weight_index
from .torch_plan import PackedRows, PieceGroup, RowChunk, pack_rows, piece_groups, row_chunks

# Average list lengths from which the per-list matrix form serves the product interaction too: when all lists are about as
# long as the longest, and when most pieces are whole whatever the lengths are.
EVEN_LISTS = 24
LONG_LISTS = 512


def _even(packed: PackedRows) -> bool:
    """Whether lists can be laid side by side with little padding.

    Forming A costs a list D·H once and then saves D·H per behaviour and direction, but pieces of uneven lists are padded
    and gathered, which costs more (D = 64, 80-40, 256 lists, one thread, time against rows: 0.77 when all have 100 rows, 1.1
    when their lengths are uniform up to 100).
    """
    if packed.count == 0:
        return False
    lengths = packed.offsets[1:] - packed.offsets[:-1]
    average = packed.count / lengths.numel()
    return average >= LONG_LISTS or (average >= EVEN_LISTS and int(lengths.max()) <= 1.1 * average)


class FirstSums:
    """Accumulators of the backward pass: the keys' gradient and what ``FirstLayerGradients`` describes."""

    def __init__(self, walk: Walk, grad_pooled: Tensor) -> None:
        config, keys = walk.config, walk.tensors.keys
        width, dim = config.hidden_units[0], config.embedding_dim
        queries, self.rows = walk.query.shape[0], keys.shape[0]
        new = walk.query.new_zeros
        self.grad_pooled = grad_pooled
        # The spare row at the end takes what the padding of the pieces writes.
        make = torch.empty if walk.packed.count == self.rows else torch.zeros
        self.keys_and_spare = make(self.rows + 1, dim, dtype=keys.dtype, device=keys.device)
        self.keys = self.keys_and_spare[: self.rows]
        self.offset = new(queries, width)
        outer = config.interaction == "outer"
        self.matrix = new(queries, width, dim) if outer else None
        self.shared = None if outer else new(width, dim)
        self.product = None if outer else new(width, dim)
        self.query = None if outer else new(queries, dim)

    def gradients(self) -> FirstLayerGradients:
        return FirstLayerGradients(self.offset, self.shared, self.product, self.query, self.matrix)


class RowStep:
    """Consecutive packed rows: z1 = c + W e + W_p (v ∘ e), two products with shared weights.

    pair   where the step's pairs lie among all pairs
    keep   [n] False at padding, None when there is none
    """

    keep = None

    def __init__(self, walk: Walk, chunk: RowChunk) -> None:
        self.walk, self.chunk = walk, chunk
        self.pair = slice(chunk.first, chunk.last)
        self.keys = walk.packed.gather(walk.tensors.keys, chunk.first, chunk.last).to(walk.dtype)
        self.query = walk.query.index_select(0, chunk.sample)
        self.crossed = self.keys * self.query

    def z1(self) -> Tensor:
        """[n, H1]"""
        first = self.walk.first
        assert first.product is not None
        z = first.offset.index_select(0, self.chunk.sample)
        return z.addmm_(self.keys, first.shared.t()).addmm_(self.crossed, first.product.t())

    def of_query(self, values: Tensor) -> Tensor:
        """Numbers held per query row [Q] -> [n]."""
        return values.index_select(0, self.chunk.sample)

    def dots(self, grad_pooled: Tensor) -> Tensor:
        """g · e of each pair [n]."""
        return grad_pooled.index_select(0, self.chunk.sample).mul_(self.keys).sum(1)

    def finish(self, sums: FirstSums, dz: Tensor, a: Tensor) -> None:
        """From dz1 [n, H1] and the weights a [n]: write de = a g + Aᵀ dz1 and add up the first layer's gradients."""
        chunk, first = self.chunk, self.walk.first
        assert first.product is not None
        assert sums.shared is not None
        assert sums.product is not None
        assert sums.query is not None
        sums.shared.addmm_(dz.t(), self.keys)
        sums.product.addmm_(dz.t(), self.crossed)
        through = dz @ first.product  # ∂L/∂(v ∘ e)
        index = torch.arange(self.keys.shape[0], device=dz.device)
        lists = slice(chunk.list_first, chunk.list_last)
        sums.offset[lists] += F.embedding_bag(index, dz, chunk.local_offsets, mode="sum")
        sums.query[lists] += F.embedding_bag(index, through * self.keys, chunk.local_offsets, mode="sum")
        grad = through.mul_(self.query).addmm_(dz, first.shared)
        grad.addcmul_(a.unsqueeze(1), sums.grad_pooled.index_select(0, chunk.sample))
        rows = self.walk.packed.rows
        if rows is None:
            sums.keys[chunk.first : chunk.last] = grad
        else:
            sums.keys.index_copy_(0, rows[chunk.first : chunk.last], grad.to(sums.keys.dtype))


class PieceStep:
    """Pieces of lists, each with the matrix of its query rows: z1 = c + A e as one batched product.

    Attributes and methods as in ``RowStep``; the n pairs are [pieces, P, C].
    """

    def __init__(self, walk: Walk, group: PieceGroup) -> None:
        self.walk, self.group = walk, group
        self.candidates = walk.config.candidates
        self.pieces, self.length = group.rows.shape
        self.pair: slice | Tensor
        if group.first is not None:
            self.pair = slice(
                group.first * self.candidates, (group.first + self.pieces * self.length) * self.candidates
            )
        elif self.candidates == 1:
            self.pair = group.packed.view(-1)
        else:
            candidate = torch.arange(self.candidates, device=group.rows.device)
            self.pair = (group.packed.unsqueeze(2) * self.candidates + candidate).view(-1)
        self.keep = None if group.valid is None else self._spread(group.valid.unsqueeze(2))
        self.keys = walk.behaviours(group)
        self.matrices = self._matrices()

    def _spread(self, values: Tensor) -> Tensor:
        return values.expand(self.pieces, self.length, self.candidates).reshape(-1)

    def _matrices(self) -> Tensor:
        """A of each piece and candidate [p, C·H1, D]."""
        first, dim = self.walk.first, self.keys.shape[2]
        columns = self.candidates * self.walk.config.hidden_units[0]
        if first.matrix is not None:
            return self.group.of_list(first.matrix.view(-1, columns, dim))
        assert first.product is not None
        query = self.group.of_list(self.walk.query.view(-1, self.candidates, 1, dim))
        return torch.addcmul(first.shared, query, first.product).view(-1, columns, dim)

    def z1(self) -> Tensor:
        width = self.walk.config.hidden_units[0]
        offset = self.group.of_list(self.walk.first.offset.view(-1, 1, self.candidates * width))
        return torch.baddbmm(offset, self.keys, self.matrices.transpose(1, 2)).view(-1, width)

    def of_query(self, values: Tensor) -> Tensor:
        return self._spread(self.group.of_list(values.view(-1, 1, self.candidates)))

    def dots(self, grad_pooled: Tensor) -> Tensor:
        g = self.group.of_list(grad_pooled.view(-1, self.candidates, self.keys.shape[2]))
        if self.candidates == 1:  # a product with a single column is faster as a sum
            return (self.keys * g).sum(2).view(-1)
        return torch.bmm(self.keys, g.transpose(1, 2)).view(-1)

    def finish(self, sums: FirstSums, dz: Tensor, a: Tensor) -> None:
        group, candidates, dim = self.group, self.candidates, self.keys.shape[2]
        width = self.walk.config.hidden_units[0]
        dz = dz.view(self.pieces, self.length, candidates * width)
        group.add_to_list(sums.offset.view(-1, candidates * width), dz.sum(1))
        place = None
        if sums.matrix is not None and isinstance(group.sample, slice):  # whole lists, each met once
            place = sums.matrix.view(-1, candidates * width, dim)[group.sample]
        outer = torch.bmm(dz.transpose(1, 2), self.keys, out=place)  # G of each piece and candidate [p, C·H1, D]
        if sums.matrix is not None:
            if place is None:
                group.add_to_list(sums.matrix.view(-1, candidates * width, dim), outer)
        else:
            assert self.walk.first.product is not None
            assert sums.shared is not None
            assert sums.product is not None
            assert sums.query is not None
            outer = outer.view(self.pieces, candidates, width, dim)
            sums.shared += outer.sum((0, 1))
            group.add_to_list(sums.query.view(-1, candidates, dim), (outer * self.walk.first.product).sum(2))
            query = group.of_list(self.walk.query.view(-1, candidates, 1, dim))
            sums.product += outer.mul_(query).sum((0, 1))
        grad_pooled = group.of_list(sums.grad_pooled.view(-1, candidates, dim))
        a = a.view(self.pieces, self.length, candidates)
        grad = None
        if group.first is not None:
            destination = sums.keys[group.first : group.first + self.pieces * self.length]
            if destination.dtype == dz.dtype:
                grad = destination.view(self.pieces, self.length, dim)
        grad = torch.bmm(dz, self.matrices, out=grad)
        if candidates == 1:
            grad.addcmul_(a, grad_pooled)
        else:
            grad.baddbmm_(a, grad_pooled)
        if group.first is None:
            rows = group.writing_rows(sums.rows)
            sums.keys_and_spare.index_copy_(0, rows, grad.view(-1, dim).to(sums.keys.dtype))
        elif grad.dtype != sums.keys.dtype:
            destination.copy_(grad.view(-1, dim))


class Walk:
    """The steps of one call, in the form that suits it, and sums over lists."""

    def __init__(self, config: UnitConfig, tensors: UnitTensors) -> None:
        self.config, self.tensors = config, tensors
        self.dtype = torch.float64 if tensors.keys.dtype == torch.float64 else torch.float32
        self.packed: PackedRows = pack_rows(config, tensors)
        self.first: FirstLayer = first_layer(config, tensors)
        self.query = tensors.query.to(self.dtype)
        self.num_lists = tensors.starts.numel()
        by_rows = config.interaction == "product" and config.candidates == 1 and not _even(self.packed)
        self.chunks: list[RowChunk] = row_chunks(config, self.packed) if by_rows else []
        self.groups: list[PieceGroup] = [] if by_rows else piece_groups(config, self.packed)

    def steps(self) -> Iterator[RowStep | PieceStep]:
        for chunk in self.chunks:
            yield RowStep(self, chunk)
        for group in self.groups:
            yield PieceStep(self, group)

    def behaviours(self, group: PieceGroup) -> Tensor:
        """[p, P, D]; padding repeats a real row."""
        keys, (pieces, length) = self.tensors.keys, group.rows.shape
        if group.first is not None:
            rows = keys[group.first : group.first + pieces * length]
        else:
            rows = keys.index_select(0, group.rows.view(-1))
        return rows.to(self.dtype).view(pieces, length, -1)

    def per_list(self, values: Tensor, mode: str = "sum") -> Tensor:
        """Reduce values [N·C] over each list -> [Q], in a fixed order; 0 for an empty list."""
        columns = values.view(-1, self.config.candidates)
        if columns.shape[0] == 0:
            return values.new_zeros(self.num_lists * self.config.candidates)
        index = torch.arange(columns.shape[0], device=values.device)
        reduced = F.embedding_bag(index, columns, self.packed.offsets[:-1], mode=mode)
        return reduced.reshape(-1)

    def list_of_pair(self) -> Tensor:
        """Query row of each pair [N·C]."""
        lengths = self.packed.offsets[1:] - self.packed.offsets[:-1]
        sample = torch.repeat_interleave(
            torch.arange(self.num_lists, device=lengths.device), lengths, output_size=self.packed.count
        )
        candidate = torch.arange(self.config.candidates, device=lengths.device)
        return (sample.unsqueeze(1) * self.config.candidates + candidate).view(-1)

    def flat_index(self) -> Tensor:
        """Where each pair [N·C] lies in the caller's weights [R·C]."""
        rows = self.packed.rows
        if rows is None:
            rows = torch.arange(self.packed.count, device=self.tensors.keys.device)
        candidate = torch.arange(self.config.candidates, device=rows.device)
        return weight_index(rows.unsqueeze(1), candidate, self.config).view(-1)

    def pool(self, a: Tensor) -> Tensor:
        """Σ_j a_j e_j -> [Q, D] without writing a_j e_j."""
        keys, candidates = self.tensors.keys, self.config.candidates
        if self.packed.count == 0:
            return a.new_zeros(self.num_lists * candidates, keys.shape[1])
        if candidates == 1:
            rows = self.packed.rows
            if rows is None:
                rows = torch.arange(self.packed.count, device=keys.device)
            table = keys if keys.dtype == a.dtype and keys.is_contiguous() else keys.to(a.dtype).contiguous()
            return F.embedding_bag(rows, table, self.packed.offsets[:-1], mode="sum", per_sample_weights=a)
        pooled = a.new_zeros(self.num_lists, candidates, keys.shape[1])
        weights = a.view(-1, candidates)
        for group in self.groups:
            w = weights[group.packed.clamp(max=self.packed.count - 1)]  # [p, P, C]
            if group.valid is not None:
                w = w.masked_fill(~group.valid.unsqueeze(2), 0)
            group.add_to_list(pooled, w.transpose(1, 2) @ self.behaviours(group))
        return pooled.view(-1, keys.shape[1])
