"""The rules of the house, read from the source with `ast`: layers, imports, sizes.

A request walks down the layers and its tokens come back as return values, so a file imports only
from lower layers, or from its own in one direction.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
FOLDERS = {"multilora": ROOT / "multilora", "multilora_kernels": ROOT / "kernels"}

# The layers from the lowest to the highest, each a folder of multilora; "types" are the files that
# lie directly in it, and `multilora_kernels` is below all of them. A file imports only from layers
# below its own, or from its own in one direction. docs/architecture.md draws the same.
LAYERS = (
    "types",
    "config",
    "device",
    "checkpoint",
    "tokenization",
    "adapters",
    "model",
    "scheduling",
    "sampling",
    "runtime",
    "engine",
    "serving",
    "server",
    "entrypoints",
)
PUBLIC = len(LAYERS)  # `multilora` itself: it gives the public names, and is imported by nobody

# Decisions are pure: these run in microseconds, in tests and in a simulator.
WITHOUT_TORCH = ("multilora.config", "multilora.adapters.mix", "multilora.scheduling")
MAY_PRINT = (
    "multilora.entrypoints.cli",
    "multilora.entrypoints.commands.adapters",
    "multilora.entrypoints.commands.generate",
    "multilora.entrypoints.commands.info",
    "multilora.entrypoints.commands.verify",
)
# Meta's .pth files, and what a user has converted; with weights_only=True.
MAY_LOAD_PICKLES = ("multilora.checkpoint.meta", "multilora.adapters.conversion")
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 400
MAX_FILES_IN_SIGHT = 10  # directly in multilora/ and in kernels/


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


def layer_of(name: str) -> int:
    """Its place in LAYERS; -1 for the kernels, and PUBLIC for the package itself."""
    package, *folders = name.split(".")
    if package == "multilora_kernels":
        return -1
    if not folders:
        return PUBLIC
    is_type = len(folders) == 1 and not MODULES[name].is_package
    layer = "types" if is_type else folders[0]
    assert layer in LAYERS, (
        f"multilora/{layer}/ is no layer. Put the file into one that is, or add the folder to "
        "LAYERS in tests/test_architecture.py: above all that it imports, below all that import it"
    )
    return LAYERS.index(layer)


# Layers -------------------------------------------------------------------------------------------


@runtime_modules
def test_imports_go_down(module: Module) -> None:
    own = layer_of(module.name)
    for target in imports_of(module.name) & MODULES.keys():
        assert layer_of(target) <= own, (
            f"{module.name} imports {target} of a layer above its own: return the value instead, "
            "or move the code down; LAYERS in tests/test_architecture.py has their order"
        )


def test_the_drawing_shows_every_layer_and_file() -> None:
    """The block in docs/architecture.md: a line for each folder, the highest layer first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn: dict[str, set[str]] = {}
    folder = ""
    for line in text.partition("```\n")[2].partition("```")[0].splitlines():
        if not line.startswith(" "):
            folder = line.split()[0].rstrip("/")
            line = line[len(folder) + 1 :]
        drawn.setdefault(folder, set()).update(re.sub(r"\(.*?\)", "", line).split())
    runtime = [name for name in drawn if not name.startswith(("kernels", "csrc"))]
    assert runtime == list(reversed(LAYERS)), "the layers of the drawing are not LAYERS"
    for name, files in drawn.items():
        if name == "csrc":
            continue
        path = ROOT / name if name.startswith("kernels") else FOLDERS["multilora"] / name
        if name == "types":
            path = FOLDERS["multilora"]
        found = {
            str(file.relative_to(path).with_suffix(""))
            for file in (path.glob("*.py") if name == "types" else path.rglob("*.py"))
            if file.name != "__init__.py"
        }
        assert files == found, f"the drawing's line of {name}/ is out of date"


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=lambda path: path.name)
def test_few_files_stand_directly_in_a_package(folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = [name for name in found if not name.startswith("_cpu")]  # built, not written
    assert len(found) <= MAX_FILES_IN_SIGHT, f"{found}: put what belongs together into a folder"


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
    """Of a module, or of all that lie in a package."""
    reached: set[str] = set()
    waiting = [n for n in MODULES if n == name or n.startswith(f"{name}.")]
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


CLOCKS = {"time", "datetime", "sched"}
TIMED = {  # these say in the log how long a start took
    "multilora.engine.builder",
    "multilora.runtime.graph_runner",
}


@pytest.mark.parametrize("package", ["scheduling", "engine", "runtime", "sampling"])
def test_no_decision_asks_for_the_time(package: str) -> None:
    """What a step does follows from what was asked alone, so that it can be done again."""
    for name in MODULES:
        if name.startswith(f"multilora.{package}.") and name not in TIMED:
            found = {target.partition(".")[0] for target in imports_of(name)} & CLOCKS
            assert not found, f"{name} imports {found.pop()}: hand it in, so that a test can set it"


# What no file does --------------------------------------------------------------------------------


@all_modules
def test_nothing_prints_but_the_command_line(module: Module) -> None:
    lines = [line for name, line in calls_of(module) if name == "print"]
    assert not lines or module.name in MAY_PRINT, f"{module.path}:{lines}: use logging"


@all_modules
def test_nothing_executes_data(module: Module) -> None:
    """No pickle, no eval; torch.load in two files, and there for tensors only."""
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


# Names --------------------------------------------------------------------------------------------

# Public classes of one name that are still to part. Nothing joins them.
SHARED_NAMES = frozenset[str]()


def test_no_two_public_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for module in MODULES.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module.name)
    shared = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert shared.keys() == SHARED_NAMES, (
        f"classes of one name: {shared}. Give one of them another name; of those that have one by "
        "now, take it from SHARED_NAMES."
    )


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


