"""The torch backend: the factorised local activation unit in vectorised PyTorch, with its gradients written out.

Serves every device and dtype, float64 included, and is the plain statement that the kernels are translations of::

    s_j  = scores(c_q + A_q e_j)          δ_q = g_q · u_q (+ Σ_j a_j · ∂L/∂a_j)
    a_j  = s_j | softmax(scale · s)_j     ds_j = da_j | scale · a_j (da_j − δ_q),   da_j = g_q · e_j (+ ∂L/∂a_j)
    u_q  = Σ_j a_j e_j                    de_j = a_j g_q + A_qᵀ dz1_j               G_q = Σ_j dz1_j e_jᵀ, γ_q = Σ_j dz1_j

Nothing of size rows × features outlives a chunk of a few thousand rows, except where Dice takes the
batch's statistics, and there only up to ``HELD_BYTES``: memory is the inputs, their gradients and a few numbers per row.
Low-precision inputs are widened chunk by chunk and computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from .dice_statistics import Moments, Used, used
from .factorise import first_layer_backward
from .problem import UnitConfig, UnitGradients, UnitOutputs, UnitTensors
from .torch_hidden import DiceDescent, HiddenGradients, HiddenLayers, Recorded
from .torch_walk import FirstSums, PieceStep, RowStep, Walk

# Dice in training needs each layer's statistics over all rows before the next layer, so chunks cannot be finished one by
# one. Up to this size the pre-activations of all rows are held meanwhile; beyond it every pass recomputes them.
HELD_BYTES = 64 << 20


def _fits(config: UnitConfig, walk: Walk) -> bool:
    """Whether a handful of values per hidden unit and pair may be held for all pairs at once."""
    numbers = walk.packed.count * config.candidates * sum(config.hidden_units) * 4
    return numbers * walk.query.element_size() <= HELD_BYTES


def _moments(chunks: Iterable[Tensor], like: Tensor) -> Moments:
    """Moments over the rows of all chunks, merged by Chan's formula: E[z²] − E[z]² would go negative against ε = 1e-8."""
    mean, m2, count = like, torch.zeros_like(like), 0
    for z in chunks:
        rows = z.shape[0]
        average = z.mean(0)
        spread = (z - average).square_().sum(0)  # fifteen times as fast as torch.var_mean over the first dimension
        if count == 0:
            mean, m2, count = average, spread, rows
            continue
        delta = average - mean
        total = count + rows
        mean = mean + delta * (rows / total)
        m2 = m2 + spread + delta.square() * (count * rows / total)
        count = total
    return Moments(torch.tensor(float(count), dtype=torch.float64, device=mean.device), mean, m2)


def _real_rows(z: Tensor, keep: Tensor | None) -> Tensor:
    return z if keep is None else z[keep]


def statistics(config: UnitConfig, tensors: UnitTensors, layer: int) -> Moments:
    """Moments of hidden layer ``layer``'s pre-activation over all (behaviour, candidate) pairs. Layers below use
    ``tensors.means`` and ``tensors.rstds``."""
    walk = Walk(config, tensors)
    layers = HiddenLayers(config, tensors, walk.dtype)
    chunks = (_real_rows(layers.up_to(layer, step.z1()), step.keep) for step in walk.steps())
    return _moments(chunks, walk.query.new_zeros(config.hidden_units[layer]))


class _Scores:
    """s of every pair [N·C], filled in step by step."""

    def __init__(self, walk: Walk) -> None:
        self.pairs = walk.packed.count * walk.config.candidates
        # One spare entry per candidate at the end takes what the padding of the pieces writes.
        self.all = torch.empty(self.pairs + walk.config.candidates, dtype=walk.dtype, device=walk.query.device)

    def result(self) -> Tensor:
        return self.all[: self.pairs]


def _scores(walk: Walk) -> Tensor:
    layers, scores = HiddenLayers(walk.config, walk.tensors, walk.dtype), _Scores(walk)
    for step in walk.steps():
        scores.all[step.pair] = layers.scores(step.z1())
    return scores.result()


def _normalise(config: UnitConfig, walk: Walk, scores: Tensor) -> tuple[Tensor, Tensor]:
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
    walk = Walk(config, tensors)
    return _outputs(walk, _scores(walk), return_weights)


def dice_forward(
    config: UnitConfig,
    tensors: UnitTensors,
    running: list[tuple[Tensor, Tensor]],
    eps: list[float],
    *,
    return_weights: bool,
) -> tuple[UnitOutputs, list[Used]]:
    """Forward in training with Dice: statistics and outputs together, layer by layer over all rows, which are computed once
    where ``_fits``. ``tensors.means`` and ``tensors.rstds`` are filled on the way."""
    walk = Walk(config, tensors)
    found: list[Used] = []

    def note(moments: Moments) -> None:
        found.append(used(moments, *running[len(found)], eps[len(found)]))
        tensors.means.append(found[-1].used_mean)
        tensors.rstds.append(found[-1].rstd)

    if not _fits(config, walk):
        for layer in range(len(config.hidden_units)):
            note(statistics(config, tensors, layer))
        return _outputs(walk, _scores(walk), return_weights), found
    held: list[Tensor] = []
    places: list[tuple[slice | Tensor, Tensor | None]] = []
    for step in walk.steps():
        held.append(step.z1())
        places.append((step.pair, step.keep))
    for layer, width in enumerate(config.hidden_units):
        chunks = (_real_rows(z, keep) for z, (_, keep) in zip(held, places, strict=True))
        note(_moments(chunks, walk.query.new_zeros(width)))
        layers = HiddenLayers(config, tensors, walk.dtype)
        for index, z in enumerate(held):
            held[index] = layers.beyond(layer, z)
    scores = _Scores(walk)
    for (pair, _), s in zip(places, held, strict=True):
        scores.all[pair] = s
    return _outputs(walk, scores.result(), return_weights), found


