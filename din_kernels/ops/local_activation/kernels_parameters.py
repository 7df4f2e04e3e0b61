"""The layers' vectors, of any dtypes, as the one fp32 vector that the universal and the tiled kernels read."""

import triton
import triton.language as tl


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
