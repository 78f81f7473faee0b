"""What runs of `bench/gpu.py` leave behind and take up again: results and compiled kernels.

Compiled kernels lie in Triton's cache. They travel as archives beside the results, the newest
first: small enough, and few enough, for a machine from which only some files come back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kernels", "multilora", "bench", "tests")
ARCHIVE_BYTES = 16 << 20
ARCHIVES = 3
PENDING = 1 << 20  # bytes that a compressor may hold back


def state(*, rehearse: bool) -> dict[str, str]:
    """What results belong to: the source, the GPU's name, and which tests were asked for."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "results" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    gpu = "none: a rehearsal" if rehearse else ask_driver("name")
    chosen = {"tests": os.environ["TESTS"]} if os.environ.get("TESTS") else {}
    return {"source": digest.hexdigest()[:16], "gpu": gpu, **chosen}


def ask_driver(*fields: str) -> str:
    """What nvidia-smi says of the first GPU; empty without one."""
    return first_line("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")


def first_line(*command: str) -> str:
    """The first line that a command prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


# Results ------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """A results file; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a results file, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, default=str))
    part.replace(path)


def take_results(folder: Path, out: Path, now: dict[str, str]) -> list[str]:
    """Copies what an earlier run found to `out`; a line about each file that is not gone on with.

    That is one of other source, another GPU or other tests, or one that `out` has already.
    """
    lines = []
    for path in sorted(folder.glob("*.json")):
        then, own = read(path).get("state"), out / path.name
        if not isinstance(then, dict):  # a table of launch parameters, which comes with `tune`
            lines += [] if read(path) else [f"{path} cannot be read"]
        elif then != now:
            lines.append(f"{path} is not gone on with: it is of {_difference(then, now)}")
        elif folder != out and read(own).get("state") == now:
            lines.append(f"{path} is not gone on with: OUT has its own")
        elif folder != out:
            shutil.copy(path, own)
            for table in folder.glob("sm[0-9]*.json") if path.stem == "tune" else ():
                shutil.copy(table, out / table.name)
    if folder != out and not any(folder.glob("*.json")) and not any(folder.glob("cache-*")):
        lines.append(f"FROM={folder} holds nothing to go on from")
    return lines


def _difference(then: dict[str, str], now: dict[str, str]) -> str:
    words = {"source": "other code", "gpu": "another GPU", "tests": "other TESTS"}
    return " and ".join(word for key, word in words.items() if then.get(key) != now.get(key))


# Compiled kernels ---------------------------------------------------------------------------------


def entries(cache: Path) -> list[Path]:
    """The folders of a cache, one for each compiled kernel; what is being written is none."""
    return [path for path in cache.iterdir() if path.is_dir() and path.name.isalnum()]


def pack(cache: Path, out: Path) -> int:
    """Writes a cache as out/cache-0.tar.gz and so on; the number of kernels left out."""
    waiting = sorted(entries(cache), key=_written, reverse=True)
    for number in range(ARCHIVES):
        target = out / f"cache-{number}.tar.gz"
        if waiting:
            waiting = _fill(target, waiting)
        else:
            target.unlink(missing_ok=True)
    return len(waiting)


def unpack(folder: Path, cache: Path) -> list[str]:
    """Adds the archives in a folder to a cache; a line about each that is broken."""
    cache.mkdir(parents=True, exist_ok=True)
    if not hasattr(tarfile, "data_filter"):
        return ["this Python is too old to unpack archives safely: kernels are compiled anew"]
    lines = []
    for archive in sorted(folder.glob("cache-*.tar.gz")):
        try:
            with TemporaryDirectory(dir=cache, prefix="tmp.") as fresh:
                with tarfile.open(archive) as tar:
                    tar.extractall(fresh, filter="data")
                for entry in entries(Path(fresh)):
                    _adopt(entry, cache / entry.name)
        except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, KeyError) as error:
            lines.append(f"{archive} is broken and was left out: {error}")
    return lines


def _written(entry: Path) -> float:
    return min((path.stat().st_mtime for path in entry.iterdir()), default=0)


def _fill(target: Path, waiting: list[Path]) -> list[Path]:
    """Packs what fits into one archive; the others."""
    part, left = target.with_suffix(".part"), []
    with part.open("wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        for entry in waiting:
            files = [path for path in entry.iterdir() if path.is_file() and path.name != "lock"]
            size = sum(path.stat().st_size for path in files)
            if file.tell() + size > ARCHIVE_BYTES - PENDING:
                left.append(entry)
                continue
            for path in files:
                tar.add(path, f"{entry.name}/{path.name}")
    part.replace(target)
    return left


def _adopt(entry: Path, target: Path) -> None:
    """Moves a kernel to its place in the cache, unless it is there."""
    if target.exists():
        return
    for group in entry.glob("__grp__*"):  # a list of files, which Triton writes as whole paths
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(target / name) for name in names}}))
    entry.rename(target)
