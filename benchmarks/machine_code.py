"""Compile one kernel for a GPU that need not be here, and read what the machine code says about it.

NVIDIA: registers, stack and the instructions come from the cubin through ``cuobjdump``, which ships inside the Triton
wheel. AMD: from the metadata block of the assembly. Counts are static: every instruction of a loop counts once, taken
or not.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from din_kernels._tuning import CompileCase


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What one compilation target offers; sizes in bytes (CUDA C programming guide, CDNA3 ISA guide)."""

    backend: str
    arch: int | str
    warp: int
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int = 1024
    registers_per_sm: int = 65536
    warps_per_sm: int = 64
    blocks_per_sm: int = 32


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 163 * 1024, 164 * 1024),
    "sm_90": Architecture("cuda", 90, 32, 227 * 1024, 228 * 1024),
    "gfx942": Architecture("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 0, 0, 32, 32),
}

# First match wins; names are matched up to the first dot.
_CLASSES: tuple[tuple[str, str], ...] = (
    ("local", r"LDL|STL"),
    ("tensor", r"[A-Z]*MMA"),
    ("special", r"MUFU"),
    ("half", r"H(ADD2|FMA2|MUL2|MNMX2|SETP2|SET2)(_MMA|_32I)?"),
    ("convert", r"F2F|F2FP|F2I|I2F|I2FP|F2IP|FRND|I2I"),
    ("float", r"F(FMA|ADD|MUL|MNMX|SEL|SETP|SET|CHK|SWZADD)|D(FMA|ADD|MUL|SETP)"),
    ("shuffle", r"SHFL|REDUX|VOTEU?|MATCH"),
    ("shared", r"LDSM?|STSM?|ATOMS"),
    ("global", r"LDG|LDGSTS|STG|LD|ST|RED|REDG|ATOM|ATOMG|UTMA[A-Z]+|UBLKCP|LDC|ULDC|LDCU|CCTL"),
    (
        "barrier",
        r"BAR|SYNCS|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|MEMBAR|ERRBAR|BSSY|BSYNC|BREAK|NANOSLEEP|YIELD|ARRIVES",
    ),
    ("branch", r"BRA|BRX|JMP|CALL|RET|EXIT|BPT"),
    ("integer", r"[A-Z0-9_]+"),
)
_PATTERNS = [(name, re.compile(pattern + r"$")) for name, pattern in _CLASSES]
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")


@functools.cache
def classify(opcode: str) -> str:
    """The class of a SASS opcode (``"FFMA.FTZ"`` -> ``"float"``)."""
    base = opcode.split(".", 1)[0]
    return next(name for name, pattern in _PATTERNS if pattern.match(base))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A backward branch: first and last instruction address, instructions inside, and those not in an inner loop."""

    first: int
    last: int
    instructions: int
    own: int
    classes: dict[str, int]


def parse_sass(text: str) -> tuple[list[tuple[int, str, str]], list[Loop]]:
    """Instructions (address, opcode, operands) of a ``cuobjdump -sass`` listing, and its loops, outermost first."""
    instructions = [
        (int(m.group(1), 16), m.group(2), m.group(3))
        for m in map(_INSTRUCTION.match, text.splitlines())
        if m and m.group(2) != "NOP"  # padding behind the end
    ]
    ends: dict[int, int] = {}
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target.group(1), 16) < address:  # a branch to itself is the trap behind the last EXIT
            first = int(target.group(1), 16)
            ends[first] = max(ends.get(first, 0), address)
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
    loops = []
    for first, last in spans:
        inner = [s for s in spans if s != (first, last) and first <= s[0] and s[1] <= last]
        inside = [(a, op) for a, op, _ in instructions if first <= a <= last]
        own = sum(not any(s[0] <= a <= s[1] for s in inner) for a, _ in inside)
        loops.append(Loop(first, last, len(inside), own, dict(collections.Counter(classify(op) for _, op in inside))))
    return instructions, loops


def main_loop(loops: list[Loop]) -> Loop | None:
    """The loop with the most instructions of its own: a persistent kernel's tile loop, not the search inside it."""
    return max(loops, key=lambda loop: loop.own, default=None)


