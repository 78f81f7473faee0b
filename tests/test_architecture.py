"""The rules of the house, read from the source with `ast`: floors, imports, sizes.

A request walks down the floors and its tokens come back as return values, so a file imports only
from lower floors, or from its own floor in one direction.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"multilora": ROOT / "multilora", "multilora_kernels": ROOT / "kernels"}

# The floor of every module of multilora; `multilora_kernels` is floor 0. A name that ends in ".*"
# stands for all modules of that subpackage. A subpackage's own file is as low as its lowest module,
# because importing any of them runs it.
FLOORS = {
    # words
    "multilora.errors": 1,
    "multilora.config": 1,
    "multilora.sites": 1,
    "multilora.quant": 1,
    "multilora.request": 1,
    # the machine
    "multilora.recording": 2,
    "multilora.device": 2,
    "multilora.staging": 2,
    # at rest
    "multilora.dummy": 2,
    "multilora.adapters": 2,
    "multilora.adapters.files": 2,
    "multilora.adapters.format": 2,
    "multilora.adapters.peft_config": 2,
    "multilora.adapters.targets": 2,
    "multilora.adapters.weights": 2,
    "multilora.checkpoint": 2,
    "multilora.tokenizer": 2,
    "multilora.detokenizer": 2,
    "multilora.chat_template": 2,
    "multilora.template_sandbox": 2,
    "multilora.tokenizer_settings": 2,
    "multilora.vocabulary": 2,
    "multilora.hf_vocabulary": 2,
    # memory
    "multilora.blocks": 3,
    "multilora.memory": 3,
    "multilora.limits": 3,
    "multilora.kv_cache": 3,
    "multilora.adapters.pages": 3,
    "multilora.adapters.store": 3,
    # model
    "multilora.batch": 4,
    "multilora.layers": 4,
    "multilora.models": 4,
    "multilora.models.*": 4,
    # decide, compute
    "multilora.plan": 5,
    "multilora.policies": 5,
    "multilora.scheduler": 5,
    "multilora.sampler": 5,
    "multilora.batch_sampler": 5,
    "multilora.rows": 5,
    "multilora.inputs": 5,
    "multilora.graphs": 5,
    "multilora.kv_scales": 5,
    "multilora.runner": 5,
    # engine
    "multilora.answers": 6,
    "multilora.startup": 6,
    "multilora.engine": 6,
    # doors
    "multilora.llm": 7,
    "multilora.demo": 7,
    # the public names, and the command that tells their version
    "multilora": 8,
    "multilora.cli": 8,
}

# Decisions are pure: these run in microseconds, in tests and in a simulator.
WITHOUT_TORCH = (
    "multilora.errors",
    "multilora.config",
    "multilora.sites",
    "multilora.quant",
    "multilora.request",
    "multilora.blocks",
    "multilora.policies",
    "multilora.scheduler",
)
MAY_PRINT = ("multilora.cli",)
MAY_LOAD_PICKLES = ("multilora.checkpoint",)  # Meta's .pth files, with weights_only=True
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 400


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module
    is_package: bool


def read_modules() -> dict[str, Module]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join((package, *(parts[:-1] if is_package else parts)))
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            found[name] = Module(name, path, tree, is_package)
    return found


MODULES = read_modules()
RUNTIME = [m for m in MODULES.values() if m.name.split(".")[0] == "multilora"]
KERNELS = [m for m in MODULES.values() if m.name.split(".")[0] == "multilora_kernels"]
all_modules = pytest.mark.parametrize("module", MODULES.values(), ids=lambda m: m.name)
runtime_modules = pytest.mark.parametrize("module", RUNTIME, ids=lambda m: m.name)
kernel_modules = pytest.mark.parametrize("module", KERNELS, ids=lambda m: m.name)


# Reading the source -------------------------------------------------------------------------------


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def running(node: ast.AST) -> list[ast.AST]:
    """All nodes below `node`, except what only a type checker reads."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                found += [other, *running(other)]
        else:
            found += [child, *running(child)]
    return found


