"""Malformed adapter folders fail by name, with little work; fuzz finds no other error."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multilora.adapters.peft import reader as adapter_format
from multilora.adapters.peft import weights as adapter_weights
from multilora.adapters.peft.config import HONOURED
from multilora.adapters.peft.reader import read_adapter
from multilora.errors import AdapterError, AdapterInvalid, AdapterTooLarge
from tests.harness.adapter_folders import CONFIG, change_config, change_tensors, write_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = "base_model.model.model.layers."
Q0 = f"{P}0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_refuses_one_value_that_is_not_finite(
    value: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_adapter(tmp_path, CONFIG, rank=3, targets=("down_proj",), dtype=dtype)
    name = f"{P}1.mlp.down_proj.lora_A.weight"
    for place in (0, 70, 3 * 48 - 1):
        change_tensors(tmp_path, poke(name, float(value), place))
        assert_refused(tmp_path, f"'{name}' holds NaN or infinite")
        change_tensors(tmp_path, poke(name, 0.0, place))
    assert read_adapter(tmp_path, CONFIG).rank == 3


def assert_refused(folder: Path, fragment: str, error: type[AdapterError] = AdapterInvalid) -> None:
    """Refused with a text that holds `fragment` and the folder."""
    with pytest.raises(error) as caught:
        read_adapter(folder, CONFIG)
    assert fragment in str(caught.value)
    assert folder.name in str(caught.value)
    assert len(str(caught.value)) < 1000


def drop(*names: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def poke(name: str, value: float, at: int = 0) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[at : at + 1].fill_(value)


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "A missing": (drop(Q0), "missing: 'model.layers.0.self_attn.q_proj.lora_A.weight'"),
    "B missing": (drop(Q0.replace("_A", "_B")), "q_proj.lora_B.weight'"),
    "all missing": (lambda tensors: tensors.clear(), "and 25 more"),
    "untargeted module": (
        put("base_model.model.lm_head.lora_A.weight", torch.zeros(8, 32)),
        "does not target its module",
    ),
    "layer above": (
        put(f"{P}2.self_attn.q_proj.lora_A.weight", torch.zeros(8, 32)),
        "has no layer 2; its last is 1",
    ),
    "layer far above": (
        put(f"{P}{'9' * 5000}.x.lora_A.weight", torch.zeros(1)),
        "has no layer 999",
    ),
    "no such module": (
        put(f"{P}0.self_attn.w_pack.lora_A.weight", torch.zeros(8, 32)),
        "no such module",
    ),
    "not LoRA": (put(f"{P}0.input_layernorm.weight", torch.zeros(32)), "no such module"),
    "no prefix": (put("model.q_proj.lora_A.weight", torch.zeros(8, 32)), "PEFT's names begin with"),
    "embedding names on a linear": (
        put(f"{P}0.self_attn.q_proj.lora_embedding_A", torch.zeros(8, 32)),
        "in this way",
    ),
    "DoRA": (
        put(Q0.replace("A.weight", "magnitude_vector"), torch.zeros(32)),
        "DoRA is not supported",
    ),
    "bias": (put(Q0.replace("A.weight", "B.bias"), torch.zeros(32)), "biases are not supported"),
    "two adapters": (put(Q0.replace("A.", "A.default."), torch.zeros(8, 32)), "are one weight"),
    "wrong input": (put(Q0, torch.zeros(8, 31)), "has shape [8, 31], but the base model"),
    "wrong output": (put(Q0.replace("_A", "_B"), torch.zeros(33, 8)), "need [32, 8]"),
    "wrong rank": (put(Q0, torch.zeros(4, 32)), "has shape [4, 32], but the base model and rank 8"),
    "wrong dimensions": (put(Q0, torch.zeros(8, 32, 1)), "has shape [8, 32, 1]"),
    "scalar": (put(Q0, torch.zeros(())), "shape []"),
    "empty": (put(Q0, torch.zeros(0, 32)), "shape [0, 32]"),
    "NaN": (poke(Q0, float("nan")), f"'{Q0}' holds NaN or infinite"),
    "infinity": (poke(Q0, float("-inf")), f"'{Q0}' holds NaN or infinite"),
    "integers": (put(Q0, torch.zeros(8, 32, dtype=torch.int32)), "has dtype 'I32'"),
    "float64": (
        put(Q0, torch.zeros(8, 32, dtype=torch.float64)),
        "save it as one of F32, F16, BF16",
    ),
    "resized vocabulary": (
        put("base_model.model.model.embed_tokens.weight", torch.zeros(65, 32)),
        "resized vocabulary",
    ),
    "base weight twice": (
        lambda tensors: tensors.update(
            {
                f"base_model.model.lm_head.{x}weight": torch.zeros(64, 32)
                for x in ("", "base_layer.")
            }
        ),
        "are one weight",
    ),
}


@pytest.mark.parametrize(("change", "fragment"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_refuses_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], Any], fragment: str, tmp_path: Path
) -> None:
    change_tensors(write_adapter(tmp_path, CONFIG), change)
    assert_refused(tmp_path, fragment)


def one(name: str = "x", dtype: Any = "F32", shape: Any = (1,), at: Any = (0, 4)) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": at}}


def packed(header: Any, data: bytes = b"\0\0\0\0") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# What must not even be parsed: it would take 0.7 s of a server's time, or 80 MB.
CROWDED: dict[str, tuple[bytes, str]] = {
    "keys": (packed({str(i): 0 for i in range(300_000)}), "more than 20000 tensors"),
    "brackets": (packed(b'{"a":[' + b"[]," * 1_000_000), "more than 20000 tensors"),
    "header too long": (packed(b" " * ((4 << 20) + 1)), "at most 4194304 are read"),
}

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cut short"),
    "header beyond the file": (struct.pack("<Q", 1 << 63) + b"{}", "cut short"),
    "not JSON": (packed(b"{nope"), "header is not JSON"),
    "not UTF-8": (packed(b"\xff\xfe{}"), "header is not JSON"),
    "no header": (packed(b""), "header is not JSON"),
    "deep": (packed(b"[" * 30_000), "header is not JSON"),
    "list": (packed([]), "must hold a JSON object, not list"),
    "too many tensors": (packed({str(i): {} for i in range(20_001)}), "more than 20000 tensors"),
    "key twice": (packed(b'{"a":{},"b":{},"b":{}}'), "has the key 'b' twice"),
    "inner key twice": (
        packed(b'{"a":{"dtype":"F32","dtype":"F16"}}'),
        "has the key 'dtype' twice",
    ),
    "many keys, the last twice": (
        packed(b"{" + b"".join(b'"%d":1,' % i for i in range(19_000)) + b'"1":2}'),
        "has the key '1' twice",
    ),
    "metadata": (packed({"__metadata__": {"a": 1}}), "strings to strings"),
    "entry is no object": (packed({"x": 3}), "a dtype, a shape and data_offsets"),
    "entry incomplete": (packed({"x": {"dtype": "F32"}}), "a dtype, a shape and data_offsets"),
    "dtype is no string": (packed(one(dtype=["F32"])), "has dtype ['F32']"),
    "dtype unknown": (packed(one(dtype="F8_E4M3")), "has dtype 'F8_E4M3'"),
    "negative shape": (packed(one(shape=[-1])), "impossible or empty shape [-1]"),
    "bool shape": (packed(one(shape=[True])), "impossible or empty shape [True]"),
    "huge shape": (packed(one(shape=[10**4000] * 100)), "impossible or empty shape"),
    "many dimensions": (packed(one(shape=[1] * 1_000_000)), "impossible or empty shape"),
    "one offset": (packed(one(at=[4])), "impossible data_offsets"),
    "negative offset": (packed(one(at=[-4, 0])), "impossible data_offsets"),
    "backward range": (packed(one(at=[4, 0])), "has -4 bytes"),
    "size": (packed(one(shape=[2])), "has 4 bytes, but F32 [2] needs 8"),
    "beyond the end": (packed(one(at=[0, 4]), b"\0\0"), "of 2, but its range is 0 to 4"),
    "overlap": (packed(one("x") | one("y")), "should begin at byte 4"),
    "gap": (packed(one(at=[4, 8]), bytes(8)), "should begin at byte 0"),
    "data left over": (packed(one(), bytes(5)), "take 4 bytes, its data has 5"),
}


@pytest.mark.parametrize(("data", "fragment"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_refuses_malformed_safetensors_before_reading_data(
    data: bytes, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write_adapter(tmp_path, CONFIG) / "adapter_model.safetensors").write_bytes(data)
    monkeypatch.setattr(adapter_format, "read_weights", forbidden)
    assert_refused(tmp_path, fragment)


def forbidden(*args: object) -> None:
    pytest.fail("this work must not be begun")


@pytest.mark.parametrize(("data", "fragment"), CROWDED.values(), ids=CROWDED.keys())
def test_refuses_a_crowded_header_before_parsing_it(
    data: bytes, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write_adapter(tmp_path, CONFIG) / "adapter_model.safetensors").write_bytes(data)
    monkeypatch.setattr(adapter_weights, "strict_json", forbidden)
    assert_refused(tmp_path, fragment)


def test_a_hostile_header_takes_little_memory(tmp_path: Path) -> None:
    data = packed(b'{"a":[' + b"[]," * 1_300_000)  # parsed, it would be 80 MB of lists
    (write_adapter(tmp_path, CONFIG) / "adapter_model.safetensors").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterInvalid):
            read_adapter(tmp_path, CONFIG)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def _only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.bin")  # to open it would wait for ever


def _replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors cannot be opened: No such file",
    ),
    "pickle": (_only_pickle, "pickle is never read"),
    "config is a pipe": (_replace("adapter_config.json", os.mkfifo), "is not a regular file"),
    "weights are a pipe": (_replace("adapter_model.safetensors", os.mkfifo), "not a regular file"),
    "config is a device": (
        _replace("adapter_config.json", lambda p: p.symlink_to("/dev/zero")),
        "is not a regular file",
    ),
    "config is a folder": (_replace("adapter_config.json", os.mkdir), "is not a regular file"),
    "link to nowhere": (
        _replace("adapter_config.json", lambda p: p.symlink_to("x")),
        "No such file",
    ),
    "link to itself": (
        _replace("adapter_config.json", lambda p: p.symlink_to(p)),
        "adapter_config.json cannot be opened",
    ),
    "config too large": (
        _replace("adapter_config.json", _sparse((1 << 20) + 1)),
        "above the limit",
    ),
    "weights too large": (
        _replace("adapter_model.safetensors", _sparse((4 << 30) + 1)),
        "above the limit of 4294967296",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "fragment"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_refuses_folders_without_two_regular_files(
    change: Callable[[Path], Any], fragment: str, tmp_path: Path
) -> None:
    change(write_adapter(tmp_path, CONFIG))
    assert_refused(tmp_path, fragment)


def test_refuses_a_path_that_no_system_knows() -> None:
    with pytest.raises(AdapterInvalid, match="no such folder"):
        read_adapter("a\0b", CONFIG)
    with pytest.raises(AdapterInvalid, match="no such folder"):
        read_adapter("a" * 10_000, CONFIG)


@pytest.mark.parametrize("fields", [{"r": 513}, {"rank_pattern": {"up_proj": 10**4000}}])
def test_says_how_to_serve_a_rank_above_the_limit(fields: dict[str, Any], tmp_path: Path) -> None:
    change_config(write_adapter(tmp_path, CONFIG), **fields)
    assert_refused(tmp_path, "restart with max_lora_rank>=", AdapterTooLarge)


def test_a_large_rank_is_no_matter_where_nothing_uses_it(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, rank=4)
    change_config(tmp_path, r=10**9, rank_pattern={"_proj": 10**9, ".*_proj": 4})
    assert read_adapter(tmp_path, CONFIG, max_rank=4).rank == 4
    with pytest.raises(AdapterTooLarge, match=r"rank 4, above max_lora_rank=3; .*>=8"):
        read_adapter(tmp_path, CONFIG, max_rank=3)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_adapter(tmp_path, CONFIG, rank=64) / "adapter_model.safetensors"
    read_header = adapter_format.read_header

    def read_then_cut(file: Any) -> Any:
        header = read_header(file)
        os.truncate(path, path.stat().st_size // 2)
        return header

    monkeypatch.setattr(adapter_format, "read_header", read_then_cut)
    assert_refused(tmp_path, "changed while it was read")


# ---- fuzz ---------------------------------------------------------------------------------------

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("fuzzed"), CONFIG, rank=1, targets=("q_proj",))


def mutate(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Each edit replaces `count` bytes at a place by others."""
    for place, count, new in edits:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + count :]
    return data


EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 9), st.binary(max_size=9)), max_size=4
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


def assert_only_typed_errors(folder: Path) -> None:
    try:
        read_adapter(folder, CONFIG)
    except AdapterError as error:
        str(error).encode("utf-8", "surrogatepass")


@FUZZ
@given(edits=EDITS)
def test_fuzzed_config_bytes_raise_typed_errors_only(fuzzed: Path, edits: Any) -> None:
    path = fuzzed / "adapter_config.json"
    good = path.read_bytes()
    try:
        path.write_bytes(mutate(good, edits))
        assert_only_typed_errors(fuzzed)
    finally:
        path.write_bytes(good)


@FUZZ
@given(fields=st.dictionaries(st.sampled_from([*HONOURED, "bias", "new"]), JSON, max_size=3))
def test_fuzzed_config_values_raise_typed_errors_only(fuzzed: Path, fields: Any) -> None:
    path = fuzzed / "adapter_config.json"
    good = path.read_bytes()
    try:
        change_config(fuzzed, **fields)
        assert_only_typed_errors(fuzzed)
    finally:
        path.write_bytes(good)


@FUZZ
@given(edits=EDITS, keep_length=st.booleans())
def test_fuzzed_safetensors_raise_typed_errors_only(
    fuzzed: Path, edits: Any, keep_length: bool
) -> None:
    path = fuzzed / "adapter_model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    try:
        if keep_length:
            path.write_bytes(packed(mutate(good[8 : 8 + length], edits), good[8 + length :]))
        else:
            path.write_bytes(mutate(good, edits))
        assert_only_typed_errors(fuzzed)
    finally:
        path.write_bytes(good)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=9) | st.just(Q0), JSON, max_size=3))
def test_fuzzed_headers_raise_typed_errors_only(fuzzed: Path, header: Any) -> None:
    path = fuzzed / "adapter_model.safetensors"
    good = path.read_bytes()
    try:
        path.write_bytes(packed(header))
        assert_only_typed_errors(fuzzed)
    finally:
        path.write_bytes(good)
