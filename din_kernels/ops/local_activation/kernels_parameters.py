"""The layers' vectors, of any dtypes, as the one fp32 vector that the universal and the tiled kernels read; and the sums that
their programs leave as the gradients of parameters, of any dtypes."""

import triton
import triton.language as tl

from .kernels_collect import _total


@triton.jit
def gather_parameters(vectors, flat, SIZES: tl.constexpr, STRIDES: tl.constexpr, BLOCK: tl.constexpr):
    """flat = the ``vectors`` one after the other; a stride of 0 repeats one number, of −1 stands for zeros. One program."""
    n = tl.arange(0, BLOCK)
    at = flat
    for i in tl.static_range(len(SIZES)):
        inside = n < SIZES[i]
        if STRIDES[i] < 0:
            value = tl.zeros([BLOCK], tl.float32)
        else:
            value = tl.load(vectors[i] + n * STRIDES[i], mask=inside, other=0.0).to(tl.float32)
        tl.store(at + n, value, mask=inside)
        at += SIZES[i]


@triton.jit(do_not_specialize=["programs"])
def scatter_parameters(
    private, targets, programs, ROW: tl.constexpr, PLACES: tl.constexpr, SIZES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """targets[i] [SIZES[i]] = Σ_p private[p, PLACES[i] + n], rows of ROW numbers. A program takes BLOCK of them, of one target:
    first come those of the first."""
    block = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        if (block >= 0) & (block < (SIZES[i] + BLOCK - 1) // BLOCK):
            n = block * BLOCK + tl.arange(0, BLOCK)
            total = _total(private, programs, ROW, PLACES[i] + n, n < SIZES[i], BLOCK)
            tl.store(targets[i] + n, total.to(targets[i].dtype.element_ty), mask=n < SIZES[i])
        block -= (SIZES[i] + BLOCK - 1) // BLOCK
