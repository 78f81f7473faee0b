"""One OpenMP runtime in the process, torch's; a second one is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from multilora_kernels.cpu import native, openmp

if TYPE_CHECKING:
    from collections.abc import Callable

needs_cpp = pytest.mark.skipif(not native.HAS_CPP, reason="the C++ library is not built")
needs_gcc = pytest.mark.skipif(
    native.PATH is None or b"__kmpc_" in native.PATH.read_bytes(),
    reason="the C++ library is not built, or by clang, whose code needs LLVM's runtime",
)


# Runtimes -----------------------------------------------------------------------------------------


@pytest.mark.seconds
@needs_gcc
def test_the_process_has_torchs_runtime_alone(run_python: Callable[..., str]) -> None:
    paths = run_python(
        "import torch\n"
        "from multilora_kernels.cpu import native, openmp\n"
        "torch.ones(1000, 1000).sum()  # starts torch's threads\n"
        "print(*openmp.runtimes(), sep='\\n')"
    ).splitlines()
    assert len(paths) == 1
    assert "torch" in Path(paths[0]).parent.parts[-2]


@needs_gcc
def test_the_library_is_linked_with_no_runtime() -> None:
    """Its name in the file would be a dependency, on the system's beside one that torch renamed."""
    assert native.PATH is not None
    assert b"libgomp.so" not in native.PATH.read_bytes()


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("libgomp.so.1", True),
        ("libgomp-a34b3233.so.1", True),
        ("libomp.so", True),
        ("libomp-14.so.5", True),
        ("libiomp5.so", True),
        ("libgomp-plugin-nvptx.so.1", False),
        ("libompd.so", False),
        ("libomptarget.so", False),
        ("libm.so.6", False),
    ],
)
def test_a_runtime_is_known_by_its_name(
    name: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/opt/some folder/{name}"
    line = f"7f00-7f01 r-xp 00000000 08:01 42                     {path}\n7f01-7f02 rw-p 0 0:0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line * 2)
    assert openmp.runtimes() == ([path] if counts else [])


def second_runtime() -> str | None:
    """LLVM's or Intel's, as Debian's libomp-dev and PyPI's intel-openmp install them."""
    folders = [Path(sys.prefix, "lib"), *Path("/usr/lib").glob("llvm-*/lib"), Path("/usr/lib")]
    for folder in folders:
        for path in sorted(folder.glob("lib*omp*.so*")):
            if path.name in ("libiomp5.so", "libomp.so.5", "libomp.so"):
                return str(path.resolve())
    return None


@needs_cpp
def test_a_second_runtime_is_named_once(run_python: Callable[..., str]) -> None:
    second = second_runtime()
    if second is None:
        pytest.skip("no LLVM or Intel OpenMP runtime is installed")
    out = run_python(
        "import ctypes, logging, sys\n"
        f"ctypes.CDLL({second!r})\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "import torch\n"
        "import multilora_kernels as mk\n"
        "x = torch.randn(64, 512)\n"
        "assert torch.allclose(mk.silu_mul(x), mk.reference.silu_mul(x), atol=1e-5)\n"
        "print(*mk.openmp.runtimes(), sep='\\n')"
    ).splitlines()
    warnings = [line for line in out if line.startswith("WARNING")]
    assert len(warnings) == 1
    paths = out[-2:]
    assert second in paths
    assert all(path in warnings[0] for path in paths)
