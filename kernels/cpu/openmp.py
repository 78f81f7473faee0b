"""The OpenMP runtimes of this process: one is right, and that is torch's.

Built by g++, our library is linked with none. The linker binds its calls to what is there already:
the libgomp that `import torch` brought, whatever its file is called. Two runtimes keep a pool of
threads each, and while both are at work their threads take the cores from one another.
"""

from __future__ import annotations

import ctypes
import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

# GNU's, LLVM's, Intel's; wheels put a hash behind the name. Plugins and tools are no runtimes.
_NAME = re.compile(r"lib(gomp|omp|iomp5)(-(?!plugin)[^/]*)?\.so")


def provide() -> None:
    """Loads the system's libgomp where torch brought no OpenMP; OSError if there is none."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that this process has loaded; empty where there is no /proc."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    mapped = [line.split(maxsplit=5)[5:] for line in maps.splitlines()]
    paths = dict.fromkeys(path[0] for path in mapped if path)
    return [path for path in paths if _NAME.match(Path(path).name)]


def warn_of_many() -> None:
    """Says so if there is more than one."""
    found = runtimes()
    if len(found) > 1:
        logger.warning(
            "this process has %d OpenMP runtimes, %s: their threads compete for the cores. Another "
            "package, or a C++ library built by clang, brought one; it may make every step slower",
            len(found),
            " and ".join(found),
        )
