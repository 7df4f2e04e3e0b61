"""How close is close enough, and what to test with: the rules all tests here use, for others to use too.

**Tolerance.** A kernel is compared with a float64 reference. Its error has three sources, each with a known size:
every product is rounded to the precision of the multiplier (u_product), a sum of ``length`` terms adds √length
roundings of the accumulator (u_sum; signs are random, so they grow as a walk does), and every intermediate that is
stored or handed on is rounded to its dtype (u_store). ``stages`` such steps follow one another. Relative to the size
of the terms:

    rms  =  SAFETY · stages · (u_product + u_store + √length · u_sum)

A single element may be worse than the root mean square: among n Gaussian errors the largest is about √(2 ln n) times
it, 5.3 for a million. ``SAFETY`` covers what the model leaves out: condition of sigmoid and softmax, uneven sizes.
Nothing is fitted to one machine, so that the same test holds on every GPU.

**Jagged shapes.** ``jagged_lengths`` and friends are hypothesis strategies over what breaks jagged kernels: no samples,
no rows, empty lists at either end, single rows, one long list among short ones, lists that end on tile borders.
Hypothesis is imported when they are called, not before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SAFETY = 4.0

# What a product loses: operands of tf32 keep 10 bits of mantissa and some hardware truncates; 16-bit operands are
# exact.
_PRODUCT_UNITS = {"ieee": 0.0, "tf32": 2.0**-10, "tf32x3": 2.0**-21, "bf16x3": 2.0**-17}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``: 2⁻²⁴ for float32, 2⁻⁸ for bfloat16."""
    return torch.finfo(dtype).eps / 2


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """rms: bound on the root mean square error over the root mean square of the reference;
    worst: how many times that bound the worst single element may be off, counting its own magnitude too."""

    rms: float
    worst: float = 8.0


def tolerance(dtype: torch.dtype, *, length: int = 1, stages: int = 1, precision: str = "ieee") -> Tolerance:
    """The tolerance for results of ``dtype`` after ``stages`` steps, the longest of which sums ``length`` terms.

    precision: how float32 products are taken: "ieee", "tf32", "tf32x3" or "bf16x3"; products of 16-bit and float64
    inputs are as exact as their accumulator (float32 and float64).
    """
    if precision not in _PRODUCT_UNITS:
        raise ValueError(f"precision must be one of {', '.join(_PRODUCT_UNITS)}, got {precision!r}")
    accumulator = unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
    product = _PRODUCT_UNITS[precision] if dtype == torch.float32 else 0.0
    one_stage = accumulator + product + unit_roundoff(dtype) + math.sqrt(max(length, 1)) * accumulator
    return Tolerance(SAFETY * max(stages, 1) * one_stage)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far ``actual`` is from ``expected``: see ``compare``."""

    rms_ratio: float
    worst_error: float
    worst_allowed: float
    worst_index: tuple[int, ...]
    worst_actual: float
    worst_expected: float
    bad: int
    total: int
    tolerance: Tolerance

    @property
    def ok(self) -> bool:
        return self.bad == 0 and self.rms_ratio <= self.tolerance.rms

    def __str__(self) -> str:
        return (
            f"RMS error ratio {self.rms_ratio:.3g} (allowed {self.tolerance.rms:.3g}); largest error "
            f"{self.worst_error:.3g} (allowed {self.worst_allowed:.3g}) at {self.worst_index}: "
            f"got {self.worst_actual:.8g}, expected {self.worst_expected:.8g}; "
            f"{self.bad} of {self.total} elements too far"
        )


def compare(actual: Tensor, expected: Tensor, tol: Tolerance, *, scale: float | None = None) -> Comparison:
    """Compare with a float64 reference of the same shape.

    scale: size of the terms that were summed, where the sum itself may cancel to much less (a bias gradient, say);
    the default is the root mean square of ``expected``. NaN and infinities count as infinitely far unless equal.
    """
    got, want = (t.detach().to("cpu", torch.float64).reshape(t.shape) for t in (actual, expected))
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {tuple(got.shape)}, expected {tuple(want.shape)}")
    if got.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, (), 0.0, 0.0, 0, 0, tol)
    error = torch.where(got == want, torch.zeros_like(want), (got - want).abs())
    error = torch.where(torch.isnan(error), torch.full_like(error, math.inf), error)
    size = max(float(want.square().mean().sqrt()), scale or 0.0)
    allowed = tol.rms * tol.worst * (size + want.abs())
    excess = error - allowed
    at = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), want.shape)) if want.dim() else ()
    rms = float(error.square().mean().sqrt())
    return Comparison(
        rms_ratio=0.0 if rms == 0.0 else (rms / size if size else math.inf),
        worst_error=float(error.flatten()[at]),
        worst_allowed=float(allowed.flatten()[at]),
        worst_index=index,
        worst_actual=float(got.flatten()[at]),
        worst_expected=float(want.flatten()[at]),
        bad=int((excess > 0).sum()),
        total=want.numel(),
        tolerance=tol,
    )


def assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    *,
    dtype: torch.dtype | None = None,
    length: int = 1,
    stages: int = 1,
    precision: str = "ieee",
    tol: Tolerance | None = None,
    scale: float | None = None,
) -> Comparison:
    """Assert that ``actual`` equals the float64 ``expected`` within ``tolerance(dtype or actual.dtype, ...)``.

    The message gives the RMS ratio, and the value, place and allowance of the worst element. Returns the comparison.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if tol is None:
        tol = tolerance(dtype or actual.dtype, length=length, stages=stages, precision=precision)
    found = compare(actual, expected, tol, scale=scale)
    if not found.ok:
        raise AssertionError(f"{name}: {found}")
    return found


