"""Everything that needs a GPU, in one command and at most nine minutes: `make gpu`.

    PARTS=smoke,tests,...   which parts (default: all), in this order
    OUT=build/gpu           where the results go, one JSON file for each part
    MINUTES=9               for all parts together (120 in a rehearsal)
    FROM=folder             what an earlier run left, to go on from (default: OUT)
    TESTS=expression        of the tests only those, as for pytest's -k

Runs from a bare checkout with this machine's own Python; nothing is installed and no network is
used. Each part is a process of its own, so that one that fails or takes too long costs no other,
and writes what it has as it goes. A part whose results are complete is left as it is, unless PARTS
names it; one that was cut short goes on with what it left out. `--rehearse` does the same without
a GPU, on tiny shapes: see `tests/harness/gpu_rehearsal.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_files
import gpu_preflight
import gpu_process

HERE = Path(__file__).resolve().parent
REHEARSAL = {"TRITON_INTERPRET": "1", "MULTILORA_TEST_DEVICE": "rehearsal"}
# In the order of what a minute teaches; the shares of the time that is left to them are the
# seconds of a run of nine minutes.
SHARES = {"smoke": 45, "tests": 130, "profile": 105, "kernels": 90, "engine": 110, "tune": 60}
ENDED = 124  # the exit status of a part that was ended for time
NOT_PACKED = "tune"  # compiles hundreds of kernels that lose
LEAST = 5  # seconds: with less a part does not begin
GRACE = 20  # seconds; a part looks at the clock between two cases


class Refused(Exception):
    """Why a run does not begin, in one line."""


@dataclass(frozen=True)
class Settings:
    """What was asked for, as the head of this file says."""

    asked: tuple[str, ...]
    out: Path
    start: Path
    minutes: float
    rehearse: bool


def main() -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, without a GPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part is ended, too
    try:
        wanted = settings(rehearse=parser.parse_args().rehearse)
        if why := gpu_preflight.refusal(rehearse=wanted.rehearse):
            raise Refused(why)
        return run(wanted, begin)
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 2


def settings(*, rehearse: bool) -> Settings:
    """What the environment says."""
    asked = [part.strip() for part in os.environ.get("PARTS", "").split(",") if part.strip()]
    for part in asked:
        if part not in SHARES:
            raise Refused(f"unknown part {part!r}; PARTS may name {', '.join(SHARES)}")
    out = Path(os.environ.get("OUT", "build/gpu")).resolve()
    start = Path(os.environ.get("FROM", out)).resolve()
    if start != out and not start.is_dir():
        raise Refused(f"FROM={start} is no folder")
    given = os.environ.get("MINUTES", "120" if rehearse else "9")
    try:
        minutes = float(given)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes <= 10_000:
        raise Refused(f"MINUTES={given!r} is no number of minutes")
    return Settings(tuple(asked), out, start, minutes, rehearse)


def run(wanted: Settings, begin: float) -> int:
    """Runs the parts in a folder that is nobody else's meanwhile; the exit status."""
    with ExitStack() as stack:
        try:
            wanted.out.mkdir(parents=True, exist_ok=True)
            lock = gpu_process.lock(wanted.out)
            if lock is None:
                raise Refused(f"another run is writing to OUT={wanted.out}")
            stack.enter_context(lock)
            made = Run(wanted, begin + 60 * wanted.minutes, lock.fileno())
        except OSError as error:
            raise Refused(f"OUT or TRITON_CACHE_DIR cannot be written: {error}") from error
        return made.parts(wanted.asked)


