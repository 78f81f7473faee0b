"""Build everything: tokenizer, base, the four experts (two at a time), evaluation and samples."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = [
    [["tokenizer.py"]],
    [["train_base.py"]],
    # Two processes of one thread each use two cores better than one process of two threads.
    [
        ["train_experts.py", "--threads", "1", "proposal", "job-analysis"],
        ["train_experts.py", "--threads", "1", "feedback", "profile-review"],
    ],
    # A second round from the saved adapters: one round proved too short.
    [
        ["train_experts.py", "--threads", "1", "--again", "proposal", "job-analysis"],
        ["train_experts.py", "--threads", "1", "--again", "feedback", "profile-review"],
    ],
    [["evaluate.py"]],
]


def run(stage: list[list[str]]) -> None:
    """Run the commands of one stage side by side; stop the build if one fails."""
    threads = {"OMP_NUM_THREADS": "1"} if len(stage) > 1 else {}
    started = [
        subprocess.Popen([sys.executable, *command], cwd=HERE, env={**os.environ, **threads})
        for command in stage
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(f"failed: {stage}")


def main() -> None:
    """Run every stage and report its time."""
    for stage in STAGES:
        start = time.time()
        run(stage)
        print(f"{stage[0][0]}: {time.time() - start:.0f}s", flush=True)


if __name__ == "__main__":
    main()
