"""The torch backend: the factorised local activation unit in vectorised PyTorch, with its gradients written out.

Serves every device and dtype, float64 included, and is the plain statement that the kernels are translations of::

    s_j  = scores(c_q + A_q e_j)          δ_q = g_q · u_q (+ Σ_j a_j · ∂L/∂a_j)
    a_j  = s_j | softmax(scale · s)_j     ds_j = da_j | scale · a_j (da_j − δ_q),   da_j = g_q · e_j (+ ∂L/∂a_j)
    u_q  = Σ_j a_j e_j                    de_j = a_j g_q + A_qᵀ dz1_j               G_q = Σ_j dz1_j e_jᵀ, γ_q = Σ_j dz1_j

Nothing of size rows × features outlives a chunk of a few thousand rows: memory is the inputs, their gradients and a few
numbers per row. Low-precision inputs are widened chunk by chunk and computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .factorise import FirstLayer, FirstLayerGradients, first_layer, first_layer_backward
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors, weight_index
from .torch_hidden import HiddenGradients, HiddenLayers, Recorded
from .torch_plan import PackedRows, PieceGroup, RowChunk, pack_rows, piece_groups, row_chunks

# Dice in training needs each layer's statistics over all rows before the next layer, so chunks cannot be finished one by
# one. Up to this size the pre-activations of all rows are held meanwhile; beyond it every pass recomputes them.
HELD_BYTES = 64 << 20

# Average list lengths from which the per-list matrix form serves the product interaction too: when all lists are about as
# long as the longest, and when most pieces are whole whatever the lengths are.
EVEN_LISTS = 24
LONG_LISTS = 512


def _even(packed: PackedRows) -> bool:
    """Whether lists can be laid side by side with little padding.

    Forming A costs a list D·H once and then saves D·H per behaviour and direction, but pieces of uneven lists are padded
    and gathered, which costs more (uniform lengths up to 100, D = 64, 80-40: 35 ms against 27 in rows; all of length 100:
    24 ms against 27).
    """
    if packed.count == 0:
        return False
    lengths = packed.offsets[1:] - packed.offsets[:-1]
    average = packed.count / lengths.numel()
    return average >= LONG_LISTS or (average >= EVEN_LISTS and int(lengths.max()) <= 1.1 * average)


class _Step(NamedTuple):
    """One chunk, whatever its form: its first pre-activations and how to push their gradient back.

    z1       [n, H1], a row per (behaviour, candidate)
    pair     slice or index of those rows among all pairs [N · C]
    query    [n] query row of each
    keep     [n] False at padding rows, None when there are none
    keys     [rows, D] the behaviours
    finish   (dz1 [n, H1], a [n], da-side grad_pooled) -> writes de and accumulates the first layer's gradients
    """

    z1: Tensor
    pair: slice | Tensor
    query: Tensor
    keep: Tensor | None
    keys: Tensor
    finish: Callable[[Tensor, Tensor], None] | None


class _Walk:
    """The chunks of one call, in the form that suits it, with the shared accumulators of the backward pass."""

    def __init__(self, config: UnitConfig, tensors: UnitTensors) -> None:
        self.config, self.tensors = config, tensors
        self.dtype = torch.float64 if tensors.keys.dtype == torch.float64 else torch.float32
        self.packed: PackedRows = pack_rows(config, tensors)
        self.first: FirstLayer = first_layer(config, tensors)
        self.query = tensors.query.to(self.dtype)
        self.num_lists = tensors.starts.numel()
        self.by_rows = config.interaction == "product" and config.candidates == 1 and not _even(self.packed)
        self.chunks: list[RowChunk] = row_chunks(self.packed) if self.by_rows else []
        self.groups: list[PieceGroup] = [] if self.by_rows else piece_groups(config, self.packed)

    # -- forward steps -------------------------------------------------------------------------------------------

    def steps(self, backward: _Backward | None = None):  # type: ignore[no-untyped-def]
        for chunk in self.chunks:
            yield self._row_step(chunk, backward)
        for group in self.groups:
            yield self._piece_step(group, backward)

    def _row_step(self, chunk: RowChunk, backward: _Backward | None) -> _Step:
        keys = self.packed.gather(self.tensors.keys, chunk.first, chunk.last).to(self.dtype)
        query = self.query.index_select(0, chunk.sample)
        assert self.first.product is not None
        crossed = keys * query
        z1 = self.first.offset.index_select(0, chunk.sample)
        z1.addmm_(keys, self.first.shared.t()).addmm_(crossed, self.first.product.t())
        finish = None
        if backward is not None:
            step = backward  # keep the type checker's narrowing inside the closure

            def finish(dz: Tensor, a: Tensor) -> None:
                step.rows(chunk, keys, query, crossed, dz, a)

        return _Step(z1, slice(chunk.first, chunk.last), chunk.sample, None, keys, finish)

    def matrices(self, group: PieceGroup) -> Tensor:
        """A of each piece and candidate [p, C·H1, D]."""
        candidates, width = self.config.candidates, self.config.hidden_units[0]
        dim = self.config.embedding_dim
        if self.first.matrix is not None:
            return group.of_list(self.first.matrix.view(-1, candidates * width, dim))
        assert self.first.product is not None
        query = group.of_list(self.query.view(-1, candidates, 1, dim))
        return torch.addcmul(self.first.shared, query, self.first.product).view(-1, candidates * width, dim)

    def behaviours(self, group: PieceGroup) -> Tensor:
        """[p, P, D]; padding repeats a real row."""
        keys, (pieces, length) = self.tensors.keys, group.rows.shape
        if group.first is not None:
            rows = keys[group.first : group.first + pieces * length]
        else:
            rows = keys.index_select(0, group.rows.view(-1))
        return rows.to(self.dtype).view(pieces, length, -1)

    def _piece_step(self, group: PieceGroup, backward: _Backward | None) -> _Step:
        candidates, width = self.config.candidates, self.config.hidden_units[0]
        pieces, length = group.rows.shape
        keys = self.behaviours(group)
        matrices = self.matrices(group)
        offset = group.of_list(self.first.offset.view(-1, 1, candidates * width))
        z1 = torch.baddbmm(offset, keys, matrices.transpose(1, 2)).view(-1, width)  # [p, P, C, H1]
        candidate = torch.arange(candidates, device=keys.device)
        pair: slice | Tensor
        if group.first is not None:
            pair = slice(group.first * candidates, (group.first + pieces * length) * candidates)
        else:
            pair = (group.packed.unsqueeze(2) * candidates + candidate).view(-1)
        lists = group.of_list(torch.arange(self.num_lists, device=keys.device))
        query = (lists.view(-1, 1, 1) * candidates + candidate).expand(pieces, length, candidates).reshape(-1)
        keep = None
        if group.valid is not None:
            keep = group.valid.unsqueeze(2).expand(pieces, length, candidates).reshape(-1)
        finish = None
        if backward is not None:
            step = backward

            def finish(dz: Tensor, a: Tensor) -> None:
                step.pieces(group, keys, matrices, dz, a)

        return _Step(z1, pair, query, keep, keys, finish)

    # -- per list ------------------------------------------------------------------------------------------------

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

    def scores(self) -> Tensor:
        """s of every pair [N·C]."""
        layers = HiddenLayers(self.config, self.tensors, self.dtype)
        scores = self.empty_scores()
        for step in self.steps():
            scores[step.pair] = layers.scores(step.z1)
        return scores[: scores.numel() - self.config.candidates]

    def empty_scores(self) -> Tensor:
        """[N·C] and one spare entry per candidate, which takes what the padding of the pieces writes."""
        pairs = (self.packed.count + 1) * self.config.candidates
        return torch.empty(pairs, dtype=self.dtype, device=self.query.device)


def _fits(config: UnitConfig, walk: _Walk) -> bool:
    """Whether a handful of values per hidden unit and pair may be held for all pairs at once."""
    numbers = walk.packed.count * config.candidates * sum(config.hidden_units) * 4
    return numbers * walk.query.element_size() <= HELD_BYTES


class Moments(NamedTuple):
    """count [] float64, mean [H], m2 [H] = Σ (z − mean)²."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    def statistics(self, running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(mean, rstd) that Dice normalises with in training: the running ones when fewer than two rows were seen."""
        enough = self.count >= 2
        mean = torch.where(enough, self.mean, running_mean.to(self.mean.dtype))
        var = torch.where(enough, self.m2 / self.count.clamp(min=1).to(self.m2.dtype), running_var.to(self.m2.dtype))
        return mean, torch.rsqrt(var + eps)

    def inv_count(self) -> Tensor:
        """1/count where the batch's statistics serve, else 0."""
        inverse = 1 / self.count.clamp(min=1)
        return torch.where(self.count >= 2, inverse, torch.zeros_like(inverse)).to(self.m2.dtype)