class Run:
    """One run: what it writes to, what it goes on from, until when."""

    def __init__(self, wanted: Settings, end: float, lock: int) -> None:
        self.out, self.end, self.rehearse = wanted.out, end, wanted.rehearse
        self.lock = lock  # the descriptor of the file that locks `out`
        self.state = gpu_files.state(rehearse=wanted.rehearse)
        lines = gpu_files.take_results(wanted.start, wanted.out, self.state)
        default = gpu_files.ROOT / "build" / "triton-cache"
        self.cache = Path(os.environ.get("TRITON_CACHE_DIR", default)).resolve()
        for line in (*lines, *gpu_files.unpack(wanted.start, self.cache)):
            print(line, flush=True)
        self.packed = 0

    def parts(self, asked: Sequence[str]) -> int:
        """Runs those asked for, or all; the exit status."""
        lost, line = gpu_preflight.spared()
        if line:
            print(line, flush=True)
        wanted = [part for part in SHARES if part in asked or not asked]
        left = [part for part in wanted if part == "tests" and "pytest" in lost]
        wanted = [part for part in wanted if part not in left]
        before = [part for part in wanted if self.is_complete(part) and part not in asked]
        waiting = [part for part in wanted if part not in before]
        wrong: list[str] = []
        no_time: list[str] = []
        for part in wanted:
            if part in before:
                code = self.content(part)["exit_status"]
            else:
                seconds = self.share(waiting)
                waiting.remove(part)
                if seconds < LEAST:
                    no_time.append(part)
                    continue
                code = self.one(part, seconds)
            wrong += [part] if code else []
            print(f"{part}: {self.summary(part, code)}{' (before)' * (part in before)}", flush=True)
            if part == "smoke" and code not in (0, ENDED) and waiting and not asked:
                print(f"what is wrong is not measured; all the same: PARTS={','.join(waiting)}")
                left += waiting
                break
        ran = len(wanted) > len(no_time)
        line = f"WRONG: {', '.join(wrong)}" if wrong else "all right" if ran else "nothing ran"
        line += f"; no time for {', '.join(no_time)}" if no_time else ""
        print(line + (f"; left out: {', '.join(left)}" if left else ""), flush=True)
        return 0 if ran and not wrong else 1

    def share(self, waiting: list[str]) -> float:
        """The seconds of the first part that waits; in a rehearsal all that are left."""
        left = self.end - time.monotonic()
        all_shares = sum(SHARES[part] for part in waiting)
        return left if self.rehearse else left * SHARES[waiting[0]] / all_shares

    def one(self, part: str, seconds: float) -> int:
        """Runs a part and notes how it ended; its exit status."""
        path, found = self.path(part), self.content(part)
        if found.get("state") != self.state or found.get("complete"):
            path.unlink(missing_ok=True)  # of other code, or asked for again: from the start
            found = {}
        code = self.process(part, seconds)
        content = self.content(part)
        if content != found:  # otherwise it did not come so far as to write
            ended = code in (0, 1) and "crashed" not in content and not content["left_out"]
            gpu_files.write(path, {**content, "exit_status": code, "complete": ended})
        if part != NOT_PACKED:
            self.pack()
        return code

    def process(self, part: str, seconds: float) -> int:
        """A part in a process of its own; its exit status, or ENDED."""
        command = [sys.executable, str(HERE / f"gpu_{part}.py"), "--out", str(self.path(part))]
        command += ["--seconds", str(int(seconds)), *(["--rehearse"] if self.rehearse else [])]
        kernels = {"TRITON_CACHE_DIR": str(self.cache), "TRITON_STORE_BINARY_ONLY": "1"}
        environment = {**os.environ, **kernels, **(REHEARSAL if self.rehearse else {})}
        print(f"{part}: {int(seconds)} s at most", flush=True)
        # A process group: what the part started ends with it. It ends with this process, and keeps
        # the lock until then.
        running = subprocess.Popen(
            command,
            env=environment,
            preexec_fn=gpu_process.bound(group=True),
            pass_fds=[self.lock],
        )
        try:
            return running.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            return ENDED
        finally:
            gpu_process.end_group(running.pid)
            running.wait()

    def pack(self) -> None:
        """Puts the compiled kernels beside the results, if there are new ones."""
        count = len(gpu_files.entries(self.cache))
        if count != self.packed:
            left = gpu_files.pack(self.cache, self.out)
            print(f"kernels: {count - left} packed, {left} left out", flush=True)
        self.packed = count

    def path(self, part: str) -> Path:
        return self.out / f"{part}.json"

    def content(self, part: str) -> dict[str, Any]:
        return gpu_files.read(self.path(part))

    def is_complete(self, part: str) -> bool:
        """Whether there are results of this source and GPU, with nothing left out."""
        found = self.content(part)
        return found.get("state") == self.state and bool(found.get("complete"))

    def summary(self, part: str, code: int) -> str:
        """One line: how many results, what is wrong or slow, what there was no time for."""
        found = self.content(part)
        words = {0: "done", 1: "failed", ENDED: "ended for time"}
        line = words.get(code, f"failed with status {code}")
        if not found:
            return f"{line}; no results"
        line += f"; {len(found['results'])} results in {part}.json"
        if failures := found.get("failures"):
            first = "; ".join(short(why) for why in failures[:3])
            more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
            line += f"; wrong: {first}{more}"
        if slow := found.get("slow"):
            line += f"; {len(slow)} slow"
        left = found["left_out"]
        return line + (f"; cut short, {left} left out" if left else "")


def short(why: str) -> str:
    """The first line of a reason, cut; where that only announces what follows, the last, too."""
    first, *rest = why.strip().splitlines() or [""]
    announces = first.rstrip().endswith(":") or "Traceback" in first
    line = f"{first.rstrip()} {rest[-1].strip()}" if announces and rest else first
    return line if len(line) <= 240 else f"{line[:237]}..."


if __name__ == "__main__":
    sys.exit(main())
