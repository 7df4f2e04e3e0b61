"""The scoring network that all public DINs share, in two fused forms.

Every library scores [query, key, query − key, query ∘ key] with Linear → (BatchNorm) → activation → (Dropout) layers and a
final Linear to 1. ``Network`` is that network read from a library's modules; it runs

* **whole** through ``functional.local_activation`` where the unit has all it holds: one kind of activation, Dice without affine
  parameters, BatchNorm in evaluation (folded into its Linear), no active dropout;
* otherwise with the **first layer factorised** (``z = c_b + A_b e``: no concatenation, a quarter of its arithmetic) and the
  library's own modules after it, which is exact whatever they are.

``Network.scores`` returns scores [B, T]; masks, fills, softmax and their treatment of empty histories are each library's
own and cost next to nothing, so the adapters restate them to the letter.

Which form serves is decided at every call, from the parts' own ``training`` flags: a frozen BatchNorm or a dropout kept
active in evaluation means what it means in the library. Where a part is not what it seems (``readable``), the adapters call
the library's own ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dice.api import dice
from ..ops.local_activation.api import local_activation
from ..ops.local_activation.function import RunningStatistics

_KINDS: dict[type[nn.Module], str] = {nn.Sigmoid: "sigmoid", nn.ReLU: "relu", nn.PReLU: "prelu"}


def readable(module: nn.Module) -> bool:
    """Whether the parts of ``module`` may be read instead of called: none carries hooks, which would not run. (The old
    ``weight_norm``, ``spectral_norm`` and pruning compute their weight in one.)"""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
        if part is not module
    )


def is_linear(module: nn.Module) -> bool:
    """An ``nn.Linear``, parametrized ones included; not a subclass that computes something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@dataclass
class Hidden:
    """One hidden layer as found: its parts in the order they run."""

    linear: nn.Linear
    norm: nn.BatchNorm1d | None = None
    activation: nn.Module | None = None
    dropouts: list[nn.Dropout] = field(default_factory=list)