def import_targets(module: Module, node: ast.AST) -> set[str]:
    """Full names of the modules that an import statement loads; empty for other nodes."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = node.module or ""
    if node.level:
        package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, *([node.module] if node.module else [])])
    # `from package import name` loads package.name where that is a module, and the package.
    full = {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in full if name in MODULES} | (
        {base} if not full <= set(MODULES) else set()
    )


@cache
def imports_of(name: str) -> frozenset[str]:
    """What module `name` imports at run time, at the top or inside a function."""
    module = MODULES[name]
    return frozenset(
        target for node in running(module.tree) for target in import_targets(module, node)
    )


def calls_of(module: Module) -> list[tuple[str, int]]:
    """(dotted name of the called, line) of every call in the module."""
    return [
        (ast.unparse(node.func), node.lineno)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
    ]


def floor_of(name: str) -> int | None:
    if name.split(".")[0] == "multilora_kernels":
        return 0
    return FLOORS.get(name, FLOORS.get(name.rpartition(".")[0] + ".*"))


# Floors -------------------------------------------------------------------------------------------


@runtime_modules
def test_every_module_has_a_floor(module: Module) -> None:
    assert floor_of(module.name) is not None, (
        f"{module.path.relative_to(ROOT)} is on no floor. Add {module.name!r} to FLOORS in "
        "tests/test_architecture.py: the floor above the highest module it imports, or the same "
        "one if no circle comes of it; docs/architecture.md says what each floor is for."
    )


@runtime_modules
def test_imports_go_down(module: Module) -> None:
    own = floor_of(module.name)
    if own is None:
        pytest.fail(f"{module.name} is on no floor")
    for target in imports_of(module.name):
        floor = floor_of(target) if target in MODULES else None
        assert floor is None or floor <= own, (
            f"{module.name} (floor {own}) imports {target} (floor {floor}): a file imports only "
            "from its own floor or lower ones. Return the value instead, or move the code down."
        )


def test_no_circle_of_imports() -> None:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"imports in a circle: {' -> '.join([*path, name])}"
        if name in done:
            return
        for target in sorted(imports_of(name) & MODULES.keys()):
            visit(target, [*path, name])
        done.add(name)

    for name in MODULES:
        visit(name, [])


@kernel_modules
def test_kernels_know_nothing_of_the_runtime(module: Module) -> None:
    """Also that they import each other relatively, so that the folder works under any name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        for target in import_targets(module, node):
            assert target.split(".")[0] not in ("multilora", "multilora_kernels", "kernels"), (
                f"{module.path.relative_to(ROOT)} imports {target}: kernels know tensors only, "
                "and import each other with a leading dot"
            )


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_decisions_need_no_torch(name: str) -> None:
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current in reached or current not in MODULES:
            continue
        reached.add(current)
        for target in imports_of(current):
            assert target.split(".")[0] not in ("torch", "multilora_kernels"), (
                f"{name} must not need torch, but {current} imports {target}"
            )
            waiting.append(target)
    assert name in reached, f"{name} does not exist; WITHOUT_TORCH is out of date"


# What no file does --------------------------------------------------------------------------------


@all_modules
def test_nothing_prints_but_the_command_line(module: Module) -> None:
    lines = [line for name, line in calls_of(module) if name == "print"]
    assert not lines or module.name in MAY_PRINT, f"{module.path}:{lines}: use logging"


@all_modules
def test_nothing_executes_data(module: Module) -> None:
    """No pickle, no eval; torch.load in one file, and there for tensors only."""
    banned = {t for t in imports_of(module.name) if t.split(".")[0] in FORBIDDEN_IMPORTS}
    assert not banned, f"{module.name} imports {banned}"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in FORBIDDEN_CALLS, f"{module.path}:{node.lineno}: {name}() is not allowed"
        if name == "torch.load":
            assert module.name in MAY_LOAD_PICKLES, f"{module.path}:{node.lineno}: torch.load"
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert options.get("weights_only") == "True", f"{module.path}:{node.lineno}"


# Sizes --------------------------------------------------------------------------------------------


@all_modules
def test_files_fit_in_one_reading(module: Module) -> None:
    lines = len(module.path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_FILE_LINES, f"{module.path.relative_to(ROOT)} has {lines} lines: split it"


@runtime_modules
def test_functions_fit_on_a_screen(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines < MAX_FUNCTION_LINES, (
                f"{module.path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines, "
                f"the limit is {MAX_FUNCTION_LINES - 1}"
            )


# Packages -----------------------------------------------------------------------------------------


def pyproject() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pytest itself needs it there
        import tomli as tomllib
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def test_pyproject_lists_every_package() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(m.name for m in MODULES.values() if m.is_package)


def test_the_floors_name_only_modules_that_exist() -> None:
    gone = [n for n in FLOORS if not n.endswith(".*") and n not in MODULES]
    assert not gone, f"FLOORS names modules that are gone: {gone}"
