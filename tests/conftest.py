"""Set-up shared by all tests.

Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors, so the switch must be set before any kernel
module is imported. With a GPU the same tests run on it, compiled.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)  # tests run side by side; two threads each on two cores only fight

import pytest


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels under test run: the GPU when there is one, otherwise the CPU (interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(20180819)
    torch.autograd.set_detect_anomaly(False)  # importing RecBole's trainer switches it on for the whole process


@pytest.fixture
def poison_scratch():
    """Fill every ``torch.empty`` with NaN (integers with their maximum): reading what nobody wrote then shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
