"""Small kernels around Dice's statistics: each takes the place of a dozen operations on a few hundred numbers.

``finish_moments``: moments of P programs to those of all rows (Chan, Golub and LeVeque, 1979), and what Dice then normalises
with. ``update_running``: the running averages, as ``nn.BatchNorm1d`` keeps them.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_parts", "eps"])
def finish_moments(
    counts, means, m2s, running_mean, running_var, count, mean, m2, used_mean, used_rstd, inverse, num_parts, eps,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """counts [P] int64, means and m2s [P, H] -> count [] fp64, mean, m2 [H]; a program takes BLOCK_H channels. NORMALISE: also
    the mean and 1/√(var + ε) that Dice uses, the running ones where fewer than two rows were counted, and 1/count ([], 0
    there). In fp64, which costs nothing here."""
    n = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P], tl.float64)
    weighted = tl.zeros([BLOCK_P, BLOCK_H], tl.float64)
    for start in range(0, num_parts, BLOCK_P):
        part = start + lane
        rows = tl.load(counts + part, mask=part < num_parts, other=0).to(tl.float64)
        here = (part < num_parts)[:, None] & (n < H)[None, :]
        total += rows
        weighted += rows[:, None] * tl.load(means + part[:, None] * H + n[None, :], mask=here, other=0.0).to(tl.float64)
    number = tl.sum(total, axis=0)
    average = tl.sum(weighted, axis=0) / tl.maximum(number, 1.0)
    spread = tl.zeros([BLOCK_P, BLOCK_H], tl.float64)
    for start in range(0, num_parts, BLOCK_P):
        part = start + lane
        rows = tl.load(counts + part, mask=part < num_parts, other=0).to(tl.float64)
        here = (part < num_parts)[:, None] & (n < H)[None, :]
        away = tl.load(means + part[:, None] * H + n[None, :], mask=here, other=0.0).to(tl.float64) - average[None, :]
        spread += tl.load(m2s + part[:, None] * H + n[None, :], mask=here, other=0.0).to(tl.float64)
        spread += rows[:, None] * away * away
    total_m2 = tl.sum(spread, axis=0)
    inside = n < H
    tl.store(mean + n, average.to(tl.float32), mask=inside)
    tl.store(m2 + n, total_m2.to(tl.float32), mask=inside)
    first = tl.program_id(0) == 0
    tl.store(count, number, mask=first)
    if NORMALISE:
        old_mean = tl.load(running_mean + n, mask=inside, other=0.0).to(tl.float64)
        old_var = tl.load(running_var + n, mask=inside, other=0.0).to(tl.float64)
        enough = number >= 2.0
        share = tl.where(enough, 1.0 / tl.maximum(number, 1.0), 0.0)
        var = tl.where(enough, total_m2 * share, old_var) + eps
        tl.store(used_mean + n, tl.where(enough, average, old_mean).to(tl.float32), mask=inside)
        tl.store(used_rstd + n, (1.0 / tl.sqrt(var)).to(tl.float32), mask=inside)
        tl.store(inverse, share.to(tl.float32), mask=first)


@triton.jit(do_not_specialize=["momentum"])
def update_running(
    count, mean, m2, running_mean, running_var, tracked, momentum,
    H: tl.constexpr, BLOCK_H: tl.constexpr, TRACKED: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """running += momentum · (batch − running) with the unbiased variance, in place, and one more update in ``tracked``; nothing
    where fewer than two rows were counted. CUMULATIVE: the momentum is one over the number of updates. One program."""
    n = tl.arange(0, BLOCK_H)
    inside = n < H
    number = tl.load(count)
    enough = number >= 2.0
    step = momentum
    if TRACKED:
        updates = tl.load(tracked) + enough.to(tl.int64)
        tl.store(tracked, updates)
        if CUMULATIVE:
            step = 1.0 / tl.maximum(updates, 1).to(tl.float32)
    step = tl.where(enough, step, 0.0)
    old_mean = tl.load(running_mean + n, mask=inside, other=0.0).to(tl.float32)
    old_var = tl.load(running_var + n, mask=inside, other=0.0).to(tl.float32)
    new_mean = tl.load(mean + n, mask=inside, other=0.0)
    new_var = tl.load(m2 + n, mask=inside, other=0.0) / tl.maximum(number - 1.0, 1.0).to(tl.float32)
    moved_mean = old_mean + (new_mean - old_mean) * step
    moved_var = old_var + (new_var - old_var) * step
    tl.store(running_mean + n, moved_mean.to(running_mean.dtype.element_ty), mask=inside)
    tl.store(running_var + n, moved_var.to(running_var.dtype.element_ty), mask=inside)
