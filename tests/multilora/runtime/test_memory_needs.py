"""Bytes reckoned from shapes, against numbers that were computed by hand and what is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import multilora_kernels as mk
from multilora.config.engine import EngineConfig
from multilora.config.presets import SHAPES
from multilora.config.quantization import Scheme, schemes_of
from multilora.device.cpu import DeviceMemory
from multilora.errors import ConfigError
from multilora.runtime.graph_runner import batch_shapes
from multilora.runtime.memory_budget import check_device
from multilora.runtime.memory_needs import (
    PLANES,
    Dtypes,
    MemoryNeeds,
    _segments,
    expected,
    graph_bytes,
    page_bytes,
    step_bytes,
)
from multilora.runtime.memory_needs import weight_bytes as weights_of
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import make_engine

if TYPE_CHECKING:
    from pathlib import Path

B8, B70 = SHAPES["llama-3.1-8b"], SHAPES["llama-3.1-70b"]
BF16 = torch.bfloat16
LARGE = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}
H200 = DeviceMemory(free=149_600_000_000, total=150_100_000_000)


def needs_of(name: str, **settings: Any) -> MemoryNeeds:
    config = EngineConfig(model=name, **settings)
    length = config.max_model_len or 131_072
    sizes = batch_shapes(config.max_num_seqs, config.max_loras, length)
    pages = config.pages_per_site(is_gpu=True)
    tokens = [] if config.enforce_eager else [size.tokens for size in sizes]
    return expected(config, SHAPES[name], Dtypes(BF16, BF16, BF16), length, pages, tokens)


# Weights ------------------------------------------------------------------------------------------


def test_the_weights_of_published_models() -> None:
    """Parameters as Hugging Face counts them: 8,030,261,248, 70,553,706,496 and 1,235,814,400."""
    assert weights_of(B8, BF16, {}) == 2 * 8_030_261_248
    assert weights_of(B70, BF16, {}) == 2 * 70_553_706_496
    assert weights_of(B70, torch.float32, {}) == 4 * 70_553_706_496
    assert weights_of(SHAPES["llama-3.2-1b"], BF16, {}) == 2 * 1_235_814_400


def test_the_weights_of_a_quantised_model() -> None:
    linears = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    outputs = 32 * (6144 + 4096 + 28672 + 4096)
    head = 128_256 * 4096 + 4 * 128_256  # int8, a scale for each token
    rest = 2 * (128_256 * 4096 + 65 * 4096)  # the embedding and the norms
    int8 = schemes_of(EngineConfig(model="x", quantization="int8"))
    assert weights_of(B8, BF16, int8) == linears + 4 * outputs + head + rest
    int4 = schemes_of(EngineConfig(model="x", quantization="int4"))
    assert weights_of(B8, BF16, int4) == linears // 2 + 4 * linears // 32 + head + rest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "int4"}],
    ids=str,
)
def test_it_is_what_a_loaded_model_has(
    tmp_path: Path, tied: bool, settings: dict[str, Any]
) -> None:
    shape = write_checkpoint(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    engine = make_engine(tmp_path, **settings)
    found = weights_of(shape, engine.model.dtype, schemes_of(engine.config))
    assert found == engine.memory()["base"]


def test_columns_that_no_group_divides() -> None:
    """96 columns in groups of 64 have two scales; 48 codes of 4 bits are 24 bytes."""
    found = weights_of(TINY, torch.float32, {"down": Scheme(4, 64)})
    plain = weights_of(TINY, torch.float32, {})
    assert plain - found == 2 * 64 * (96 * 4 - 48 - 2 * 4)


# Rank pages, steps, graphs ------------------------------------------------------------------------


def test_a_rank_page() -> None:
    """8 rows of A for each slice and 8 of B, in all layers."""
    columns = (3 + 1 + 2) * 4096 + 14336 + (6144 + 4096 + 28672 + 4096)
    assert page_bytes(B8, BF16) == 32 * 8 * 2 * columns == 41_943_040
    wide = (3 + 1 + 2) * 8192 + 28672 + (10240 + 8192 + 57344 + 8192)
    assert page_bytes(B70, BF16) == 80 * 8 * 2 * wide == 207_093_760


def test_lora_planes_are_most_of_a_large_step() -> None:
    """8,192 tokens, rank 512: the planes of qkv have 403 MB, gate_up with its own 738 MB."""
    hidden = 2 * 8192 * 4096 * 2
    gate_up = 8192 * 28672 * 2 + 8 * 8192 * 2 * 512 * 4
    assert 8 * 8192 * 3 * 512 * 4 == 402_653_184
    assert gate_up == 738_197_504
    assert step_bytes(B8, 8192, (1, 4, 4096), 2, 512) == hidden + gate_up


def test_attention_over_long_sequences_is_most_of_a_small_step() -> None:
    """64 sequences of 131,072 tokens have 80 segments each, of 4 queries: 336 MB in fp32."""
    hidden, rows = 2 * 512 * 4096 * 2, 512 * (6144 + 4096) * 2
    assert 80 * 64 * 4 * 4096 * 4 == 335_544_320
    assert step_bytes(B8, 512, (64, 4, 131_072), 2, 512) == hidden + rows + 335_544_320


def test_graphs_are_counted_by_what_they_keep() -> None:
    """24 graphs of up to 256 tokens: logits once, their step, a workspace, the driver's part."""
    tokens = [size.tokens for size in batch_shapes(256, 16, 131_072)]
    assert len(tokens) == 24
    logits = 256 * 128_256 * 2
    step = 2 * 256 * 4096 * 2 + 256 * (6144 + 4096) * 2 + 80 * 256 * 4096 * 4
    driver = 24 * 32 * 2**18
    assert graph_bytes(B8, tokens, 131_072, 2, 512) == logits + step + 2**25 + driver
    # Over 4,096 tokens the step is small, and logits before they are copied are the most.
    assert graph_bytes(B8, tokens, 4096, 2, 16) == 2 * logits + 2**25 + driver