# Tests --------------------------------------------------------------------------------------------

# A test file lies where its file does and is named after it, perhaps with a topic behind the name:
# multilora/scheduling/scheduler.py has tests/multilora/scheduling/test_scheduler.py and
# test_scheduler_fuzz.py. Data alone needs no tests. The exceptions, with their reasons:
MIRRORS = {"multilora": TESTS / "multilora", "multilora_kernels": TESTS / "kernels"}
TESTED_ELSEWHERE = {
    "what is right is what transformers says": {
        "multilora.model.llama": "multilora/end_to_end/test_parity.py",
    },
    "one sum over plain data": {
        "multilora.outputs": "multilora/engine/test_output_processor.py",
        "multilora.scheduling.scheduler_output": "multilora/scheduling/test_scheduler.py",
    },
    "the tests of a tokenizer run each of its readers": {
        f"multilora.tokenization.{name}": "multilora/tokenization/test_tokenizer.py"
        for name in (
            "folder_tokenizer",
            "hf_tokenizer",
            "sentencepiece_tokenizer",
            "tiktoken_tokenizer",
        )
    },
    "it is the law that every test of an op compares with": {
        "multilora_kernels.reference": "kernels/ops/test_lora.py",
    },
    "the tests of an op run each of its forms: torch, and C++ for every instruction set": {
        f"multilora_kernels.cpu.{name}": f"kernels/ops/test_{name}.py"
        for name in ("attention", "elementwise", "lora", "sampling")
    },
    "Triton interprets for the life of a process, and that is a run of its own": {
        "multilora_kernels.cuda.attention_segments": "triton/test_attention.py",
        "multilora_kernels.cuda.tune_timer": "triton/test_tune.py",
        "multilora_kernels.testing.guard": "triton/test_guard.py",
        "multilora_kernels.testing.interpreter": "triton/test_interpreter.py",
        "multilora_kernels.testing.precision": "triton/test_lora.py",
        **{
            f"multilora_kernels.cuda.{name}": f"triton/test_{name}.py"
            for name in ("attention", "elementwise", "linear", "lora", "lora_columns", "sampling")
        },
    },
    "Triton compiles for the life of a process, and that is a run of its own": {
        "multilora_kernels.cuda.compilations": "codegen/test_variants.py",
        "multilora_kernels.testing.codegen": "codegen/test_codegen.py",
        "multilora_kernels.testing.variants": "codegen/test_variants.py",
    },
}
# Folders of tests/multilora: what holds of a whole engine, and what others met.
OF_NO_MODULE = ("end_to_end", "incidents")


def own_tests(module: Module) -> list[Path]:
    package = module.name.split(".")[0]
    folder = MIRRORS[package] / module.path.parent.relative_to(FOLDERS[package])
    stem = f"test_{module.path.stem}"
    return [*folder.glob(f"{stem}.py"), *folder.glob(f"{stem}_*.py")]


def test_every_file_with_behaviour_is_tested_where_it_lies() -> None:
    elsewhere = {name: file for part in TESTED_ELSEWHERE.values() for name, file in part.items()}
    for module in MODULES.values():
        has_behaviour = any(isinstance(node, ast.FunctionDef) for node in ast.walk(module.tree))
        if module.is_package or not has_behaviour:
            continue
        own = own_tests(module)
        if module.name not in elsewhere:
            assert own, f"{module.name} has no test file of its name, see CONTRIBUTING.md"
        else:
            assert not own, f"{module.name} has {own[0].name}: take it from TESTED_ELSEWHERE"
            assert (TESTS / elsewhere[module.name]).is_file(), elsewhere[module.name]
    assert elsewhere.keys() <= MODULES.keys()


def test_every_test_file_is_named_after_a_file() -> None:
    mirrored = {path for module in MODULES.values() for path in own_tests(module)}
    for folder in MIRRORS.values():
        lost = {
            str(path.relative_to(ROOT))
            for path in set(folder.rglob("test_*.py")) - mirrored
            if path.parent.name not in OF_NO_MODULE
        }
        assert not lost, f"there is no file to which these belong: {sorted(lost)}"
    benches = [path.stem for path in (ROOT / "bench").glob("*.py")]
    for path in (TESTS / "bench").glob("test_*.py"):
        own = path.stem.removeprefix("test_")
        assert any(own == name or own.startswith(f"{name}_") for name in benches), path.name


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
