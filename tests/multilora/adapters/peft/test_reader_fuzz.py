"""Fuzzed adapter folders raise typed errors only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multilora.adapters.peft.config import HONOURED
from multilora.adapters.peft.reader import read_adapter
from multilora.errors import AdapterError
from tests.harness.adapter_folders import CONFIG, change_config, write_adapter
from tests.harness.refused_adapters import packed

if TYPE_CHECKING:
    from pathlib import Path

P = "base_model.model.model.layers."
Q0 = f"{P}0.self_attn.q_proj.lora_A.weight"
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


@pytest.mark.seconds
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


@pytest.mark.seconds
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
