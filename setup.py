"""Only what pyproject.toml cannot say: the optional C++ library.

MULTILORA_BUILD_CPP: "" builds it if a compiler works, "0" leaves it out, "1" fails without it.
"""

import os
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

CHOICES = ("", "0", "1")

wish = os.environ.get("MULTILORA_BUILD_CPP", "")
if wish not in CHOICES:
    raise SystemExit(f"MULTILORA_BUILD_CPP must be empty, 0 or 1, not {wish!r}")

# What g++ makes of OpenMP binds to torch's libgomp when loaded (kernels/cpu/openmp.py): linking
# would bring the system's beside it. clang's code needs LLVM's runtime.
compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or ""

flags = [line for line in Path("csrc/flags.txt").read_text().splitlines() if line.startswith("-")]

cpu = Extension(
    "multilora_kernels._cpu",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc") + ["csrc/flags.txt"]),
    # -g0: Python's own flags ask for debug information, six times the file.
    extra_compile_args=[*flags, "-O3", "-g0"],
    extra_link_args=["-fopenmp"] if "clang" in compiler else [],
    py_limited_api=True,  # it uses no Python at all: one file serves every version
    optional=wish != "1",
)

setup(
    ext_modules=[] if wish == "0" else [cpu],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
