"""The shapes that are measured: one list, used by the benchmarks, the floors and the report.

``S1`` … ``S5`` are the design's own. The others follow the data sets of the papers; their length distributions are
log-normal with the median and spread of the data (MovieLens-20M: 138,493 users, median 68 ratings, mean 144; Amazon
Electronics 5-core: 192,403 users, median 6 reviews, mean 8.8), cut at the longest list that the padded baselines can hold.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Distribution of list lengths: "uniform" over low … high, "lognormal" (median, sigma) cut to low … high, or
    "full": every list has ``high`` rows, so that padding costs the baselines nothing."""

    kind: str
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    def sample(self, batch: int, seed: int = 0) -> Tensor:
        """[B] int64 on the CPU, reproducible."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "full":
            return torch.full((batch,), self.high)
        if self.kind == "uniform":
            return torch.randint(self.low, self.high + 1, (batch,), generator=generator)
        if self.kind == "lognormal":
            normal = torch.randn(batch, generator=generator, dtype=torch.float64)
            return (normal * self.sigma + math.log(self.median)).exp().round().long().clamp(self.low, self.high)
        raise ValueError(f"kind must be 'uniform', 'lognormal' or 'full', got {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class ActivationWorkload:
    """One local activation problem. ``candidates`` > 0: that many query rows share each list."""

    name: str
    batch: int
    lengths: Lengths
    dim: int
    hidden: tuple[int, ...]
    activation: str = "sigmoid"
    interaction: str = "product"
    softmax: bool = False
    candidates: int = 0
    note: str = ""

    def with_(self, **changes: object) -> ActivationWorkload:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def padded_length(self) -> int:
        return self.lengths.high

    @property
    def hidden_name(self) -> str:
        return "-".join(map(str, self.hidden))


@dataclasses.dataclass(frozen=True)
class DiceWorkload:
    name: str
    rows: int
    channels: int


@dataclasses.dataclass(frozen=True)
class SparseWorkload:
    """``occurrences`` ids drawn from Zipf(``exponent``) over ``table`` rows of ``dim``."""

    name: str
    occurrences: int
    table: int
    dim: int
    exponent: float = 1.05

    def ids(self, seed: int = 0) -> Tensor:
        """[N] int64 on the CPU: inverse-CDF samples of a Zipf law cut at the table, popular ids scattered over it."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.arange(1, self.table + 1, dtype=torch.float64).pow(-self.exponent)
        cdf = weights.cumsum(0)
        draws = torch.rand(self.occurrences, generator=generator, dtype=torch.float64) * cdf[-1]
        ranks = torch.searchsorted(cdf, draws).clamp(max=self.table - 1)
        return torch.randperm(self.table, generator=generator)[ranks]


_TO_100 = Lengths("uniform", 1, 100)

ACTIVATION = {
    w.name: w
    for w in (
        ActivationWorkload("S1", 4096, _TO_100, 64, (36,), note="the paper's width"),
        ActivationWorkload("S2", 4096, _TO_100, 128, (80, 40), note="the public code's network"),
        ActivationWorkload("S3", 32768, Lengths("lognormal", 1, 100, 14.0, 0.9), 36, (36,), note="short lists"),
        ActivationWorkload("S4", 512, Lengths("uniform", 1, 2000), 64, (64, 16), note="long lists"),
        ActivationWorkload(
            "S5", 1, Lengths("full", 200, 200), 64, (80, 40), candidates=500, note="one user, 500 candidates"
        ),
        ActivationWorkload(
            "alibaba", 5000, Lengths("lognormal", 1, 200, 30.0, 1.0), 12, (36,), note="D = 12, paper 6.2"
        ),
        ActivationWorkload(
            "movielens", 1024, Lengths("lognormal", 1, 1000, 68.0, 1.2), 128, (80, 40), note="MovieLens-20M"
        ),
        ActivationWorkload(
            "amazon", 4096, Lengths("lognormal", 1, 100, 6.0, 0.8), 128, (80, 40), note="Amazon Electronics"
        ),
    )
}
# What two CPU cores can run within a benchmark's time: the design's CPU target, and small twins of S1, S3 and S4.
ACTIVATION_CPU = {
    w.name: w
    for w in (
        ActivationWorkload("cpu-target", 256, _TO_100, 64, (80, 40), note="the design's CPU shape"),
        ActivationWorkload("cpu-S1", 256, _TO_100, 64, (36,)),
        ActivationWorkload("cpu-alibaba", 512, Lengths("lognormal", 1, 200, 30.0, 1.0), 12, (36,)),
        ActivationWorkload("cpu-amazon", 512, Lengths("lognormal", 1, 100, 6.0, 0.8), 128, (80, 40)),
        ActivationWorkload("cpu-long", 16, Lengths("uniform", 1, 2000), 64, (64, 16)),
        ActivationWorkload("cpu-candidates", 1, Lengths("full", 200, 200), 64, (80, 40), candidates=100),
    )
}
DICE = {w.name: w for w in (DiceWorkload("65536x256", 65536, 256), DiceWorkload("4096x200", 4096, 200))}
SPARSE = {
    w.name: w
    for w in (
        SparseWorkload("409600-of-1e6x64", 409_600, 1_000_000, 64),
        SparseWorkload("655360-of-1e6x36", 655_360, 1_000_000, 36),
    )
}