# All together -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "gigabytes"),
    [
        ("llama-3.1-8b", {}, [16.06, 2.68, 17.18, 0.35, 0.24, 36.52]),
        ("llama-3.1-70b", {}, [141.11, 13.25, 42.95, 0.37, 0.47, 198.16]),
        ("llama-3.1-8b", LARGE, [16.06, 2.68, 17.18, 1.64, 0.65, 38.21]),
        ("llama-3.1-70b", LARGE, [141.11, 13.25, 42.95, 1.91, 1.29, 200.52]),
    ],
)
def test_the_table_of_the_documentation(
    name: str, settings: dict[str, int], gigabytes: list[float]
) -> None:
    needs = needs_of(name, **settings)
    kv = needs.min_blocks * needs.block
    found = [needs.base, needs.rank_pages, kv, needs.activations, needs.graphs]
    assert [round(count / 1e9, 2) for count in (*found, sum(found))] == gigabytes
    assert needs.min_blocks == 131_072 // 16
    assert needs.max_blocks == settings.get("max_num_seqs", 64) * 131_072 // 16


def test_eager_steps_need_no_graphs() -> None:
    assert needs_of("llama-3.1-8b", enforce_eager=True).graphs == 0


def test_8b_fits_an_h200_and_70b_does_not() -> None:
    check_device(EngineConfig(model="llama-3.1-8b"), needs_of("llama-3.1-8b"), H200)
    with pytest.raises(ConfigError) as found:
        check_device(EngineConfig(model="llama-3.1-70b"), needs_of("llama-3.1-70b"), H200)
    text = str(found.value)
    assert text.startswith("llama-3.1-70b needs 198.16 GB of the GPU: weights 141.11 GB, rank pa")
    assert "it may take 134.59 GB: 150.10 GB x gpu_memory_utilization=0.9, less 0.50 GB" in text
    assert "The weights alone do not fit: raise gpu_memory_utilization, use a GPU with more" in text


def test_8b_fits_24_gb_with_short_requests_and_few_pages() -> None:
    small = DeviceMemory(free=25_300_000_000, total=25_700_000_000)
    settings = {"max_model_len": 8192, "lora_pages": 16}
    config = EngineConfig(model="llama-3.1-8b", **settings)
    check_device(config, needs_of("llama-3.1-8b", **settings), small)
    with pytest.raises(ConfigError, match="Lower max_model_len to 41248, or"):
        check_device(
            EngineConfig(model="llama-3.1-8b", lora_pages=16),
            needs_of("llama-3.1-8b", lora_pages=16),
            small,
        )


def test_the_planes_that_plans_ask_for_are_counted() -> None:
    """Never more than they are: an engine that fits might be refused."""
    for sm in mk.cuda.launch_plans.ARCHITECTURES:
        entries = mk.cuda.launch_plans.load(sm).ops["lora_shrink"].values()
        assert min(entry["arithmetic"]["split_k"] for entry in entries) >= PLANES


@pytest.mark.parametrize("length", [1, 512, 4096, 8192, 10_000, 16_384, 32_768, 100_000, 131_072])
def test_attentions_segments_are_counted(length: int) -> None:
    """Never more than they are, and exactly where their length doubles."""
    pytest.importorskip("triton")
    from multilora_kernels.cuda.attention_segments import count_segments

    found, wanted = _segments(length), count_segments(length, 512)
    assert wanted - 6 <= found <= wanted
    assert found == wanted or length in (10_000, 100_000)
