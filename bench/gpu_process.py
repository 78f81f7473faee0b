"""Processes that end with the one that started them, and one run at a time in a folder."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

PR_SET_PDEATHSIG = 1  # of Linux's prctl
LIBC = ctypes.CDLL(None)  # loaded here: little may happen between fork and exec


def bound(*, group: bool = False) -> Callable[[], None]:
    """For Popen's preexec_fn: the new process is killed when this one ends, however that does.

    With `group` it leads a group of its own, so that what it starts can be ended with it.
    """
    parent = os.getpid()

    def bind() -> None:
        if group:
            os.setpgrp()
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended in the meantime
            os._exit(1)

    return bind


def end_group(leader: int) -> None:
    """Kills a process with all of its group."""
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(leader, signal.SIGKILL)


def lock(folder: Path) -> TextIO | None:
    """A file that locks a folder while anybody has it open; None if another run does."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file