@dataclass
class Network:
    """hidden: the layers; output: the Linear to 1; after_first: the library's own modules from the first pre-activation
    [B, T, H1] to scores [B, T]; dice: the library's Dice class, if it is the paper's (``alpha``, ``bn``)."""

    hidden: list[Hidden]
    output: nn.Linear
    after_first: Callable[[Tensor], Tensor]
    dice: type[nn.Module] | None = None
    odd: list[str] = field(default_factory=list)  # modules that no layer above describes

    def why_not_whole(self, training: bool | None = None) -> str | None:
        """What keeps the network from running whole; None when nothing does. ``training``: as if all parts were in this
        mode; by default each part's own counts."""
        if self.odd:
            return f"{', '.join(self.odd)} in the scoring network"
        kinds = {self._kind(layer.activation) for layer in self.hidden}
        if None in kinds or len(kinds) > 1:
            names = sorted({type(layer.activation).__name__ for layer in self.hidden})
            return f"activation {', '.join(names)}"
        if any(layer.norm is not None and _uses_batch(layer.norm, training) for layer in self.hidden):
            return "BatchNorm on the batch's statistics"
        if any(d.p > 0 and (d.training if training is None else training) for h in self.hidden for d in h.dropouts):
            return "dropout"
        return self._why_not_dice(training) if kinds == {"dice"} else None

    def _why_not_dice(self, training: bool | None) -> str | None:
        norms = self._dice_norms()
        if any(type(norm) is not nn.BatchNorm1d for norm in norms):
            return f"{type(norms[0]).__name__} inside Dice"
        if any(norm.affine for norm in norms):
            return "an affine BatchNorm inside Dice"
        if any(norm.running_mean is None or not norm.track_running_stats for norm in norms):
            return "Dice without running statistics"
        if len({_uses_batch(norm, training) for norm in norms}) > 1:
            return "Dice partly in evaluation"
        return None

    def _dice_norms(self) -> list[nn.BatchNorm1d]:
        activations: list[Any] = [layer.activation for layer in self.hidden]
        return [activation.bn for activation in activations if self._kind(activation) == "dice"]

    def _kind(self, activation: nn.Module | None) -> str | None:
        if self.dice is not None and type(activation) in (self.dice, *self.dice.__subclasses__()):
            return "dice"
        return _KINDS.get(type(activation)) if activation is not None else None

    @property
    def _counts_padding(self) -> bool:
        """Dice on the batch's statistics, which in every library run over the padding too."""
        return any(_uses_batch(norm) for norm in self._dice_norms())

    def whole(
        self, query: Tensor, keys: Tensor, *, backend: str | None, return_weights: bool, mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``local_activation`` without softmax: pooled [B, D], and scores [B, T] (0 where ``mask`` is False)."""
        folded = [_fold(layer.linear, layer.norm) for layer in self.hidden]
        parameters = [*folded, (self.output.weight, self.output.bias)]
        kind = self._kind(self.hidden[0].activation)
        assert kind is not None
        activations: list = [layer.activation for layer in self.hidden]
        alphas, running = None, None
        if kind == "dice":
            if self._counts_padding and keys.shape[0] * keys.shape[1] == 1:
                shape = (1, self.hidden[0].linear.out_features)
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
            alphas = [activation.alpha for activation in activations]
            running = [_running(activation.bn) for activation in activations]
        elif kind == "prelu":
            alphas = [activation.weight for activation in activations]
        return local_activation(
            query,
            keys,
            [weight for weight, _ in parameters],
            [bias for _, bias in parameters],
            mask=mask,
            interaction="product",
            activation=kind,
            alphas=alphas,
            running=running,
            training=self._counts_padding,
            return_weights=return_weights,
            backend=backend,
        )

    def scores(self, query: Tensor, keys: Tensor, *, backend: str | None, mask: Tensor | None = None) -> Tensor:
        """Scores [B, T] of keys [B, T, D] for query [B, D]. Where ``mask`` [B, T] is False they may be anything finite: rows
        are skipped where that changes nothing, and computed where Dice's batch statistics include them, as the libraries'
        do."""
        if self.why_not_whole() is not None:
            return self.after_first(first_layer(self.hidden[0].linear, query, keys))
        if self._counts_padding:
            mask = None
        result = self.whole(query, keys, backend=backend, return_weights=True, mask=mask)
        return result[1]

    def pooled(self, query: Tensor, keys: Tensor, *, backend: str | None, mask: Tensor | None = None) -> Tensor:
        """Σ_j mask_j s_j e_j [B, D], the libraries' form without softmax."""
        if self.why_not_whole() is None and not (self._counts_padding and mask is not None):
            result = self.whole(query, keys, backend=backend, return_weights=False, mask=mask)
            assert isinstance(result, Tensor)
            return result
        scores = self.scores(query, keys, backend=backend, mask=mask)
        if mask is not None:
            scores = torch.where(mask, scores, torch.zeros_like(scores))
        return torch.matmul(scores.unsqueeze(1), keys).squeeze(1)

    def describe(self) -> str:
        """For the report: what runs in each mode."""
        reasons = {mode: self.why_not_whole(mode) for mode in (True, False)}
        if reasons[True] is None and reasons[False] is None:
            return "whole unit"
        if reasons[True] == reasons[False]:
            return f"first layer factorised ({reasons[True]})"
        train = "whole unit" if reasons[True] is None else f"first layer factorised ({reasons[True]})"
        evaluate = "whole unit" if reasons[False] is None else f"first layer factorised ({reasons[False]})"
        return f"training: {train}; evaluation: {evaluate}"


def read_layers(modules: Iterable[nn.Module], dice: type[nn.Module] | None) -> tuple[list[Hidden], list[str]]:
    """Hidden layers of a flat run of modules, and the names of modules that fit nowhere."""
    hidden: list[Hidden] = []
    odd: list[str] = []
    for module in modules:
        if is_linear(module):
            hidden.append(Hidden(cast(nn.Linear, module)))
        elif type(module) is nn.Dropout and hidden:
            hidden[-1].dropouts.append(module)
        elif type(module) is nn.Dropout and module.p == 0:
            continue
        elif not hidden or hidden[-1].activation is not None:
            odd.append(type(module).__name__)
        elif type(module) is nn.BatchNorm1d and hidden[-1].norm is None:
            hidden[-1].norm = module
        else:
            hidden[-1].activation = module
    return hidden, odd


def first_layer(linear: nn.Linear, query: Tensor, keys: Tensor) -> Tensor:
    """The first pre-activation [B, T, H] without its input [query, key, query − key, query ∘ key] ever existing."""
    of_query, of_key, of_difference, of_product = linear.weight.split(keys.shape[-1], dim=1)
    matrix = torch.addcmul((of_key - of_difference).unsqueeze(0), query.unsqueeze(1), of_product)  # A_b [B, H, D]
    offset = F.linear(query, of_query + of_difference, linear.bias)
    return torch.baddbmm(offset.unsqueeze(1), keys, matrix.transpose(1, 2))


def weighted_sum(weights: Tensor, keys: Tensor) -> Tensor:
    """Σ_t w_t e_t [B, D] of weights [B, T] and keys [B, T, D] in the dtype that multiplying them has, as libraries that write
    it with elementwise products do; autocast, which leaves those alone, is off."""
    dtype = torch.promote_types(weights.dtype, keys.dtype)
    with torch.autocast(keys.device.type, enabled=False):
        return torch.matmul(weights.to(dtype).unsqueeze(1), keys.to(dtype)).squeeze(1)


def fill_padding(scores: Tensor, real: Tensor, fill: int) -> Tensor:
    """``fill`` where ``real`` is False; a product, as in the libraries, so that fp16 gets −inf and not an error."""
    return torch.where(real, scores, torch.ones_like(scores) * fill)


def dice_is_readable(module: Any) -> bool:
    """Whether ``dice_like`` is what the library's Dice does: its BatchNorm is an ordinary one, without hooks."""
    return type(module.bn) is nn.BatchNorm1d and readable(module)


def dice_like(module: Any, x: Tensor, backend: str | None) -> Tensor:
    """``functional.dice`` with the parameters of a Dice built around a BatchNorm (``alpha``, ``bn``); x [..., C]."""
    norm: nn.BatchNorm1d = module.bn
    kept = norm.track_running_stats or not norm.training
    return dice(
        x,
        module.alpha,
        norm.running_mean if kept else None,
        norm.running_var if kept else None,
        weight=norm.weight,
        bias=norm.bias,
        num_batches_tracked=norm.num_batches_tracked if kept else None,
        training=_uses_batch(norm),
        momentum=norm.momentum,
        eps=norm.eps,
        backend=backend,
    )


def clamp_lengths(lengths: Tensor, padded_length: int) -> Tensor:
    """Mask [B, T] of lengths given in any dtype and shape ([B] or [B, 1]); lengths beyond T mean T, as in the libraries."""
    position = torch.arange(padded_length, device=lengths.device, dtype=lengths.dtype)
    return position < lengths.reshape(-1, 1)


def _uses_batch(norm: nn.BatchNorm1d, training: bool | None = None) -> bool:
    """Whether a BatchNorm normalises with the statistics of the batch."""
    return (norm.training if training is None else training) or norm.running_mean is None


def _running(norm: nn.BatchNorm1d) -> RunningStatistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return RunningStatistics(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum, norm.eps)


def _fold(linear: nn.Linear, norm: nn.BatchNorm1d | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the Linear, with the BatchNorm after it folded in (running statistics)."""
    if norm is None:
        return linear.weight, linear.bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    bias = shift if linear.bias is None else linear.bias * scale + shift
    return linear.weight * scale.unsqueeze(1), bias
