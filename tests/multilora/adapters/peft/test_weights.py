"""Malformed safetensors of an adapter fail by name, with little work; fuzz finds no other error."""

from __future__ import annotations

import os
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora.adapters.peft import reader as adapter_format
from multilora.adapters.peft import weights as adapter_weights
from multilora.adapters.peft.reader import read_adapter
from multilora.errors import AdapterInvalid
from tests.harness.adapter_folders import CONFIG, change_tensors, write_adapter
from tests.harness.refused_adapters import assert_refused, packed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = "base_model.model.model.layers."


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


def poke(name: str, value: float, at: int = 0) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[at : at + 1].fill_(value)


def one(name: str = "x", dtype: Any = "F32", shape: Any = (1,), at: Any = (0, 4)) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": at}}


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
