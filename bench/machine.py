"""What the numbers were measured on, and at which commit."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Of the flags of /proc/cpuinfo, those that decide which kernels run.
TELLING = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """The processor, the system and the commit, as plain data."""
    facts = _lscpu()
    return {
        "cpu": facts.get("Model name", platform.processor()),
        "family": f"{facts.get('CPU family', '?')}/{facts.get('Model', '?')}",
        "cores": int(facts.get("CPU(s)", 0)),
        "l3": facts.get("L3 cache", "?"),
        "flags": [flag for flag in TELLING if flag in facts.get("Flags", "").split()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def save(path: Path, results: list[Any], **facts: Any) -> None:
    """Writes results as JSON, with the machine, torch's version and what else is to be known."""
    content = {"machine": machine(), "torch": version("torch"), **facts, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    git = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def _lscpu() -> dict[str, str]:
    try:
        done = subprocess.run(
            ["lscpu"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    pairs = (line.partition(":") for line in done.stdout.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
