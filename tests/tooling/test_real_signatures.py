"""What the public calls pass to the kernels compiles, as they pass it, and nothing on the way waits for the device.

Everything up to the launch itself is Triton's own code (``tests/support/fake_launch.py``). The interpreter shows none of it,
and the static budget compiles signatures written by hand. In processes of their own: kernels imported under
``TRITON_INTERPRET=1`` cannot be compiled.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine_code import ARCHITECTURES
from benchmarks.static_budget import SOURCES, load_cases
from din_kernels.ops.dice.tiling import COLUMNS_MAX_ROWS
from reference.units import Dice, LocalActivationUnit
from tests.support.fake_launch import computes
from tests.support.gpu_calls import CALLS

ROOT = Path(__file__).parents[2]
OPS = ROOT / "din_kernels" / "ops"

pytestmark = pytest.mark.static


def without_interpreter(*command: str) -> dict[str, Any]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.stdout.startswith("{"), result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return without_interpreter("tests.support.gpu_calls")


def kernel_definitions() -> list[ast.FunctionDef]:
    """Every function of the kernel modules that is compiled."""
    return [
        node
        for path in OPS.glob("*/kernels*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]


def launched() -> dict[str, ast.FunctionDef]:
    """Kernels that are launched: those that no kernel calls, or has tl.reduce or tl.associative_scan call."""
    kernels = kernel_definitions()
    calls = [node for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Call)]
    called = {name.id for call in calls for name in (call.func, *call.args) if isinstance(name, ast.Name)}
    return {kernel.name: kernel for kernel in kernels if kernel.name not in called}


@pytest.mark.parametrize("name", CALLS)
def test_calls_reach_the_gpu(results, name):
    assert results[name]["error"] is None, results[name]["error"]
    assert results[name]["launches"]
    for launch in results[name]["launches"]:
        assert launch["shared"] <= ARCHITECTURES["sm_90"].shared_per_block, launch


@pytest.mark.parametrize("capability", [89, 120])
def test_gpus_with_little_shared_memory(capability):
    """A block has 99 KB on sm_86, sm_89 and sm_120, where sm_80 has 163 and sm_90 has 227."""
    found = without_interpreter("tests.support.gpu_calls", "--only", "packed*wide", "--capability", str(capability))
    for result in found.values():
        assert result["error"] is None
        assert max(launch["shared"] for launch in result["launches"]) <= 99 * 1024, result["launches"]


def test_every_kernel_is_among_them(results):
    seen = {launch["kernel"] for result in results.values() for launch in result["launches"]}
    assert launched().keys() - seen == set()
    assert len(seen) > 20


def test_every_kernel_is_compiled_ahead_of_time():
    """For every architecture; the exceptions are kernels that no GPU of the others is given."""
    pytest.importorskip("triton")
    targets: dict[str, set[str]] = {}
    for case in load_cases(SOURCES):
        targets.setdefault(case.kernel.__name__, set()).update(case.targets)
    assert launched().keys() == targets.keys()
    assert {name: found for name, found in targets.items() if found != set(ARCHITECTURES)} == {
        **{name: {"sm_90"} for name in ("backward_tiled", "forward_packed_fp32")},
        **{name: {"sm_80", "sm_90"} for name in targets if name.endswith("_fp32") and name != "forward_packed_fp32"},
    }


# Kernels of the library and of torch in one forward and backward, with the one that stands for the loss's gradient. Each
# takes the host five to twenty microseconds, for which small batches wait.
LAUNCHES = {
    "packed sigmoid": 14, "packed sigmoid, two layers, 200,000 behaviours": 15,
    "packed dice training, two layers": 27, "tiled outer dice training, backward tiled too": 31,
    "tiled outer sigmoid, backward tiled too": 22,
    "dice training, few rows": 3, "dice training, many rows": 5, "dice serving": 1, "sgd + mba": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_few_launches(results, name):
    assert len(results[name]["work"]) == LAUNCHES[name], results[name]["work"]


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += computes(func, args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "activation", "widths", "unfused"),
    [("packed sigmoid", "sigmoid", (36,), 36), ("packed dice training, two layers", "dice", (16, 16), 134)],
)
def test_fewer_launches_than_unfused(name, activation, widths, unfused):
    """The README says how many each takes."""
    unit = LocalActivationUnit(16, hidden_units=widths, activation=activation, interaction="product")
    query, keys = torch.randn(7, 16, requires_grad=True), torch.randn(280, 16, requires_grad=True)
    gradient, offsets = torch.ones(7, 16), torch.arange(8) * 40
    with Launches() as launches:
        unit(query, keys, offsets=offsets).backward(gradient)
    assert launches.count == unfused
    readme = " ".join((ROOT / "README.md").read_text().split())
    fused = LAUNCHES["packed sigmoid"] - 1, LAUNCHES["packed dice training, two layers"] - 1
    assert f"are {fused[0]} kernels with one layer and sigmoid and {fused[1]} with two layers and Dice" in readme
    assert "the unfused unit takes 36 and 134" in readme
    outer = [LAUNCHES[f"tiled outer {kind}, backward tiled too"] - 1 for kind in ("sigmoid", "dice training")]
    assert f"The paper's outer product takes {outer[0]} with sigmoid and {outer[1]} with Dice" in readme
    assert 2 * LAUNCHES[name] < unfused


def test_fewer_launches_than_unfused_dice():
    """The README says how many each takes."""
    unit, x, gradient = Dice(8), torch.randn(6, 8, requires_grad=True), torch.ones(6, 8)
    with Launches() as launches:
        unit(x).backward(gradient)
    few, many = LAUNCHES["dice training, few rows"] - 1, LAUNCHES["dice training, many rows"] - 1
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"Dice alone takes {few} up to {COLUMNS_MAX_ROWS} rows and {many} beyond, unfused {launches.count}." in readme
    )


def test_no_argument_takes_a_name_of_the_launcher():
    """``triton.runtime.jit`` binds arguments in a function with variables of these names."""
    taken = {"params", "specialization", "options", "specialize_impl", "backend", "grid", "warmup", "self"}
    assert {(name, a.arg) for name, kernel in launched().items() for a in kernel.args.args if a.arg in taken} == set()


def test_mistakes_are_told():
    told = without_interpreter("tests.tooling.launch_mistakes")
    assert told.pop("nothing") == "accepted"
    assert "accepted" not in told.values(), told
    assert len(told) == 11
