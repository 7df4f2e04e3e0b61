"""What `pip install .` brings: a pure-Python wheel with the package and its type marker, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import din_kernels

ROOT = Path(__file__).parent.parent


def test_wheel_holds_the_package_only(tmp_path):
    source = tmp_path / "source"  # a build leaves files behind, and takes up those of an earlier one
    shutil.copytree(ROOT / "din_kernels", source / "din_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        tmp_path,
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"din_kernels-{din_kernels.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"din_kernels", f"din_kernels-{din_kernels.__version__}.dist-info"}
    shipped = {name for name in names if name.startswith("din_kernels/")}
    tracked = {
        str(p.relative_to(ROOT)) for p in (ROOT / "din_kernels").rglob("*") if p.suffix == ".py" or p.name == "py.typed"
    }
    assert shipped == tracked
