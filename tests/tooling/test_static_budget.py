"""The static budget catches what it is for, and the shipped configurations keep to it.

Compilation happens in subprocesses, because kernels imported under ``TRITON_INTERPRET=1`` (the other tests) cannot be
compiled. Repeats cost little: Triton keeps compiled kernels on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine_code, static_budget

ROOT = Path(__file__).parents[2]
TOY = "tests.tooling.cases_toy"

pytestmark = pytest.mark.static


def budget(*args: str, timeout: int = 500) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static_budget", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def toy_record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("budget") / "record.json"
    result = budget("--update", "--cases", TOY, "--record", str(path))
    record = json.loads(path.read_text())
    record["output"], record["status"] = result.stdout, result.returncode
    return record


def check_against(record: dict, tmp_path: Path, only: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"triton": record["triton"], "cases": record["cases"]}))
    return budget("--check", "--cases", TOY, "--record", str(path), "--only", only)


def test_limits_fail_even_when_recorded(toy_record):
    assert toy_record["status"] == 1
    failed = [line for line in toy_record["output"].splitlines() if line.startswith("FAIL")]
    assert any("toy/matmul/spilling sm_80: spills" in line for line in failed), failed
    assert any("toy/matmul/oversized sm_80" in line and "shared memory do not fit" in line for line in failed), failed
    assert any("toy/broken/arguments" in line and "unknown ['out'], missing ['out_ptr']" in line for line in failed)
    assert not any("fine" in line for line in failed), failed


def test_figures_make_sense(toy_record):
    fine = toy_record["cases"]["toy/matmul/fine"]["sm_90"]
    assert fine["stack"] == fine["spill_instructions"] == 0
    assert 16 <= fine["registers"] <= 255
    assert fine["classes"]["tensor"] >= 1
    assert fine["per_unit"] == round(fine["loop_instructions"] * 4 / 64, 2)
    slower = toy_record["cases"]["toy/matmul/slower"]["sm_90"]
    # One exp2 for each of 64 x 32 outputs over 128 threads: 16 a thread.
    assert slower["classes"]["special"] - fine["classes"].get("special", 0) == 16
    assert toy_record["cases"]["toy/scale_rows/fine"]["sm_90"]["loop_instructions"] == 0
    assert toy_record["cases"]["toy/scale_rows/fine"]["gfx942"]["spilled_registers"] == 0


def test_a_clean_case_passes(toy_record, tmp_path):
    result = check_against(toy_record, tmp_path, "toy/*/fine")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_regression_fails_with_a_readable_diff(toy_record, tmp_path):
    record = json.loads(json.dumps(toy_record))
    record["cases"]["toy/matmul/slower"]["sm_90"] = record["cases"]["toy/matmul/fine"]["sm_90"]
    result = check_against(record, tmp_path, "toy/matmul/slower")
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert "toy/matmul/slower sm_90" in line
    assert "instructions a unit (+" in line
    assert "special 0 -> 16" in line


def test_a_case_without_a_record_fails(toy_record, tmp_path):
    record = json.loads(json.dumps(toy_record))
    del record["cases"]["toy/scale_rows/fine"]
    result = check_against(record, tmp_path, "toy/scale_rows/*")
    assert result.returncode == 1
    assert "has no record" in result.stdout


def test_another_triton_is_not_compared(toy_record, tmp_path):
    result = check_against({**toy_record, "triton": "2.0.0"}, tmp_path, "*")
    assert result.returncode == 3
    assert "cannot be compared" in result.stdout


def test_the_register_fallback_of_ptxas_is_named():
    figures = {"registers": 32, "stack": 11264, "spill_instructions": 900, "shared": 0}
    (failure,) = static_budget.limits("case", "sm_90", figures, stack=64)
    assert "ptxas gave up" in failure


def test_a_small_change_is_tolerated_and_a_gain_is_noted():
    def figures(count: float) -> dict:
        return {"per_unit": count, "classes": {"float": int(count)}}

    assert static_budget.compare("case", "sm_90", figures(101.9), figures(100)) == ([], [])
    failures, _ = static_budget.compare("case", "sm_90", figures(102.1), figures(100))
    assert len(failures) == 1
    _, notes = static_budget.compare("case", "sm_90", figures(90), figures(100))
    assert "would record the gain" in notes[0]
    spilling = {**figures(100), "stack": 64, "spill_instructions": 9}
    assert static_budget.compare("case", "sm_90", spilling, spilling) == ([], [])
    for what in ("stack", "spill_instructions"):  # allowed by the case, but not more than there was
        failures, _ = static_budget.compare("case", "sm_90", spilling, {**spilling, what: 8})
        assert f"{what} {spilling[what]}, recorded 8" in failures[0]


def test_loops_are_found_and_the_main_one_is_the_one_with_most_work_of_its_own():
    def line(address: int, text: str) -> str:
        return f"        /*{address:04x}*/                   {text} ;"

    listing = "\n".join(
        [
            line(0x00, "MOV R1, c[0x0][0x28]"),
            line(0x10, "@P0 LDG.E R2, [R4]"),  # outer loop
            line(0x20, "IADD3 R3, R3, 0x1, RZ"),  # inner loop
            line(0x30, "@!P1 BRA 0x20"),
            *[line(0x40 + 16 * i, "FFMA.FTZ R2, R2, R2, R2") for i in range(5)],
            line(0x90, "@P2 BRA 0x10"),
            line(0xA0, "EXIT"),
            line(0xB0, "BRA 0xb0"),
        ]
    )
    instructions, loops = machine_code.parse_sass(listing)
    assert len(instructions) == 12
    assert [(loop.first, loop.last, loop.instructions, loop.own) for loop in loops] == [
        (0x10, 0x90, 9, 7),
        (0x20, 0x30, 2, 2),
    ]
    main = machine_code.main_loop(loops)
    assert main is not None
    assert main.classes == {"global": 1, "integer": 1, "branch": 2, "float": 5}


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HGMMA.64x16x16.F32.BF16", "tensor"),
        ("HMMA.16816.F32", "tensor"),
        ("MUFU.EX2", "special"),
        ("FFMA.FTZ", "float"),
        ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("HFMA2.BF16", "half"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("LDSM.16.M88.4", "shared"),
        ("STL.64", "local"),
        ("SHFL.BFLY", "shuffle"),
        ("BAR.SYNC", "barrier"),
        ("WARPGROUP.DEPBAR.LE", "barrier"),
        ("LOP3.LUT", "integer"),
        ("FADD", "float"),
        ("BRA", "branch"),
    ],
)
def test_instruction_classes(opcode, expected):
    assert machine_code.classify(opcode) == expected


def test_occupancy_by_hand():
    h100 = machine_code.ARCHITECTURES["sm_90"]
    assert machine_code.occupancy(128, 4, 0, h100) == (4, 0.25)  # registers: 65536 / (128 x 128)
    assert machine_code.occupancy(32, 4, 100 * 1024, h100) == (2, 0.125)  # shared memory: 228 / 101
    assert machine_code.occupancy(16, 1, 0, h100) == (32, 0.5)  # blocks


@pytest.mark.timeout(900)
def test_shipped_configurations_keep_their_budget():
    """The part of the full check that fits in CI; ``python -m benchmarks.static_budget`` runs all of it."""
    if not static_budget.RECORD.exists():
        pytest.fail(f"{static_budget.RECORD} is missing: run python -m benchmarks.static_budget --update")
    result = budget("--check", "--quick", timeout=880)
    if result.returncode == 3:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stack_is_allowed_by_case():
    figures = {"registers": 255, "stack": 64, "spill_instructions": 20, "shared": 0}
    assert not static_budget.limits("case", "sm_90", figures, stack=64)
    for allowed in (0, 56):
        (failure,) = static_budget.limits("case", "sm_90", figures, stack=allowed)
        assert "64 bytes of stack" in failure