DICE_CPU = {w.name: w for w in (DiceWorkload("cpu-8192x256", 8192, 256), DiceWorkload("cpu-4096x200", 4096, 200))}
SPARSE_CPU = {
    w.name: w
    for w in (
        SparseWorkload("cpu-51200-of-2e5x64", 51_200, 200_000, 64),
        SparseWorkload("cpu-200000-of-1e6x64", 200_000, 1_000_000, 64),
    )
}


@dataclasses.dataclass(frozen=True)
class StepWorkload:
    """A training step of DIN: tables, lists and network of one data set; behaviours have an item and a category."""

    name: str
    batch: int
    lengths: Lengths
    items: int
    categories: int
    field_dim: int
    unit_hidden: tuple[int, ...]
    interaction: str
    activation: str = "dice"
    mlp_hidden: tuple[int, ...] = (200, 80)


STEP = {
    w.name: w
    for w in (
        StepWorkload("amazon-product", 4096, _TO_100, 63_001, 801, 64, (80, 40), "product", "sigmoid"),
        StepWorkload("amazon-outer", 4096, _TO_100, 63_001, 801, 18, (36,), "outer"),
    )
}
STEP_CPU = {
    w.name: w
    for w in (
        StepWorkload("cpu-amazon-product", 256, _TO_100, 63_001, 801, 32, (80, 40), "product", "sigmoid"),
        StepWorkload("cpu-amazon-outer", 256, _TO_100, 63_001, 801, 18, (36,), "outer"),
    )
}


@dataclasses.dataclass
class ActivationInputs:
    """One concrete problem in both layouts; ``padded`` holds the same rows as ``keys``, padding zero."""

    query: Tensor
    keys: Tensor
    offsets: Tensor
    padded: Tensor
    lengths: Tensor
    grad: Tensor

    @property
    def rows(self) -> int:
        return self.keys.shape[0]


def make_activation(
    workload: ActivationWorkload,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    value_seed: int = 0,
) -> ActivationInputs:
    """Inputs of ``workload``, values normal with deviation 0.3 (about what trained embeddings have).

    seed decides the lengths, ``value_seed`` the values.
    """
    device = torch.device(device)
    lengths = workload.lengths.sample(workload.batch, seed).to(device)
    offsets = torch.zeros(workload.batch + 1, dtype=torch.int64, device=device)
    offsets[1:] = lengths.cumsum(0)
    generator = torch.Generator(device).manual_seed(value_seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 0.3).to(dtype)

    query_shape = (
        (workload.batch, workload.candidates, workload.dim) if workload.candidates else (workload.batch, workload.dim)
    )
    query, keys, grad = normal(*query_shape), normal(int(offsets[-1]), workload.dim), normal(*query_shape)
    mask = torch.arange(workload.padded_length, device=device) < lengths[:, None]
    padded = keys.new_zeros(workload.batch, workload.padded_length, workload.dim)
    padded[mask] = keys
    return ActivationInputs(query, keys, offsets, padded, lengths, grad)
