"""Only what pyproject.toml cannot say: the optional C++ library.

MULTILORA_BUILD_CPP: "" builds it if a compiler works, "0" leaves it out, "1" fails without it.
"""

import os
import sysconfig
from glob import glob

from setuptools import Extension, setup

CHOICES = ("", "0", "1")

wish = os.environ.get("MULTILORA_BUILD_CPP", "")
if wish not in CHOICES:
    raise SystemExit(f"MULTILORA_BUILD_CPP must be empty, 0 or 1, not {wish!r}")

# What g++ makes of OpenMP binds to torch's libgomp when it is loaded (kernels/openmp.py): linking
# would bring the system's beside it. clang's code needs LLVM's runtime.
compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or ""

cpu = Extension(
    "multilora_kernels._cpu",
    sources=[
        "csrc/abi.cpp",
        "csrc/avx2.cpp",
        "csrc/avx512.cpp",
        "csrc/avx512_bf16.cpp",
        "csrc/dispatch.cpp",
        "csrc/generic.cpp",
        "csrc/token_mask.cpp",
    ],
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
    # No -ffast-math: results are bit-exact. No -march=native: a wheel serves every x86-64 or arm64.
    # -ffp-contract=fast: ISO mode would leave multiply-adds apart where the machine has FMA.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",  # Python's own flags ask for debug information: six times the file
        "-fno-exceptions",
        "-fno-rtti",
        "-ffp-contract=fast",
        "-fopenmp",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
    ],
    extra_link_args=["-fopenmp"] if "clang" in compiler else [],
    py_limited_api=True,  # it uses no Python at all: one file serves every version
    optional=wish != "1",
)

setup(
    ext_modules=[] if wish == "0" else [cpu],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
