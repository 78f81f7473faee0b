"""What every test has: the packages (installed or not), a fixed seed, and poisoned memory.

And the choice of `--fast`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

_spec = importlib.util.spec_from_file_location(
    "checkout", Path(__file__).parent / "harness" / "checkout_packages.py"
)
assert _spec is not None
assert _spec.loader is not None
_checkout = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_checkout)
PACKAGES = ("multilora_kernels", "multilora")
_checkout.load_packages(*PACKAGES)

import pytest  # noqa: E402 - the two packages come first
import torch  # noqa: E402

from multilora_kernels import BufferPool  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

try:
    from hypothesis import settings
except ImportError:  # a machine that has only torch and pytest still runs the other tests
    pass
else:
    # No deadline: a busy machine is no failure. In CI the examples are the same in every run.
    settings.register_profile("multilora", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("multilora")


# `make test-fast` ---------------------------------------------------------------------------------

TESTS = Path(__file__).parent
LEFT_OUT = ("slow", "seconds", "gpu")
TOO_LONG = 3.0  # seconds of a test that should be marked, on a quiet machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help=f"the first case of every test that is none of: {', '.join(LEFT_OUT)}",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --fast: some test of every folder, or a UsageError that names the one without."""
    if not config.getoption("--fast"):
        return
    kept: dict[str, pytest.Item] = {}
    for item in items:
        if not any(item.get_closest_marker(name) for name in LEFT_OUT):
            kept.setdefault(item.nodeid.partition("[")[0], item)
    chosen = set(kept.values())
    empty = {_folder(item) for item in items} - {_folder(item) for item in chosen}
    if empty:
        raise pytest.UsageError(f"--fast leaves no test of {', '.join(sorted(empty))}")
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """With --fast: how many ran of each folder, and which should be marked."""
    if not config.getoption("--fast"):
        return
    calls = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call"
    ]
    counts = Counter(str(Path(report.nodeid.partition("::")[0]).parent) for report in calls)
    left = len(terminalreporter.stats.get("deselected", ()))
    terminalreporter.section("fast")
    terminalreporter.line(f"{len(calls)} tests ran, {left} were left out; of each folder:")
    terminalreporter.line(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for report in calls:
        if report.duration > TOO_LONG:
            terminalreporter.line(f"{report.duration:.0f} s, mark it `seconds`: {report.nodeid}")


def _folder(item: pytest.Item) -> str:
    return str(item.path.parent.relative_to(TESTS))


# What tests get -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`run_python(code, NAME=value)`: what `code` prints in a new interpreter.

    It finds the packages that this process found, and sees the environment plus NAME=value.
    """
    folder = tmp_path_factory.mktemp("packages")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        (folder / package).symlink_to(Path(spec.origin).parent)

    def run(code: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,  # which `-c` puts on the path
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _remains() -> Iterator[None]:
    """What a planted exception left is collected before the next test begins."""
    yield
    if failpoints := sys.modules.get("tests.harness.failpoints"):
        failpoints.collect_remains()


@pytest.fixture(scope="session", autouse=True)
def _poison() -> Iterator[None]:
    """Fills memory that our packages get with NaN, so that an unwritten value shows.

    It comes from `torch.empty`, or from a pool.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        take = BufferPool.empty
        patch.setattr(BufferPool, "empty", lambda *args: _fill(take(*args)))
        yield


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler cannot look at the caller
            return made
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] not in ("multilora", "multilora_kernels"):
            return made
        return _fill(made)

    return poisoned


@torch.no_grad()
def _fill(made: torch.Tensor) -> torch.Tensor:
    if made.dtype.is_floating_point or made.dtype.is_complex:
        return made.fill_(float("nan"))
    return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)
