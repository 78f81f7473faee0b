"""What the wheel and the source archive hold, and that the C++ library is optional.

Every build runs in a fresh copy of the tree: a file left by another build would hide a fault. They
use this environment's setuptools, without isolation, and need no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = ("build", "dist", "*.egg-info", "*.so", "__pycache__", ".*")
PACKAGES = {"multilora": ROOT / "multilora", "multilora_kernels": ROOT / "kernels"}
CPU_LIBRARY = "multilora_kernels/_cpu.abi3.so"
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def copy_tree(to: Path) -> Path:
    ignore = shutil.ignore_patterns(*NOT_SOURCE)
    return shutil.copytree(ROOT, to / "multilora", ignore=ignore)


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def build_wheel(tmp_path: Path, **env: str) -> Path:
    """Builds a wheel of a fresh copy; AssertionError with the build's output if that fails."""
    out = tmp_path / "wheels"
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-v", "-w", out)
    env.setdefault("MULTILORA_BUILD_CPP", "")
    done = run(
        sys.executable, "-m", "pip", "wheel", *options, copy_tree(tmp_path), cwd=tmp_path, **env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def quick_compiler(folder: Path) -> dict[str, str]:
    """The environment of builds that do not optimise: what is asked here does not depend on it."""
    compiler = folder / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    return {"CC": str(compiler), "CXX": str(compiler)}


def install(wheel: Path, target: Path) -> None:
    options = ("--no-deps", "--no-index", "--target", target)
    done = run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target.parent)
    assert done.returncode == 0, done.stderr


def import_from(target: Path, code: str) -> list[str]:
    """Runs `code` where `target` comes first on the path; the words that it prints."""
    done = run(sys.executable, "-c", code, cwd=target)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def names_in(wheel: Path) -> set[str]:
    """The files of a wheel without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if not n.partition("/")[0].endswith(".dist-info")}


def source_files() -> set[str]:
    """The files that every wheel must hold: modules, markers and assets, under installed names."""
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(folder, **quick_compiler(folder))


@needs_compiler
def test_the_wheel_holds_the_packages_their_assets_and_the_library(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    assert names_in(wheel) == source_files() | {CPU_LIBRARY}
    assert {"multilora/py.typed", "multilora_kernels/py.typed"} <= names_in(wheel)


@needs_compiler
def test_the_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install(wheel, target)
    code = (
        "import sys, multilora_kernels, multilora_kernels.cpu.native as native\n"
        "print('multilora' in sys.modules, native.HAS_CPP, multilora_kernels.__file__)\n"
        "import multilora; print(multilora.__version__, multilora.__file__)"
    )
    alone, cpp, kernels_file, version, file = import_from(target, code)
    assert (alone, cpp) == ("False", "True")
    assert Path(kernels_file) == target / "multilora_kernels" / "__init__.py"
    assert Path(file) == target / "multilora" / "__init__.py"
    assert wheel.name.startswith(f"multilora-{version}-")
    (metadata,) = target.glob("multilora-*.dist-info")
    assert (
        "multilora = multilora.entrypoints.cli:main" in (metadata / "entry_points.txt").read_text()
    )
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()


def test_the_library_can_be_left_out(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, MULTILORA_BUILD_CPP="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert names_in(wheel) == source_files()


def test_without_a_compiler_it_installs_and_runs(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, **NO_COMPILER)
    assert CPU_LIBRARY not in names_in(wheel)
    install(wheel, tmp_path / "site")
    code = "import multilora_kernels.cpu.native as native; print(native.HAS_CPP)"
    assert import_from(tmp_path / "site", code) == ["False"]


def test_without_a_compiler_a_strict_build_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="/bin/false"):
        build_wheel(tmp_path, MULTILORA_BUILD_CPP="1", **NO_COMPILER)


def test_an_unknown_wish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="must be empty, 0 or 1, not 'yes'"):
        build_wheel(tmp_path, MULTILORA_BUILD_CPP="yes")


def test_the_source_archive_is_complete(tmp_path: Path) -> None:
    """Even if it is made without a compiler: csrc must not depend on who makes the archive."""
    tree = copy_tree(tmp_path)
    options = ("--sdist", "--no-isolation", "--outdir", tmp_path)
    wish = {"MULTILORA_BUILD_CPP": "0"}
    done = run(sys.executable, "-m", "build", *options, tree, cwd=tmp_path, **wish)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {n.partition("/")[2] for n in tar.getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for top in ("multilora", "kernels", "csrc", "tests", "bench", "docs", "examples")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    wanted |= {"pyproject.toml", "setup.py", "constraints.txt", "Makefile", "LICENSE", "README.md"}
    assert not wanted - held


@pytest.mark.slow
@needs_compiler
def test_an_editable_install_follows_the_sources(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    done = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # The new environment borrows torch and setuptools from this one.
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-e", tree)
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    env = {"MULTILORA_BUILD_CPP": "1", **quick_compiler(tmp_path)}
    done = run(*pip, *options, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (tree / "kernels" / "new.py").write_text("ANSWER = 42\n")
    code = (
        "import multilora_kernels.new, multilora_kernels.cpu.native as native, multilora\n"
        "print(multilora_kernels.new.ANSWER, native.HAS_CPP, multilora.__file__)"
    )
    done = run(python, "-c", code, cwd=site)  # not where a folder "multilora" lies
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["42", "True", str(tree / "multilora" / "__init__.py")]
