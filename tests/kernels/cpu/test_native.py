"""The C++ library: how it is found and refused, its signatures, and its functions."""

from __future__ import annotations

import ast
import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora_kernels import index_checks
from multilora_kernels.cpu import graph, native

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]

needs_cpp = pytest.mark.skipif(not native.HAS_CPP, reason="the C++ library is not built")


# The header ---------------------------------------------------------------------------------------


def header() -> str:
    return re.sub(r"//.*", "", (ROOT / "csrc" / "abi.h").read_text(encoding="utf-8"))


KINDS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def kind_of(declaration: str) -> Any:
    """The ctypes type of a C declaration such as `const float* x`, or of a structure's pointer."""
    text = re.sub(r"\w+$", "", " ".join(declaration.split())).strip()
    if not text.endswith("*"):
        return KINDS[text]
    structure = re.search(r"(\w+Args)\*", text)
    return ctypes.POINTER(getattr(native, structure[1])) if structure else ctypes.c_void_p


def test_the_signature_table_matches_the_header() -> None:
    found = re.findall(r"MULTILORA_API\s+(\w+)\s+(\w+)\(([^)]*)\);", header())
    functions = {name: (returns, args.split(",")) for returns, name, args in found}
    assert functions.pop("multilora_abi_version") == ("int32_t", ["void"])
    table = {name: tuple(map(kind_of, args)) for name, (_, args) in functions.items()}
    assert table == native.SIGNATURES
    assert {name for name, (returns, _) in functions.items() if returns == "int32_t"} == set(
        native.CHECKED
    )
    assert {returns for returns, _ in functions.values()} == {"void", "int32_t"}


def test_the_structures_match_the_header() -> None:
    bodies = re.findall(r"struct (\w+Args) \{(.*?)\};", header(), re.DOTALL)
    assert len(bodies) == 11
    for name, body in bodies:
        fields = [line for line in body.split(";") if line.strip()]
        declared = [(re.findall(r"\w+", field)[-1], kind_of(field)) for field in fields]
        assert declared == getattr(native, name)._fields_, name


def test_every_structure_is_filled_whole_and_by_name() -> None:
    """ctypes would leave what is not given at 0."""
    filled = set()
    for path in (ROOT / "kernels" / "cpu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if not re.fullmatch(r"native\.\w+Args", name):
                continue
            assert isinstance(node, ast.Call)
            fields = {field for field, _ in getattr(native, name.removeprefix("native."))._fields_}
            assert {keyword.arg for keyword in node.keywords} == fields, f"{path}:{node.lineno}"
            assert not node.args
            filled.add(name)
    assert len(filled) == 10


def test_every_code_of_the_header_has_its_text() -> None:
    codes = {name: int(code) for name, code in re.findall(r"MULTILORA_BAD_(\w+) = (\d+)", header())}
    assert codes == {name: getattr(index_checks, name) for name in codes}
    assert set(codes.values()) == set(index_checks.MISTAKES)


def test_every_kind_of_call_has_its_function() -> None:
    found = re.findall(r"MULTILORA_CALL_(\w+) = (\d+)", header())
    assert [int(kind) for _, kind in found] == list(range(len(graph.KINDS)))
    for (name, _), function in zip(found, graph.KINDS, strict=True):
        assert name.lower() in function.split("_")
        assert function in native.SIGNATURES


def test_the_header_and_the_loader_agree_on_version_and_dtypes() -> None:
    text = header()
    assert f"#define MULTILORA_ABI_VERSION {native.ABI_VERSION}\n" in text
    assert f"#define MULTILORA_MOST_TOP {native.MOST_TOP}\n" in text
    found = re.findall(r"MULTILORA_(B?F\d+|I8) = (\d)", text)
    named = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
    assert {named[name]: int(code) for name, code in found} == native.KV_CODES


# Loading ------------------------------------------------------------------------------------------


def test_a_folder_without_a_library_has_none(tmp_path: Path) -> None:
    assert native.find(tmp_path) is None


def test_a_file_that_is_no_library_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "_cpu.abi3.so"
    path.write_bytes(b"not a library")
    assert native.find(tmp_path) == path
    assert native.load(path) is None
    assert "running without C++" in caplog.text


def test_a_library_of_another_abi_version_is_refused_with_the_cure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, path = tmp_path / "stale.c", tmp_path / "_cpu.abi3.so"
    source.write_text("int multilora_abi_version(void) { return 9999; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    assert native.load(path) is None
    assert "ABI version 9999" in caplog.text
    assert "Delete the file and install multilora again" in caplog.text


@pytest.mark.seconds
@needs_cpp
def test_the_environment_can_switch_it_off(run_python: Callable[..., str]) -> None:
    code = "from multilora_kernels.cpu import native; print(native.HAS_CPP, native.LIB)"
    assert run_python(code, MULTILORA_DISABLE_CPP="1").split() == ["False", "None"]


@pytest.mark.seconds
@needs_cpp
def test_the_environment_can_name_another_build(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    code = "from multilora_kernels.cpu import native; print(native.PATH, native.HAS_CPP)"
    assert native.PATH is not None
    other = tmp_path / "other.so"
    shutil.copy(native.PATH, other)
    assert run_python(code, MULTILORA_CPP_LIBRARY=str(other)).split() == [str(other), "True"]
    other.write_bytes(b"not a library")
    with pytest.raises(AssertionError, match=r"MULTILORA_CPP_LIBRARY names \S*other.so"):
        run_python(code, MULTILORA_CPP_LIBRARY=str(other))


@pytest.mark.seconds
@needs_cpp
@pytest.mark.skipif(hasattr(native.LIB, "__asan_init"), reason="sanitizers need all addresses")
def test_a_kernel_without_memory_says_so_and_ends_the_process(
    run_python: Callable[..., str],
) -> None:
    code = """
import resource, torch
import multilora_kernels as mk
torch.set_num_threads(1)
rows = torch.zeros(1, 8).expand(2**26, 8)  # of 32 bytes in all; in rank space they take 2 GiB
table = mk.Table(*(torch.ones(s, dtype=torch.int32) for s in ((1, 1), (1, 1), (1,))))
table = table._replace(page_ids=table.page_ids - 1, page_weights=torch.ones(1, 1))
tiles = mk.Tiles(*(torch.tensor([n], dtype=torch.int32) for n in (0, 0, 2**26, 1)))
pages = torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
mk.lora_(rows, rows, *pages, table, tiles, (0, 8))
"""
    with pytest.raises(AssertionError, match=r"no memory for 2147483\d* bytes in a C\+\+ kernel"):
        run_python(code)
