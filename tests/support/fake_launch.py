"""Public calls as a GPU would see them, on a machine without one: everything happens but the launch itself.

Inside ``gpu(...)`` tensors are torch's fake ones (shapes, dtypes, strides and offsets, no values) on a device "cuda", the
operators run the implementations registered for it, and each kernel call goes through the front half of Triton's own
launcher: it binds the arguments, chooses the specialisation (integers equal to 1, divisible by 16, wider than 32 bits,
unaligned pointers), compiles for the target, and stops before the driver. So what is compiled is what the wrappers really
pass. On the way show, as exceptions:

* anything that would wait for the device or depend on values there: ``.item()``, ``bool(tensor)``, ``nonzero``, …
* tensors left on the CPU, in torch's operations as in kernel arguments
* options a version of Triton does not know, arguments it cannot pass, grids that CUDA refuses

Autograd's engine does not work on such tensors, so ``Function.apply`` is taped here and ``Tape.backward`` replays it. Kernels
must have been imported without ``TRITON_INTERPRET``: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

MAX_GRID = (2**31 - 1, 65535, 65535)
NAMESPACE = "din_kernels"
READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


@dataclasses.dataclass
class Launch:
    """One kernel call: its grid, what it was specialised to, and the compiled kernel (None where only bound)."""

    name: str
    grid: tuple[int, ...]
    signature: dict[str, Any]  # argument -> type, "constexpr", or a tuple of them
    options: dict[str, Any]
    seconds: float
    compiled: Any


class Pointer:
    """What Triton's launcher asks of a tensor. Memory of a fresh tensor is aligned; a view may not be."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        if tensor.device.type != "cuda":
            raise ValueError(f"{name}: pointer argument cannot be accessed from Triton: it is on {tensor.device}")
        self.dtype = tensor.dtype
        self.address = 0 if tensor.numel() == 0 else (1 << 20) + int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


def _argument(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value, name)
    if isinstance(value, tuple):
        return tuple(_argument(name, member) for member in value)
    if value is not None and type(value) not in (int, float, bool, str):
        raise TypeError(
            f"{name}: {value!r} of {type(value)}: only plain numbers, strings and tensors are launched with"
        )
    return value


class Driver:
    """As much of Triton's driver as binding and compiling take."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def _at(tensor: Tensor, index: Any) -> Tensor:
    """``tensor[index]`` without the device guard that it takes in C++, which a CPU build of torch does not have."""
    dim = 0
    for at in index if isinstance(index, tuple) else (index,):
        if isinstance(at, int):
            tensor = tensor.select(dim, at)
            continue
        if isinstance(at, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, at.start, at.stop, at.step or 1)
        elif at is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(at, Tensor):
            tensor = torch.ops.aten.index.Tensor(tensor, [None] * dim + [at])
        else:
            raise NotImplementedError(f"index {at!r}")
        dim += 1
    return tensor


def _contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``tensor.contiguous()`` without that guard."""
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return torch.ops.aten.clone.default(tensor, memory_format=memory_format)


def computes(func: Any, args: tuple) -> bool:
    """Whether ``func`` does more than hand out memory or look at it in another way."""
    if (
        func.namespace != "aten"
        or not func._schema.returns
        or func.overloadpacket.__name__.startswith(("empty", "new_empty", "_unsafe_view"))
    ):
        return False
    looks = all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not looks and not (func.overloadpacket.__name__ == "_to_copy" and args[0].device.type == "cpu")


class Implementations(TorchDispatchMode):
    """The library's operators run what is registered for CUDA, not the shape functions that fake tensors would choose.
    Operations that would launch a kernel of torch's are noted on the tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == NAMESPACE:
            for name in ("CUDA", "CompositeExplicitAutograd"):
                key = getattr(torch._C.DispatchKey, name)
                if func.has_kernel_for_dispatch_key(key):
                    with self:  # an operator may call another
                        return func._op_dk(key, *args, **(kwargs or {}))
        if func in READS and args[0].device.type == "cpu":
            return 1.0 if args[0].dtype.is_floating_point else 1  # read without waiting for anybody
        if computes(func, args):
            self.tape.work.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _Context(SimpleNamespace):
    """Stands in for autograd's ``ctx``."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    hidden: tuple[Tensor, ...] = ()
    materialize: bool = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.hidden = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


