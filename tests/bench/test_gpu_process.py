"""Processes that end with the one that started them, and the lock of a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_process

# Starts the same again, so often, and says who the last one is.
CHAIN = """
import gpu_process, os, subprocess, sys, time
left = int(sys.argv[1])
if left:
    command = [sys.executable, *sys.orig_argv[1:-1], str(left - 1)]
    subprocess.Popen(command, preexec_fn=gpu_process.bound(group=left == 2))
else:
    print(os.getpid(), flush=True)
time.sleep(99)
"""


def test_what_is_bound_ends_with_the_one_that_started_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHAIN, "2"],
        env={**os.environ, "PYTHONPATH": str(Path(gpu_process.__file__).parent)},
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout is not None
        last = Path(f"/proc/{int(first.stdout.readline())}/stat")
        assert last.exists()
        first.kill()
    for _ in range(100):
        if not last.exists() or last.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the last of the chain is still there")


def test_a_folder_is_locked_while_its_file_is_open(tmp_path: Path) -> None:
    first = gpu_process.lock(tmp_path)
    assert first is not None
    assert gpu_process.lock(tmp_path) is None
    # Who inherits the file keeps the lock.
    sleeper = subprocess.Popen(["sleep", "99"], pass_fds=[first.fileno()])
    first.close()
    assert gpu_process.lock(tmp_path) is None
    sleeper.kill()
    sleeper.wait()
    again = gpu_process.lock(tmp_path)
    assert again is not None
    again.close()
