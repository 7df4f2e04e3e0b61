"""Importing the package is cheap and touches no device; without Triton everything but the kernels works."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run(code: str, **environment: str) -> str:
    """Output of ``code`` in a fresh interpreter."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, **environment},
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_touches_neither_cuda_nor_triton():
    out = run("""
        import sys
        import torch

        def forbidden(*_, **__):
            raise AssertionError("CUDA was initialised by an import")

        torch.cuda._lazy_init = forbidden
        torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = forbidden
        before = set(sys.modules)
        import din_kernels
        import din_kernels.functional, din_kernels.modules, din_kernels.ops, din_kernels.jagged
        import din_kernels.env_report, din_kernels.selftest, din_kernels.testing
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        assert "triton" not in new, "triton was imported"
        assert not new & {"hypothesis", "pytest", "numpy", "matplotlib", "reference"}, new
        assert din_kernels.ops.LocalActivationFunction and din_kernels.ops.DiceFunction
        assert din_kernels.ops.MBAEmbeddingFunction
        print(din_kernels.__version__)
    """)
    assert out.strip()


def test_everything_works_without_triton():
    run("""
        import sys

        sys.modules["triton"] = None  # importing it raises ImportError
        import importlib.util

        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest)
        import torch
        import din_kernels
        from din_kernels import BackendUnavailable

        unit = din_kernels.LocalActivationUnit(4, (3,))
        query, keys = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, 4)
        unit(query, keys).sum().backward()
        assert query.grad is not None
        din_kernels.Dice(3)(torch.randn(5, 3)).sum().backward()
        din_kernels.MBAEmbedding(7, 3)(torch.tensor([1, 2])).sum().backward()
        try:
            din_kernels.LocalActivationUnit(4, (3,), backend="triton")(query, keys)
        except BackendUnavailable as error:
            assert "pip install triton" in str(error)
        else:
            raise AssertionError("an explicit backend was silently replaced")
        import din_kernels.env_report

        assert "not installed" in din_kernels.env_report.report()
    """, TRITON_INTERPRET="0")  # fmt: skip


def test_star_import_gives_the_public_names():
    run("""
        from din_kernels import *
        assert LocalActivationUnit and Dice and MBAEmbedding and functional.local_activation and ops.DiceFunction
    """)