def _outputs(walk: Walk, a: Tensor, return_weights: bool) -> UnitOutputs:
    config, tensors, log_normaliser = walk.config, walk.tensors, None
    if config.softmax:
        a, log_normaliser = _normalise(config, walk, a)
    pooled = walk.pool(a).to(tensors.keys.dtype)
    weights = None
    if return_weights:
        weights = tensors.keys.new_zeros(tensors.keys.shape[0] * config.candidates)
        weights[walk.flat_index()] = a.to(weights.dtype)
    return UnitOutputs(pooled, weights, log_normaliser)


class _ScoreGradients:
    """(a, ds) of a step from its scores: the backward pass of pooling and softmax."""

    def __init__(self, walk: Walk, saved: UnitOutputs, grad_pooled: Tensor, grad_weights: Tensor | None) -> None:
        config = walk.config
        self.grad_pooled, self.scale = grad_pooled, config.scale
        grad_a = None if grad_weights is None else grad_weights.to(walk.dtype)[walk.flat_index()]
        self.delta: Tensor | None = None
        self.log_normaliser: Tensor | None = None
        if config.softmax:
            assert saved.log_normaliser is not None
            self.log_normaliser = saved.log_normaliser.to(walk.dtype)
            self.delta = (grad_pooled * saved.pooled.to(walk.dtype)).sum(1)
            if grad_a is not None:
                assert saved.weights is not None
                self.delta += walk.per_list(saved.weights.to(walk.dtype)[walk.flat_index()] * grad_a)
        # Spare entries at the end for what the padding of the pieces reads.
        self.grad_a = None if grad_a is None else torch.cat([grad_a, grad_a.new_zeros(config.candidates)])

    def __call__(self, step: RowStep | PieceStep, scores: Tensor) -> tuple[Tensor, Tensor]:
        da = step.dots(self.grad_pooled)
        if self.grad_a is not None:
            da += self.grad_a[step.pair]
        a = scores
        if self.delta is not None:
            assert self.log_normaliser is not None
            a = torch.exp(scores * self.scale - step.of_query(self.log_normaliser))
            da = da.sub_(step.of_query(self.delta)).mul_(a).mul_(self.scale)
        if step.keep is not None:
            padding = ~step.keep
            a, da = a.masked_fill(padding, 0), da.masked_fill_(padding, 0)
        return a, da


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
    walk = Walk(config, tensors)
    layers = HiddenLayers(config, tensors, walk.dtype)
    hidden = HiddenGradients(layers, config, inv_count)
    grad_pooled = grad_pooled.to(walk.dtype).contiguous()
    sums = FirstSums(walk, grad_pooled)
    score_gradients = _ScoreGradients(walk, saved, grad_pooled, grad_weights)

    def recompute(step: RowStep | PieceStep) -> tuple[Recorded, Tensor, Tensor]:
        """(what the hidden layers computed, a, ds) of a step."""
        record = Recorded([], [], [])
        a, ds = score_gradients(step, layers.scores(step.z1(), record))
        return record, a, ds

    if inv_count is not None and _fits(config, walk):
        descent = DiceDescent(hidden)
        all_a = [descent.enter(step.z1(), step.keep, partial(score_gradients, step)) for step in walk.steps()]
        for step, a, dz in zip(walk.steps(), all_a, descent.down(), strict=True):
            step.finish(sums, dz, a)
    else:
        if inv_count is not None:
            # The two sums of a layer must be known before its dz: a pass for each, from the top layer down.
            for layer in reversed(range(layers.depth)):
                for step in walk.steps():
                    record, _, ds = recompute(step)
                    hidden.chunk(record, ds, step.keep, stop=layer, collect=False)
        for step in walk.steps():
            record, a, ds = recompute(step)
            step.finish(sums, hidden.chunk(record, ds, step.keep), a)

    grad_first, grad_bias, grad_query = first_layer_backward(config, tensors, sums.gradients())
    alphas: list[Tensor | None] = []
    for grad, alpha in zip(hidden.alphas, tensors.alphas, strict=True):
        if grad is None or alpha is None:
            alphas.append(None)
        else:
            alphas.append((grad.sum().view(1) if alpha.numel() == 1 else grad).view_as(alpha).to(alpha.dtype))
    rest = zip(hidden.biases, tensors.biases[1:], strict=True)
    return UnitGradients(
        query=grad_query,
        keys=sums.keys,
        weights=[grad_first] + [g.to(w.dtype) for g, w in zip(hidden.weights, tensors.weights[1:], strict=True)],
        biases=[grad_bias] + [None if g is None or b is None else g.to(b.dtype) for g, b in rest],
        alphas=alphas,
    )
