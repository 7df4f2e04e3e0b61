"""Dice by its definition in float64, and random calls of the package to compare with it."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from din_kernels.functional import dice
from din_kernels.testing import assert_close


def by_definition(
    x: Tensor, alpha: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    training: bool, eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:  # fmt: skip
    """(y, batch mean, unbiased batch variance, rows that count) in float64, row by row from the paper's eq. 8-9; for
    autograd to differentiate. Shares no code with the package or with ``reference``."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    chosen = [i for i in range(rows.shape[0]) if mask is None or bool(mask.reshape(-1)[i])]
    batch_mean = batch_var = None
    if training and len(chosen) > 1:
        counted = torch.stack([rows[i] for i in chosen])
        mean = counted.sum(0) / len(chosen)
        squares = ((counted - mean) ** 2).sum(0)
        var = squares / len(chosen)
        batch_mean, batch_var = mean, squares / (len(chosen) - 1)
    z = (rows - mean) / torch.sqrt(var + eps)
    if weight is not None and bias is not None:
        z = z * weight + bias
    p = 1 / (1 + torch.exp(-z))
    a = alpha.reshape(-1)
    y = torch.where(torch.zeros_like(p, dtype=torch.bool), p, p * rows + (1 - p) * a * rows)
    return y.reshape(x.shape), batch_mean, batch_var, len(chosen)


@dataclasses.dataclass
class Case:
    """One call: tensors as handed over, and the options of ``functional.dice``."""

    x: Tensor
    alpha: Tensor
    running_mean: Tensor
    running_var: Tensor
    tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    grad: Tensor
    training: bool
    momentum: float | None
    eps: float

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "alpha": self.alpha, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def run(self, backend: str | None) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the gradients by name; running statistics are updated."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.leaves().items()}
        y = dice(
            leaves["x"], leaves["alpha"], self.running_mean, self.running_var, weight=leaves.get("weight"),
            bias=leaves.get("bias"), mask=self.mask, num_batches_tracked=self.tracked, training=self.training,
            momentum=self.momentum, eps=self.eps, backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return y.detach(), dict(zip(leaves, grads, strict=True))

    def expected(self) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor, int]:
        """(y, gradients, running mean, running variance, num_batches_tracked) in float64."""

        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().cpu().double()

        leaves = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in self.leaves().items()}
        mean, var = self.running_mean.cpu().double(), self.running_var.cpu().double()
        mask = None if self.mask is None else self.mask.cpu()
        y, batch_mean, batch_var, _ = by_definition(
            leaves["x"],
            leaves["alpha"],
            mean,
            var,
            leaves.get("weight"),
            leaves.get("bias"),
            mask,
            self.training,
            self.eps,
        )
        grad = wide(self.grad)
        grads = torch.autograd.grad(y, list(leaves.values()), grad)
        tracked = int(self.tracked)
        if batch_mean is not None and batch_var is not None:
            tracked += 1
            step = 1 / tracked if self.momentum is None else self.momentum
            mean, var = (1 - step) * mean + step * batch_mean.detach(), (1 - step) * var + step * batch_var.detach()
        return y.detach(), dict(zip(leaves, grads, strict=True)), mean, var, tracked

    def check(self, backend: str | None) -> None:
        """Compare every result with the definition."""
        y_want, grads_want, mean, var, tracked = self.expected()
        y, grads = self.run(backend)
        dtype, rows = self.x.dtype, self.x.numel() // max(1, self.x.shape[-1])
        assert y.dtype == dtype
        assert y.is_contiguous() or not self.x.is_contiguous()
        assert_close("y", y, y_want, length=rows, stages=3)
        size = float(self.grad.double().square().mean().sqrt()) if self.grad.numel() else 0.0
        assert_close("dx", grads["x"], grads_want["x"], length=rows, stages=6, scale=size)
        for name in grads.keys() - {"x"}:
            assert grads[name].dtype == self.leaves()[name].dtype
            scale = size * max(rows, 1) ** 0.5 * (self.x.shape[-1] ** 0.5 if self.leaves()[name].numel() == 1 else 1)
            assert_close(f"d{name}", grads[name], grads_want[name], length=rows, stages=6, scale=scale)
        assert_close("running_mean", self.running_mean, mean, length=rows, stages=2)
        assert_close("running_var", self.running_var, var, length=rows, stages=2)
        assert int(self.tracked) == tracked


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in memory of another shape."""
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if how == "every second row":
        wide = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), float("nan"))
        wide[::2] = tensor
        return wide[::2]
    return tensor


STRIDES = ("contiguous", "transposed", "sliced", "every second row")


def make_case(
    shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32, device: Any = None, how: str = "contiguous",
    masked: bool = False, training: bool = True, affine: bool = False, alpha_shape: tuple[int, ...] | None = None,
    momentum: float | None = 0.1, eps: float = 1e-8, parameter_dtype: torch.dtype | None = None,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = parameter_dtype or wide

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device=device, dtype=kind)

    channel_mean, channel_scale = normal(width, kind=torch.float64), normal(width, kind=torch.float64).abs() + 0.3
    x = (normal(*shape, kind=torch.float64) * channel_scale + channel_mean).to(dtype)
    return Case(
        x=strided(x, how),
        alpha=normal(*(alpha_shape or (width,)), kind=kept),
        running_mean=normal(width, kind=kept),
        running_var=normal(width, kind=kept).abs() + 0.2,
        tracked=torch.tensor(3, device=device),
        weight=normal(width, kind=kept) if affine else None,
        bias=normal(width, kind=kept) if affine else None,
        mask=torch.rand(shape[:-1], generator=generator).to(device) < 0.7 if masked else None,
        grad=strided(normal(*shape), how),
        training=training,
        momentum=momentum,
        eps=eps,
    )


def random_case(seed: int, *, max_rows: int, dtype: torch.dtype, device: Any = None) -> Case:
    """A call drawn from everything the contract allows."""
    rng = random.Random(seed)
    width = rng.choice([1, 2, 3, 7, 16, 17, 33, 36, 64, 80])
    leading = rng.choice([(rng.randint(8, max_rows),), (rng.randint(2, 5), rng.randint(4, max_rows // 4)), (2, 3, 5)])
    return make_case(
        (*leading, width),
        seed=seed,
        dtype=dtype,
        device=device,
        how=rng.choice(STRIDES),
        masked=rng.random() < 0.5,
        training=rng.random() < 0.7,
        affine=rng.random() < 0.4,
        alpha_shape=rng.choice([(width,), (width,), (width, 1), (1,)]),
        momentum=rng.choice([0.1, 0.01, 1.0, None]),
        eps=rng.choice([1e-8, 1e-3, 1e-9]),
    )