def occupancy(registers: int, warps: int, shared: int, arch: Architecture) -> tuple[int, float]:
    """Blocks that fit on one multiprocessor, and the share of its warp slots they fill."""
    per_warp = math.ceil(registers * arch.warp / 256) * 256
    limits = [arch.warps_per_sm // warps, arch.blocks_per_sm]
    if per_warp:
        limits.append(arch.registers_per_sm // (per_warp * warps))
    if shared:
        limits.append(arch.shared_per_sm // (shared + arch.shared_reserved))
    blocks = max(0, min(limits))
    return blocks, blocks * warps / arch.warps_per_sm


def _tool(name: str) -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS of a cubin, kept beside Triton's cache as the dump costs more than a cached compile."""
    from triton.runtime.cache import get_cache_manager

    key = hashlib.sha256(b"resource+sass" + cubin).hexdigest()
    cache = get_cache_manager(key)
    kept = cache.get_file("dump.json")
    if kept:
        usage, sass = json.loads(Path(kept).read_text())
        return usage, sass
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    sass = re.sub(r"\s*/\* 0x[0-9a-f]{16} \*/", "", sass)
    cache.put(json.dumps([usage, sass]), "dump.json", binary=False)
    return usage, sass


def _nvidia(case: CompileCase, compiled: Any, arch: Architecture) -> dict[str, Any]:
    usage, sass = _dump(compiled.asm["cubin"])
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions, loops = parse_sass(sass)
    body = main_loop(loops)
    classes = body.classes if body else dict(collections.Counter(classify(op) for _, op, _ in instructions))
    spills = sum(classify(op) == "local" for _, op, _ in instructions)
    warps, shared = int(compiled.metadata.num_warps), int(compiled.metadata.shared)
    blocks, filled = occupancy(found["REG"], warps, shared, arch)
    counted = body.instructions if body else len(instructions)
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "spill_instructions": spills,
        "shared": shared,
        "blocks_per_sm": blocks,
        "occupancy": round(filled, 3),
        "instructions": len(instructions),
        "loop_instructions": body.instructions if body else 0,
        "per_unit": round(counted * warps / case.rows, 2) if case.rows else None,
        "classes": dict(sorted(classes.items(), key=lambda item: (-item[1], item[0]))),
    }


def _amd(case: CompileCase, compiled: Any, arch: Architecture) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match.group(1)) if match else 0

    return {
        "registers": value("vgpr_count"),
        "accumulators": value("agpr_count"),
        "scratch": value("private_segment_fixed_size"),
        "spilled_registers": value("vgpr_spill_count"),
        "shared": int(compiled.metadata.shared),
        "fits": int(compiled.metadata.shared) <= arch.shared_per_block,
    }


def _places(index: int, kind: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    """Where the compiler looks for the attributes of an argument: a tuple's members have places of their own."""
    return [(index,)] if isinstance(kind, str) else [(index, member) for member in range(len(kind))]


def measure(case: CompileCase, target: str) -> dict[str, Any]:
    """Compile ``case`` for ``target`` and return its figures, or ``{"error": ...}`` if it does not compile.

    Must run with ``TRITON_INTERPRET`` unset: interpreted kernels cannot be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arch = ARCHITECTURES[target]
    names = list(case.kernel.arg_names)
    stray = [n for n in (*case.signature, *case.constexprs, *case.aligned) if n not in names]
    missing = [n for n in names if n not in case.signature and n not in case.constexprs]
    if stray or missing:
        return {"error": f"the case does not match the kernel's arguments: unknown {stray}, missing {missing}"}
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attributes = {
        place: [["tt.divisibility", 16]]
        for name in case.aligned
        if name in case.signature
        for place in _places(names.index(name), case.signature[name])
    }
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    try:
        source = ASTSource(case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget(arch.backend, arch.arch, arch.warp), options=options)
        return (_nvidia if arch.backend == "cuda" else _amd)(case, compiled, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        lines = str(error).strip().splitlines() or [""]
        told = next((line for line in lines if "fatal" in line or "error:" in line), lines[-1])
        return {"error": f"{type(error).__name__}: {told.strip()}"[:300]}
