"""``Dice`` as a drop-in module, ``LinearDice`` for a linear layer and its Dice, and statistics over many processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _backend
from ..ops.dice.api import choose_backend, dice

_Module = TypeVar("_Module", bound=nn.Module)


class Dice(nn.Module):
    """Data-adaptive activation (paper eq. 8-9): ``y = p·x + (1 − p)·α·x``, ``p = σ((x − E[x]) / √(Var[x] + ε))``.

    Args:
        num_features: C, the last dimension of the input.
        eps: ε, the paper's 1e-8.
        momentum: of the running statistics, as in ``nn.BatchNorm1d``; None averages over all batches.
        affine: a trainable ``weight`` and ``bias`` on the normalised input inside the sigmoid.
        backend: None (automatic), "triton" or "torch".
        process_group: take statistics over all processes of this group (see ``convert_sync_dice``).

    ``alpha`` [C] starts at 0. Assign a parameter of shape [C, 1] or [1] to share or reshape the slope, or
    ``requires_grad_(False)`` to fix it. ``state_dict``: ``alpha``, ``running_mean``, ``running_var``,
    ``num_batches_tracked``, and ``weight``, ``bias`` with ``affine``, as in ``reference.Dice``.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-8,
        momentum: float | None = 0.1,
        affine: bool = False,
        backend: str | None = None,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        _backend.check_name(backend)
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.backend, self.process_group = backend, process_group
        self.alpha = nn.Parameter(torch.zeros(num_features))
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features))
            self.bias = nn.Parameter(torch.zeros(num_features))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, shift: Tensor | None = None, overwrite: bool = False
    ) -> Tensor:
        """x [..., C] -> the same; ``mask`` [...] bool selects the rows that count in the statistics of training;
        ``shift`` [C] is added to x first; ``overwrite``: x is not needed afterwards (see ``functional.dice``)."""
        # Looked up as nn.Module would do it, which takes as long as a small operation, unless they are somewhere else by now.
        buffers, training = self._buffers, self.training
        alpha, mean, var = self._parameters.get("alpha"), buffers.get("running_mean"), buffers.get("running_var")
        tracked = buffers.get("num_batches_tracked") if training else None
        return dice(
            x,
            self.alpha if alpha is None else alpha,
            self.running_mean if mean is None else mean,
            self.running_var if var is None else var,
            weight=self.weight if self.affine else None,
            bias=self.bias if self.affine else None,
            shift=shift,
            mask=mask,
            num_batches_tracked=self.num_batches_tracked if training and tracked is None else tracked,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            process_group=self.process_group,
            overwrite=overwrite,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, backend={self.backend!r}"


def from_batch_norm_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The ``state_dict`` of a ``Dice`` from that of a Dice built around an ``nn.BatchNorm1d``, as most packages have it.

    ``alpha`` of shape [C], [C, 1] or [1] stays (as [C]: a shared slope is repeated); ``bn.running_mean``, ``bn.running_var``,
    ``bn.num_batches_tracked`` and, where the BatchNorm is affine, ``bn.weight`` and ``bn.bias`` lose their ``bn.``. Build the
    ``Dice`` with the BatchNorm's ``eps``, ``momentum`` and ``affine``: they are not in a ``state_dict``, and packages differ
    (DeepCTR-Torch: 1e-8, 0.1, affine; FuxiCTR: 1e-9, 0.01, not affine; TorchEasyRec: 1e-5, 0.1, not affine).

    prefix  where in ``state`` the module is, with its dot: ``"mlp.activation_layers.0."``
    """
    if f"{prefix}alpha" not in state:
        raise KeyError(f"no 'alpha' at {prefix!r}")
    mean = state[f"{prefix}bn.running_mean"]
    found = {"alpha": state[f"{prefix}alpha"].reshape(-1).expand_as(mean).clone()}
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        if f"{prefix}bn.{name}" in state:
            found[name] = state[f"{prefix}bn.{name}"]
    return found


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def linear_dice(x: Tensor, linear: nn.Linear, activation: Dice, mask: Tensor | None = None) -> Tensor:
    """``activation(linear(x), mask)`` for modules that stay where they are: x [..., in_features] -> [..., out_features].

    Triton: the GEMM leaves the bias out, and Dice adds it to what it reads anyway; in backward the bias's gradient is a
    fourth number next to the three sums that Dice needs, where autograd would read the whole gradient once more. The torch
    backend gets the bias from its GEMM, for nothing; so do statistics over many processes. Without gradients Dice is one pass,
    in the memory of the GEMM's output. Where a hook (or FSDP, by hooks) looks at what lies between, the two run one by one.
    """
    if _has_hooks(linear) or _has_hooks(activation):
        return activation(linear(x), mask)
    fold = type(linear) is nn.Linear and linear.bias is not None and activation.process_group is None
    if fold and choose_backend(activation.backend, x, linear.out_features) == "triton":
        return activation(F.linear(x, linear.weight), mask, shift=linear.bias, overwrite=True)
    return activation(linear(x), mask, overwrite=True)


class LinearDice(nn.Module):
    """A linear layer and the Dice after it, in place of the pair ``nn.Linear(...)``, ``Dice(...)`` of an MLP.

    Args:
        in_features, out_features, bias: of the linear layer.
        eps, momentum, affine, backend: of the Dice.

    Bias and statistics are one pass after the GEMM, and Dice without gradients takes no memory of its own: see
    ``linear_dice``, which does the same for two modules that are kept apart. ``state_dict``: ``linear.weight``,
    ``linear.bias``, and ``dice.*`` as in ``Dice``; that of an ``nn.Sequential(linear, dice)`` fits after
    renaming ``0.`` to ``linear.`` and ``1.`` to ``dice.``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-8,
        momentum: float | None = 0.1,
        affine: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.dice = Dice(out_features, eps, momentum, affine, backend)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]; ``mask`` [...] as for ``Dice``."""
        return linear_dice(x, self.linear, self.dice, mask)


def convert_sync_dice(module: _Module, process_group: Any = None) -> _Module:
    """Make every ``Dice`` inside ``module`` take its statistics over all processes of ``process_group``, in place.

    As ``nn.SyncBatchNorm.convert_sync_batchnorm``; ``process_group=None`` means the default group, which must have been
    initialised. Every process of the group must then run the module equally often in training, with any number of rows, none
    included; processes exchange 3·C numbers forward and as many backward. Parameters and buffers stay what they are; gradients
    of parameters are those of a process's own rows, which ``DistributedDataParallel`` averages. Dice inside a
    ``LocalActivationUnit`` is left alone (and a warning logged). Returns ``module``.
    """
    from .local_activation import LocalActivationUnit  # it imports this module

    if process_group is None:
        process_group = torch.distributed.group.WORLD
        if process_group is None:
            raise ValueError("convert_sync_dice needs a process group: call torch.distributed.init_process_group first")
    inside_units = {id(a) for m in module.modules() if isinstance(m, LocalActivationUnit) for a in m.activations}
    for child in module.modules():
        if isinstance(child, Dice) and id(child) in inside_units:
            _backend.log_once(
                "convert_sync_dice: Dice inside a LocalActivationUnit keeps the statistics of its own process"
            )
        elif isinstance(child, Dice):
            child.process_group = process_group
    return module
