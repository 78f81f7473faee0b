"""Build everything: tokenizer, base, the four experts (two at a time), evaluation and samples.

`--small` takes a few steps of each stage: it proves that the stages fit together, no more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "multilora" / "assets" / "uma"
# Two processes of one thread each use two cores better than one process of two threads. The rounds
# of an expert follow each other; how many there are is in RECIPES of train_experts.py.
SIDES = (
    [("proposal", 2), ("job-analysis", 3)],
    [("feedback", 4), ("profile-review", 3)],
)


def stages(assets: Path, small: bool) -> list[list[list[list[str]]]]:
    """The stages in order; each is a list of sides that run at once, a side a list of commands."""
    base, adapters = str(assets / "base"), str(assets / "adapters")
    steps = ["--steps", "3"] if small else []
    train = ["train_experts.py", "--threads", "1", "--base", base, "--out", adapters, *steps]
    rounds = [
        [
            [*train, "--round", str(number + 1), expert]
            for expert, count in side
            for number in range(count)
        ]
        for side in SIDES
    ]
    measure = ["evaluate.py", "--base", base, "--adapters", adapters]
    measure += ["--out", str(assets / "samples.json"), *(["--count", "2"] if small else [])]
    return [
        [[["tokenizer.py", "--out", base]]],
        [[["train_base.py", "--out", base, *steps]]],
        rounds,
        [[measure]],
    ]


def run(stage: list[list[list[str]]]) -> None:
    """Runs the sides of one stage at once; stops the build if a command fails."""
    alone = {"OMP_NUM_THREADS": "1"} if len(stage) > 1 else {}
    waiting = [list(side) for side in stage]
    running: list[subprocess.Popen[bytes] | None] = [None] * len(stage)
    while any(waiting) or any(running):
        for i, process in enumerate(running):
            if process is not None and process.poll() is not None:
                if process.returncode:
                    sys.exit(f"failed: {process.args}")
                running[i] = None
            if running[i] is None and waiting[i]:
                command = [sys.executable, *waiting[i].pop(0)]
                running[i] = subprocess.Popen(command, cwd=HERE, env={**os.environ, **alone})
        time.sleep(0.1)


def main() -> None:
    """Runs every stage and reports its time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder to write")
    parser.add_argument("--small", action="store_true", help="a few steps; needs --assets")
    args = parser.parse_args()
    assets = args.assets.resolve()
    if args.small and assets == ASSETS:
        parser.error("--small would overwrite the shipped experts; give --assets FOLDER")
    for stage in stages(assets, args.small):
        start = time.time()
        run(stage)
        print(f"{stage[0][0][0]}: {time.time() - start:.0f}s", flush=True)


if __name__ == "__main__":
    main()