class Tape:
    """The launches, and the autograd Functions applied so far."""

    def __init__(self, compile_kernels: bool) -> None:
        self.compile_kernels = compile_kernels
        self.launches: list[Launch] = []
        self.work: list[str] = []  # every kernel that would be launched, of the library or of torch, in order
        self.functions: list[tuple[Any, _Context, tuple[Any, ...]]] = []

    def apply(self, function: Any, *args: Any) -> Any:
        context = _Context()
        context.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
        outputs = function.forward(context, *args)
        self.functions.append((function, context, outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs

    def backward(self, gradient: Any = torch.ones_like) -> list[tuple[Any, ...]]:
        """Run the backward of every Function, the last first, on ``gradient(output)`` of each differentiable output."""
        found = []
        for function, context, outputs in reversed(self.functions):
            hidden = {id(t) for t in context.hidden}
            gradients = [None if id(t) in hidden or t.numel() == 0 else gradient(t) for t in outputs]
            found.append(function.backward(context, *gradients))
        self.functions.clear()
        return found

    def launch(self, run: Any, kernel: Any, args: tuple, grid: Any, options: dict[str, Any]) -> Any:
        names = kernel.arg_names
        args = tuple(_argument(f"{kernel.__name__}.{name}", a) for name, a in zip(names, args, strict=False))
        options = {name: _argument(f"{kernel.__name__}.{name}", a) for name, a in options.items()}
        for size, most in zip(grid, MAX_GRID, strict=False):
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{kernel.__name__}: CUDA refuses the grid {grid}")
        self.work.append(kernel.__name__)
        seen: dict[str, Any] = {}

        def hook(**event: Any) -> bool:
            seen.update(event["compile"])
            return not self.compile_kernels  # True: do not compile

        from triton import knobs

        started = time.perf_counter()
        with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if seen or compiled is None:  # else bound like an earlier launch, whose kernel serves again
            options = {name: value for name, value in options.items() if name not in names}
            seconds = time.perf_counter() - started
            self.launches.append(
                Launch(kernel.__name__, tuple(grid), seen.get("signature", {}), options, seconds, compiled)
            )
        return compiled


@contextlib.contextmanager
def gpu(*, capability: int = 90, processors: int = 132, compile_kernels: bool = True) -> Iterator[Tape]:
    """A GPU of ``capability`` (90: sm_90) with so many multiprocessors, up to the launch."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from din_kernels import _launch
    from din_kernels.ops.dice import api as dice_call
    from din_kernels.ops.dice import function as dice
    from din_kernels.ops.dice import tiling, triton_impl
    from din_kernels.ops.gathered_activation import function as gathered
    from din_kernels.ops.local_activation import api as unit_call
    from din_kernels.ops.local_activation import function as unit
    from din_kernels.ops.local_activation import universal
    from din_kernels.ops.sparse_update import function as update

    tape, run = Tape(compile_kernels), JITFunction.run
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(name="fake", major=major, minor=minor, multi_processor_count=processors)
    device_facts = (universal.capability_of, universal._processors, tiling.processors_of, triton_impl._plan)
    before = driver._active
    kernels: list[Any] = []

    def intercepted(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if kernel not in kernels:
            kernels.append(kernel)
            kernel.device_caches.clear()  # compiled for another target
        return tape.launch(run, kernel, args, grid, options)

    with contextlib.ExitStack() as stack:
        for cached in device_facts:
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        driver.set_active(Driver(GPUTarget("cuda", capability, 32)))  # type: ignore[arg-type]
        stack.callback(setattr, driver, "_active", before)
        for place, name, value in (
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_properties", lambda device: properties),
            (torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
            (Tensor, "__getitem__", _at),
            (Tensor, "contiguous", _contiguous),
            (torch, "is_grad_enabled", lambda: True),
            (torch.autograd.Function, "apply", classmethod(tape.apply)),
            (torch.autograd.graph, "increment_version", lambda tensors: None),
            (JITFunction, "run", intercepted),
            (_launch, "_triton", lambda: None),  # every launch goes through Triton's front half
            # As in eager mode, where operators are called directly.
            *(
                (module, "is_eager", lambda *tensors: True)
                for module in (dice, dice_call, gathered, unit, unit_call, update)
            ),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Implementations(tape))
        yield tape