# ---- jagged batches ------------------------------------------------------------------------------------------


def offsets_of(lengths: Sequence[int], *, dtype: torch.dtype = torch.int64, device: Any = None) -> Tensor:
    """[B + 1] running sums of ``lengths``, starting at 0."""
    total = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    if lengths:
        total[1:] = torch.as_tensor(list(lengths), dtype=torch.int64).cumsum(0)
    return total.to(device=device, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class JaggedBatch:
    """query [B, D] (or [B, C, D]), keys [N, D], offsets [B + 1], lengths as Python numbers."""

    query: Tensor
    keys: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]

    def padded(self, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """keys as [B, T, D], padding filled with ``fill`` (try NaN), and lengths [B]; T is at least 1."""
        width = max(self.lengths, default=0) or 1
        keys = self.keys.new_full((len(self.lengths), width, self.keys.shape[1]), fill)
        start = 0
        for sample, length in enumerate(self.lengths):
            keys[sample, :length] = self.keys[start : start + length]
            start += length
        return keys, torch.tensor(self.lengths, dtype=self.offsets.dtype, device=self.keys.device)


def jagged_batch(
    lengths: Sequence[int],
    dim: int,
    *,
    candidates: int = 0,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    device: Any = None,
    seed: int = 0,
    scale: float = 1.0,
) -> JaggedBatch:
    """Reproducible normal behaviours and queries ([B, C, D] for ``candidates`` C > 0), deviation ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), candidates, dim) if candidates else (len(lengths), dim)
    query = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    keys = torch.randn((sum(lengths), dim), generator=generator, dtype=torch.float64) * scale
    return JaggedBatch(
        query.to(device=device, dtype=dtype),
        keys.to(device=device, dtype=dtype),
        offsets_of(lengths, dtype=index_dtype, device=device),
        tuple(int(n) for n in lengths),
    )


def jagged_lengths(
    max_batch: int = 6, max_length: int = 24, *, tile: int = 16, long: int = 150
) -> SearchStrategy[list[int]]:
    """Hypothesis strategy: list lengths of a batch, including the shapes that break jagged kernels.

    tile: a border size to aim at (tile − 1, tile, tile + 1); long: length of the one long list among short ones.
    """
    from hypothesis import strategies as st

    short = st.integers(0, max_length)
    border = st.sampled_from([n for n in (tile - 1, tile, tile + 1, 2 * tile) if n >= 0])

    def with_long(lengths: list[int], place: int) -> list[int]:
        place = place % (len(lengths) + 1)
        return [*lengths[:place], long, *lengths[place:]]

    return st.one_of(
        st.just([]),
        st.lists(st.just(0), min_size=1, max_size=max_batch),
        st.lists(st.just(1), min_size=1, max_size=max_batch),
        st.lists(short, min_size=1, max_size=max_batch),
        st.lists(border, min_size=1, max_size=max_batch),
        st.lists(short, min_size=1, max_size=max_batch).map(lambda ls: [0, *ls, 0]),
        st.builds(with_long, st.lists(st.integers(0, 5), min_size=1, max_size=max_batch), st.integers(0, max_batch)),
    )


def widths(maximum: int = 64, *, minimum: int = 1) -> SearchStrategy[int]:
    """Hypothesis strategy: a width, with odd sizes, powers of two and their neighbours all likely."""
    from hypothesis import strategies as st

    special = [
        n for n in (1, 3, 7, 8, 12, 16, 17, 18, 31, 32, 33, 36, 40, 48, 64, 80, 127, 128) if minimum <= n <= maximum
    ]
    return st.one_of(st.sampled_from(special or [minimum]), st.integers(minimum, maximum))


def hostile_gradients(shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Any = None) -> list[Tensor]:
    """Gradients of ``shape`` as autograd really delivers them: contiguous, expanded (stride 0), transposed, a row slice
    of something wider, and one that starts off alignment."""
    generator = torch.Generator().manual_seed(7)

    def new(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    shape = tuple(shape)
    count = math.prod(shape)
    result = [new(*shape), new(*(1 for _ in shape)).expand(shape), new(count + 1)[1:].view(shape)]
    if len(shape) >= 2:
        result.append(new(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2))
        result.append(new(*shape[:-1], shape[-1] + 3)[..., 1:-2])
    return result