def _moments(chunks: Iterable[Tensor], like: Tensor) -> Moments:
    """Moments over the rows of all chunks, merged by Chan's formula: E[z²] − E[z]² would go negative against ε = 1e-8."""
    mean, m2, count = like, torch.zeros_like(like), 0
    for z in chunks:
        rows = z.shape[0]
        var, average = torch.var_mean(z, 0, correction=0)
        if count == 0:
            mean, m2, count = average, var * rows, rows
            continue
        delta = average - mean
        total = count + rows
        mean = mean + delta * (rows / total)
        m2 = m2 + var * rows + delta.square() * (count * rows / total)
        count = total
    return Moments(torch.tensor(float(count), dtype=torch.float64, device=mean.device), mean, m2)


def statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> Moments:
    """Moments of hidden layer ``layer``'s pre-activation over all (behaviour, candidate) pairs. Layers below use
    ``tensors.means`` and ``tensors.rstds``."""
    walk = _Walk(config, tensors)
    layers = HiddenLayers(config, tensors, walk.dtype)
    chunks = (real_rows(layers.up_to(layer, step.z1), step.keep) for step in walk.steps())
    return _moments(chunks, walk.query.new_zeros(config.hidden_units[layer]))


def real_rows(z: Tensor, keep: Tensor | None) -> Tensor:
    return z if keep is None else z[keep]


