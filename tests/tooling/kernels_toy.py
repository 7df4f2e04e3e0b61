"""Small kernels, most of them wrong on purpose: what the verification tools must catch."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Right: a masked tail, each element written once."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, value * 2, mask=offs < n)


@triton.jit
def off_by_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs <= n, other=0.0) * 2, mask=offs < n)


@triton.jit
def unmasked_tail(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0) * 2)


@triton.jit
def below_the_start(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs - 1, mask=offs < n, other=0.0) * 2, mask=offs < n)


@triton.jit
def racing_store(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """All programs store their sum to one place: the last one to run wins."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0)))


@triton.jit
def shift_in_place(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Reads the element after its block, which the next program overwrites."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs + 1, mask=offs + 1 < n, other=0.0), mask=offs < n)


@triton.jit
def prefix_chain(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Each program continues from the result of the one before: right only when they run in order."""
    pid = tl.program_id(0)
    before = tl.load(out_ptr + pid - 1, mask=pid > 0, other=0.0)
    tl.store(out_ptr + pid, before + tl.load(x_ptr + pid))


@triton.jit
def disagreeing_lanes(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs // 2, tl.load(x_ptr + offs))


@triton.jit
def read_back(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Reverses a block through global memory; other threads wrote what each thread reads."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offs, tl.load(out_ptr + BLOCK - 1 - offs))


@triton.jit
def atomic_sum(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0)))


@triton.jit
def row_sums(x_ptr, out_ptr, rows, cols, stride, BLOCK: tl.constexpr):
    """One program a row, for strided rows."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + row, tl.sum(tl.load(x_ptr + row * stride + offs, mask=offs < cols, other=0.0)))


@triton.jit
def _helper_load(x_ptr, offs):
    return tl.load(x_ptr + offs)


@triton.jit
def wrong_in_helper(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """The unmasked load sits in a function that the kernel calls."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, _helper_load(x_ptr, offs), mask=offs < n)


@triton.jit
def copy_twice(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Every program reads the whole input once and its own block twice."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, total + tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def matmul_rows(x_ptr, w_ptr, out_ptr, rows, ROWS: tl.constexpr, D: tl.constexpr, H: tl.constexpr, EXTRA: tl.constexpr):
    """A loop over row tiles around a dot; EXTRA adds elementwise work to the loop."""
    weights = tl.load(w_ptr + tl.arange(0, D)[:, None] * H + tl.arange(0, H)[None, :])
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        x = tl.load(x_ptr + row[:, None] * D + tl.arange(0, D)[None, :], mask=row[:, None] < rows, other=0.0)
        y = tl.dot(x, weights)
        for _ in tl.static_range(EXTRA):
            y = tl.exp2(y) + 1.0
        tl.store(out_ptr + row[:, None] * H + tl.arange(0, H)[None, :], y, mask=row[:, None] < rows)


@triton.jit
def named_like_the_launchers_own(params, out_ptr, BLOCK: tl.constexpr):
    """Triton's launcher overwrites its variable ``params`` before it looks at this argument."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(params + offs))


@triton.jit
def changes_its_mind(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """The interpreter is Python, where a name may be a number first and a vector later; the compiler refuses."""
    offs = tl.arange(0, BLOCK)
    for i in range(0, n):
        tl.store(out_ptr + offs, tl.load(x_ptr + offs + i))
    for start in range(0, n, BLOCK):
        i = start + offs
        tl.store(out_ptr + i, tl.load(x_ptr + i), mask=i < n)
