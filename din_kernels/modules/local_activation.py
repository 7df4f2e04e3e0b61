"""``LocalActivationUnit``: the fused unit as a drop-in module."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from .. import _backend
from ..ops.local_activation.api import first_layer_width, local_activation
from ..ops.local_activation.function import RunningStatistics
from ..ops.local_activation.problem import ACTIVATIONS, INTERACTIONS
from .dice import Dice


def make_activation(kind: str, width: int, backend: str | None = None) -> nn.Module:
    """The module behind an activation's name: Dice(width), PReLU(), Sigmoid() or ReLU()."""
    if kind == "dice":
        return Dice(width, backend=backend)
    if kind == "prelu":
        return nn.PReLU()
    if kind == "sigmoid":
        return nn.Sigmoid()
    if kind == "relu":
        return nn.ReLU()
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")


class LocalActivationUnit(nn.Module):
    """Local activation unit and weighted sum pooling of Deep Interest Networks (paper eq. 3, figure 2), fused.

    ``u = Σ_j a(e_j, v) e_j`` with ``a`` a small network over the interaction of behaviour e_j and candidate v. Neither the
    concatenated features nor the outer product, nor any hidden layer of all behaviours, is ever written to memory.

    Args:
        embedding_dim: D, width of query and keys.
        hidden_units: widths of the hidden layers.
        activation: "dice", "prelu", "sigmoid" or "relu". PReLU has one shared slope, as ``nn.PReLU()``; for a slope per
            channel replace ``activations[i]`` by ``nn.PReLU(width)``.
        interaction: "outer", the paper's true outer product: first-layer columns [key (D), vec(key ⊗ query) (D·D, key
            index slow), query (D)]; or "product", the public code's [query, key, query − key, query ∘ key].
        softmax: normalise the weights over each list (the paper does not); ``scale`` multiplies the scores first.
        bias: biases in the linear layers.
        backend: None (automatic), "triton" or "torch".

    Dice statistics run over the real behaviours of the batch only. ``state_dict`` keys are those of
    ``reference.LocalActivationUnit``: ``linears.{i}.weight``, ``linears.{i}.bias``, ``activations.{i}.alpha`` and so on.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_units: Sequence[int] = (36,),
        activation: str = "dice",
        interaction: str = "outer",
        softmax: bool = False,
        scale: float | None = None,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if interaction not in INTERACTIONS:
            raise ValueError(f"interaction must be one of {', '.join(INTERACTIONS)}, got {interaction!r}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        hidden_units = tuple(int(width) for width in hidden_units)
        if not hidden_units or min(hidden_units) < 1:
            raise ValueError(f"hidden_units must name at least one layer of width 1 or more, got {hidden_units}")
        _backend.check_name(backend)
        self.embedding_dim, self.hidden_units = embedding_dim, hidden_units
        self.activation, self.interaction = activation, interaction
        self.softmax, self.scale, self.backend = softmax, scale, backend
        widths = [first_layer_width(embedding_dim, interaction), *hidden_units, 1]
        self.linears = nn.ModuleList([nn.Linear(i, o, bias=bias) for i, o in itertools.pairwise(widths)])
        self.activations = nn.ModuleList([make_activation(activation, width, backend) for width in hidden_units])

    def _activation_arguments(self) -> tuple[list[Tensor] | None, list[RunningStatistics] | None]:
        expected = {"dice": Dice, "prelu": nn.PReLU, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}[self.activation]
        for i, module in enumerate(self.activations):
            if not isinstance(module, expected):
                raise TypeError(
                    f"activations[{i}] is {type(module).__name__}, but this unit was built with activation="
                    f"{self.activation!r} ({expected.__name__}): build the unit with the activation you want"
                )
        if self.activation == "prelu":
            return [cast(nn.PReLU, module).weight for module in self.activations], None
        if self.activation != "dice":
            return None, None
        units = [cast(Dice, module) for module in self.activations]
        for i, dice in enumerate(units):
            if dice.affine:
                raise ValueError(
                    f"activations[{i}] is an affine Dice: inside the unit Dice must be built with affine=False"
                )
        running = [
            RunningStatistics(m.running_mean, m.running_var, m.num_batches_tracked, m.momentum, m.eps) for m in units
        ]
        return [m.alpha for m in units], running

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool ``keys`` for ``query``; see ``din_kernels.functional.local_activation`` for layouts and errors."""
        alphas, running = self._activation_arguments()
        linears = [cast(nn.Linear, module) for module in self.linears]
        return local_activation(
            query,
            keys,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            lengths=lengths,
            offsets=offsets,
            mask=mask,
            interaction=self.interaction,
            activation=self.activation,
            alphas=alphas,
            running=running,
            training=self.training,
            softmax=self.softmax,
            scale=self.scale,
            return_weights=return_weights,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.embedding_dim}, hidden_units={self.hidden_units}, activation={self.activation!r}, "
            f"interaction={self.interaction!r}, softmax={self.softmax}, scale={self.scale}, backend={self.backend!r}"
        )