def _normalise(config: UnitConfig, walk: _Walk, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over each list: (a [N·C], log Σ exp(scale·s) [Q])."""
    scaled = scores * config.scale
    query = walk.list_of_pair()
    top = walk.per_list(scaled, "max")
    exponentials = torch.exp(scaled - top[query])
    total = walk.per_list(exponentials)
    empty = (walk.packed.offsets[1:] == walk.packed.offsets[:-1]).repeat_interleave(config.candidates)
    log_normaliser = torch.where(empty, torch.full_like(top, -math.inf), top + torch.log(total))
    return exponentials / total[query], log_normaliser


def forward(config: UnitConfig, tensors: UnitTensors, *, return_weights: bool) -> UnitOutputs:
    walk = _Walk(config, tensors)
    return _outputs(walk, walk.scores(), return_weights)


def dice_forward(
    config: UnitConfig,
    tensors: UnitTensors,
    running: list[tuple[Tensor, Tensor]],
    eps: list[float],
    *,
    return_weights: bool,
) -> tuple[UnitOutputs, list[Moments]]:
    """Forward in training with Dice: statistics and outputs together, layer by layer over all rows, which are computed once
    where ``_fits``. ``tensors.means`` and ``tensors.rstds`` are filled on the way."""
    walk = _Walk(config, tensors)
    found: list[Moments] = []

    def note(moments: Moments) -> None:
        mean, rstd = moments.statistics(*running[len(found)], eps[len(found)])
        tensors.means.append(mean)
        tensors.rstds.append(rstd)
        found.append(moments)

    if not _fits(config, walk):
        for layer in range(len(config.hidden_units)):
            note(statistics(config, tensors, layer))
        return _outputs(walk, walk.scores(), return_weights), found
    steps = list(walk.steps())
    held = [step.z1 for step in steps]
    for layer, width in enumerate(config.hidden_units):
        chunks = (real_rows(z, step.keep) for z, step in zip(held, steps, strict=True))
        note(_moments(chunks, walk.query.new_zeros(width)))
        layers = HiddenLayers(config, tensors, walk.dtype)
        held = [layers.beyond(layer, z) for z in held]
    scores = walk.empty_scores()
    for step, s in zip(steps, held, strict=True):
        scores[step.pair] = s
    return _outputs(walk, scores[: scores.numel() - config.candidates], return_weights), found


def _outputs(walk: _Walk, a: Tensor, return_weights: bool) -> UnitOutputs:
    config, tensors, log_normaliser = walk.config, walk.tensors, None
    if config.softmax:
        a, log_normaliser = _normalise(config, walk, a)
        if log_normaliser.dtype != torch.float64:
            log_normaliser = log_normaliser.float()
    pooled = walk.pool(a).to(tensors.keys.dtype)
    weights = None
    if return_weights:
        weights = tensors.keys.new_zeros(tensors.keys.shape[0] * config.candidates)
        weights[walk.flat_index()] = a.to(weights.dtype)
    return UnitOutputs(pooled, weights, log_normaliser)


class _Backward:
    """Accumulators of the first layer's gradients."""

    def __init__(self, walk: _Walk, grad_pooled: Tensor) -> None:
        config, self.walk = walk.config, walk
        width, dim = config.hidden_units[0], config.embedding_dim
        queries = walk.query.shape[0]
        new = walk.query.new_zeros
        self.grad_pooled = grad_pooled
        # The spare row at the end takes what the padding of the pieces writes.
        rows = self.rows_total = walk.tensors.keys.shape[0]
        make = torch.empty if walk.packed.count == rows else torch.zeros
        keys = walk.tensors.keys
        self.keys_and_spare = make(rows + 1, dim, dtype=keys.dtype, device=keys.device)
        self.keys = self.keys_and_spare[:rows]
        self.offset = new(queries, width)
        outer = config.interaction == "outer"
        self.matrix = new(queries, width, dim) if outer else None
        self.shared, self.product = (None, None) if outer else (new(width, dim), new(width, dim))
        self.query = None if outer else new(queries, dim)

    def rows(self, chunk: RowChunk, keys: Tensor, query: Tensor, crossed: Tensor, dz: Tensor, a: Tensor) -> None:
        first = self.walk.first
        assert first.product is not None
        assert self.shared is not None
        assert self.product is not None
        assert self.query is not None
        self.shared.addmm_(dz.t(), keys)
        self.product.addmm_(dz.t(), crossed)
        through = dz @ first.product  # ∂L/∂(v ∘ e)
        index = torch.arange(keys.shape[0], device=keys.device)
        lists = slice(chunk.list_first, chunk.list_last)
        self.offset[lists] += F.embedding_bag(index, dz, chunk.local_offsets, mode="sum")
        self.query[lists] += F.embedding_bag(index, through * keys, chunk.local_offsets, mode="sum")
        grad = through.mul_(query).addmm_(dz, first.shared)
        grad.addcmul_(a.unsqueeze(1), self.grad_pooled.index_select(0, chunk.sample))
        rows = self.walk.packed.rows
        if rows is None:
            self.keys[chunk.first : chunk.last] = grad
        else:
            self.keys[rows[chunk.first : chunk.last]] = grad.to(self.keys.dtype)

    def pieces(self, group: PieceGroup, keys: Tensor, matrices: Tensor, dz: Tensor, a: Tensor) -> None:
        config = self.walk.config
        pieces, length = group.rows.shape
        candidates, width, dim = config.candidates, config.hidden_units[0], config.embedding_dim
        dz = dz.view(pieces, length, candidates * width)
        group.add_to_list(self.offset.view(-1, candidates * width), dz.sum(1))
        outer = (dz.transpose(1, 2) @ keys).view(pieces, candidates, width, dim)  # G of each piece and candidate
        if self.matrix is not None:
            group.add_to_list(self.matrix.view(-1, candidates, width, dim), outer)
        else:
            assert self.walk.first.product is not None
            assert self.shared is not None
            assert self.product is not None
            assert self.query is not None
            query = group.of_list(self.walk.query.view(-1, candidates, dim))
            self.shared += outer.sum((0, 1))
            self.product += torch.einsum("pchd,pcd->hd", outer, query)
            through = (outer * self.walk.first.product).sum(2)
            group.add_to_list(self.query.view(-1, candidates, dim), through)
        grad_pooled = group.of_list(self.grad_pooled.view(-1, candidates, dim))
        grad = torch.bmm(a.view(pieces, length, candidates), grad_pooled).baddbmm_(dz, matrices).to(self.keys.dtype)
        if group.first is not None:
            self.keys[group.first : group.first + pieces * length] = grad.view(-1, dim)
        else:
            self.keys_and_spare[group.writing_rows(self.rows_total)] = grad.view(-1, dim)


def backward(
    config: UnitConfig,
    tensors: UnitTensors,
    saved: UnitOutputs,
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inv_count: Tensor | None,
) -> UnitGradients:
    """Gradients of everything. ``saved.weights`` is needed with ``grad_weights``; ``inv_count`` [] is 1/count where Dice
    used batch statistics, 0 where it fell back to the running ones, None in evaluation."""
    walk = _Walk(config, tensors)
    layers = HiddenLayers(config, tensors, walk.dtype)
    hidden = HiddenGradients(layers, config, inv_count)
    grad_pooled = grad_pooled.to(walk.dtype)
    first = _Backward(walk, grad_pooled)

    grad_a = None if grad_weights is None else grad_weights.to(walk.dtype)[walk.flat_index()]
    spare = walk.query.new_zeros(config.candidates)  # what the padding of the pieces reads
    delta, log_normaliser = None, None
    if config.softmax:
        assert saved.log_normaliser is not None
        log_normaliser = saved.log_normaliser.to(walk.dtype)
        delta = (grad_pooled * saved.pooled.to(walk.dtype)).sum(1)
        if grad_a is not None:
            assert saved.weights is not None
            delta = delta + walk.per_list(saved.weights.to(walk.dtype)[walk.flat_index()] * grad_a)
    if grad_a is not None:
        grad_a = torch.cat([grad_a, spare])

    def grad_scores(step: _Step, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(a, ds) of a chunk from its scores."""
        g = grad_pooled.index_select(0, step.query)
        keys = step.keys.view(-1, 1, config.embedding_dim)
        da = (keys * g.view(keys.shape[0], config.candidates, -1)).sum(-1).view(-1)
        if grad_a is not None:
            da = da + grad_a[step.pair]
        a = scores
        if delta is not None:
            assert log_normaliser is not None
            a = torch.exp(scores * config.scale - log_normaliser.index_select(0, step.query))
            da = (da - delta.index_select(0, step.query)) * a * config.scale
        if step.keep is not None:
            a, da = a.masked_fill(~step.keep, 0), da.masked_fill(~step.keep, 0)
        return a, da

    def one_pass() -> None:
        for step in walk.steps(first):
            record = Recorded([], [], [])
            a, ds = grad_scores(step, layers.scores(step.z1, record))
            assert step.finish is not None
            step.finish(hidden.chunk(record, ds, step.keep), a)

    if inv_count is not None and _fits(config, walk):
        steps = list(walk.steps(first))
        records = [Recorded([], [], []) for _ in steps]
        pairs = [grad_scores(step, layers.scores(step.z1, record)) for step, record in zip(steps, records, strict=True)]
        grads = hidden.layer_by_layer(records, [ds for _, ds in pairs], [step.keep for step in steps])
        for step, (a, _), dz in zip(steps, pairs, grads, strict=True):
            assert step.finish is not None
            step.finish(dz, a)
    elif inv_count is not None:
        # The two sums of a layer must be known before its dz: a pass for each, from the top layer down.
        for layer in reversed(range(layers.depth)):
            for step in walk.steps():
                record = Recorded([], [], [])
                _, ds = grad_scores(step, layers.scores(step.z1, record))
                hidden.chunk(record, ds, step.keep, stop=layer, collect=False)
            if hidden.sums[layer] is None:
                zero = torch.zeros_like(layers.means[layer])
                hidden.sums[layer] = (zero, zero)
        one_pass()
    else:
        one_pass()

    gradients = FirstLayerGradients(first.offset, first.shared, first.product, first.query, first.matrix)
    grad_first, grad_bias, grad_query = first_layer_backward(config, tensors, gradients)
    alphas: list[Tensor | None] = []
    for grad, alpha in zip(hidden.alphas, tensors.alphas, strict=True):
        if grad is None or alpha is None:
            alphas.append(None)
        else:
            alphas.append((grad.sum().view(1) if alpha.numel() == 1 else grad).view_as(alpha).to(alpha.dtype))
    rest = zip(hidden.biases, tensors.biases[1:], strict=True)
    return UnitGradients(
        query=grad_query,
        keys=first.keys,
        weights=[grad_first] + [g.to(w.dtype) for g, w in zip(hidden.weights, tensors.weights[1:], strict=True)],
        biases=[grad_bias] + [None if g is None or b is None else g.to(b.dtype) for g, b in rest],
        alphas=alphas,
    )
