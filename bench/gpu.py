"""Everything that needs a GPU, in one command and at most nine minutes: `make gpu`.

    PARTS=tests,kernels,engine   which parts (default: all)
    OUT=build/gpu                where the results go, one JSON file for each part
    MINUTES=9                    for all parts together (30 in a rehearsal)

Runs from a bare checkout with this machine's own Python; nothing is installed and no network is
used. Each part is a process of its own, so that one that fails or takes too long costs no other,
and writes what it has as it goes. `--rehearse` does the same without a GPU, on tiny shapes: see
`tests/rehearsal.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REHEARSAL = {"TRITON_INTERPRET": "1", "MULTILORA_TEST_DEVICE": "rehearsal"}
SHARES = {"tests": 0.35, "kernels": 0.3, "engine": 0.35}  # of the time that is left to them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, without a GPU")
    args = parser.parse_args()
    parts = os.environ.get("PARTS", ",".join(SHARES)).split(",")
    unknown = [part for part in parts if part not in SHARES]
    if unknown:
        print(f"unknown part {unknown[0]!r}; PARTS may name {', '.join(SHARES)}", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT", "build/gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * float(os.environ.get("MINUTES", 30 if args.rehearse else 9))
    failed = []
    for i, part in enumerate(parts):
        left = end - time.monotonic()
        seconds = left * SHARES[part] / sum(SHARES[p] for p in parts[i:])
        code = run_part(part, out, seconds, rehearse=args.rehearse)
        failed += [part] if code else []
        print(
            f"{part}: {'failed' if code else 'done'}; {summary(out / f'{part}.json')}", flush=True
        )
    return 1 if failed else 0


def run_part(part: str, out: Path, seconds: float, *, rehearse: bool) -> int:
    """Runs a part in a process of its own; its exit status, 124 when it was ended for time."""
    command = [sys.executable, str(HERE / f"gpu_{part}.py"), "--out", str(out / f"{part}.json")]
    command += ["--seconds", str(int(seconds)), *(["--rehearse"] if rehearse else [])]
    environment = {**os.environ, **(REHEARSAL if rehearse else {})}
    print(f"{part}: {int(seconds)} s at most", flush=True)
    grace = 20  # a part looks at the clock between two cases
    try:
        done = subprocess.run(command, check=False, timeout=seconds + grace, env=environment)
    except subprocess.TimeoutExpired:
        return 124
    return done.returncode


def summary(path: Path) -> str:
    """One line about a part's results."""
    if not path.is_file():
        return "no results"
    found: dict[str, Any] = json.loads(path.read_text())
    cut = f", cut short: {found['left_out']} left out" if found.get("left_out") else ""
    return f"{len(found['results'])} results in {path.name}{cut}"


if __name__ == "__main__":
    sys.exit(main())
