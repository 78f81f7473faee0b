"""What `bench/gpu.py` asks before it begins: are the packages there, and a GPU that answers?

Plain Python, so that it runs where the rest cannot. By itself, `python bench/gpu_preflight.py`
asks for the GPU alone: torch is loaded in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from checkout import load_checkout

NEEDED = (
    *("torch", "triton", "numpy", "safetensors", "tiktoken", "tokenizers", "sentencepiece"),
    *("jinja2", "regex"),
)
PEFT = "transformers with PEFT in part engine"
SPARED = {"transformers": PEFT, "peft": PEFT, "pytest": "part tests"}  # and what needs them
PATIENCE = 120  # seconds for the GPU's first answer


def missing(names: tuple[str, ...]) -> list[str]:
    """Those packages that this Python does not find."""
    return [name for name in names if find_spec(name) is None]


def spared() -> tuple[list[str], str]:
    """Packages that are missing and may be, and the line that says what is left out for it."""
    lost = missing(tuple(SPARED))
    parts = dict.fromkeys(SPARED[name] for name in lost)
    return lost, f"missing: {', '.join(lost)}; left out: {', '.join(parts)}" if lost else ""


def refusal(*, rehearse: bool) -> str:
    """Why nothing can run, in one line; empty if something can."""
    if lost := missing((*NEEDED, "pytest") if rehearse else NEEDED):
        return f"missing in {sys.executable}: {', '.join(lost)}; no part runs without"
    return "" if rehearse else ask_gpu([sys.executable, str(Path(__file__).resolve())])


def ask_gpu(command: list[str]) -> str:
    """Why no GPU can be used, in one line; empty if one answers."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"no GPU: it did not answer within {PATIENCE} s"
    said = (done.stderr.strip() or f"status {done.returncode}").splitlines()
    return f"no GPU: {said[-1]}" if done.returncode else ""


def main() -> int:
    try:
        load_checkout()
        import torch

        from multilora.device.select import open_device

        device = open_device("cuda")
        torch.ones(1, device=device.torch).item()
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        print(first or type(error).__name__, file=sys.stderr)
        return 2
    print(device.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
