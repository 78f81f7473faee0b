"""Weight loading. Oracles: transformers for Hugging Face's layout; for Meta's, the inverse row
order that the factory writes out, and the two rotations written out below."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multilora.checkpoint.hf import MAX_HEADER_BYTES
from multilora.checkpoint.parts import fill
from multilora.checkpoint.reader import load_checkpoint, read_base_weight, read_config
from multilora.errors import CheckpointError
from tests.harness import model_folders as make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from multilora.config.model import ModelConfig

Q = "model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"


def empty_targets(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: torch.full(shape, float("nan"), dtype=dtype)
        for name, shape in make.weight_shapes(config).items()
    }


def loaded(folder: Path, config: ModelConfig, **kwargs: Any) -> dict[str, Tensor]:
    targets = empty_targets(config, **kwargs)
    load_checkpoint(folder, [fill(targets)], config)
    return targets


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder: Path, config: ModelConfig) -> str:
    """The text of the error, after a check that no target was touched."""
    targets = empty_targets(config)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, [fill(targets)], config)
    assert all(t.isnan().all() for t in targets.values())
    return str(caught.value)


# ---- Hugging Face


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["50GB", "60KB"])
def test_loads_what_transformers_saves(tmp_path: Path, shard_size: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(make.TINY, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**make.hf_config(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "60KB")
    assert replace(read_config(tmp_path), dtype="float32") == config
    want = {name: p.detach() for name, p in model.named_parameters()}
    assert_same(loaded(tmp_path, config), want)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_every_dtype_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    config = make.write_checkpoint(tmp_path, dtype=dtype, shards=shards)
    want = make.random_weights(config, dtype=dtype)
    assert_same(loaded(tmp_path, config, dtype=dtype), want)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_casts_once_to_the_dtype_of_the_target(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    config = make.write_checkpoint(tmp_path, dtype=stored)
    want = {n: w.to(wanted) for n, w in make.random_weights(config, dtype=stored).items()}
    assert_same(loaded(tmp_path, config, dtype=wanted), want)


def test_fills_row_slices_of_a_fused_parameter(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    weights = make.random_weights(config)
    targets = empty_targets(config)
    names = [f"model.layers.0.self_attn.{m}_proj.weight" for m in "qkv"]
    rows = [weights[name].shape[0] for name in names]
    fused = torch.nn.Parameter(torch.zeros(sum(rows), config.hidden_size))
    targets |= dict(zip(names, fused.split(rows), strict=True))
    load_checkpoint(tmp_path, [fill(targets)], config)
    assert torch.equal(fused, torch.cat([weights[name] for name in names]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("write", [make.write_checkpoint, make.write_meta_checkpoint])
def test_reads_the_matrices_of_the_base_alone(
    tmp_path: Path, write: Callable[..., ModelConfig], tied: bool
) -> None:
    config = write(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tied)
    want = make.random_weights(config, dtype=torch.bfloat16)
    assert torch.equal(read_base_weight(tmp_path, "embed", config), want[EMBED])
    head = read_base_weight(tmp_path, "lm_head", config)
    assert torch.equal(head, want[EMBED if tied else HEAD])


def test_ignores_stored_rotary_frequencies(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(tmp_path, lambda w: w.update({name: torch.ones(8)}))
    assert_same(loaded(tmp_path, config), make.random_weights(config))


def test_names_missing_weights_and_counts_the_rest(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    edit_weights(tmp_path, lambda w: [w.pop(n) for n in list(w) if "layers.1" in n])
    text = refused(tmp_path, config)
    assert "lacks 9 of the model's 21 weights" in text
    assert "model.layers.1." in text
    assert "and 4 more" in text


def test_names_extra_weights(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, attention_bias=True)
    text = refused(tmp_path, replace(config, attention_bias=False))
    assert "holds 8 weights that the model does not have" in text
    assert "_proj.bias" in text


def test_names_a_misshapen_weight_with_both_shapes(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    edit_weights(tmp_path, lambda w: w.update({Q: torch.ones(32, 64)}))
    text = refused(tmp_path, config)
    assert Q in text
    assert "[32, 64]" in text
    assert "[64, 64]" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_refuses_other_dtypes_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    config = make.write_checkpoint(tmp_path)
    edit_weights(tmp_path, lambda w: w.update({Q: w[Q].to(dtype)}))
    text = refused(tmp_path, config)
    assert Q in text
    assert {"float64": "F64", "int8": "I8"}.get(str(dtype)[6:], "F8_E4M3") in text


def test_accepts_a_stored_head_that_repeats_the_tied_embedding(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda w: w.update({HEAD: w[EMBED].clone()}))
    assert HEAD not in loaded(tmp_path, config, dtype=torch.bfloat16)


def test_refuses_a_stored_head_that_differs_from_the_tied_embedding(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda w: w.update({HEAD: w[EMBED].flip(0)}))
    assert "to the embedding, but they differ" in refused(tmp_path, config)


def test_a_stored_head_may_be_a_rounding_of_the_tied_embedding(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda w: w.update({HEAD: w[EMBED].bfloat16()}))
    assert HEAD not in loaded(tmp_path, config)


def test_names_the_head_that_an_untied_model_lacks(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, tie_word_embeddings=True)
    assert HEAD in refused(tmp_path, replace(config, tie_word_embeddings=False))


@pytest.mark.parametrize(
    "place",
    ["/etc/x.safetensors", "../x.safetensors", "a/x.safetensors", "a\\x.safetensors", "..", "", 3],
)
def test_refuses_an_index_that_leaves_the_folder(tmp_path: Path, place: object) -> None:
    config = make.write_checkpoint(tmp_path / "m", shards=2)
    weights = load_file(tmp_path / "m" / "model-00001-of-00002.safetensors")
    save_file(weights, tmp_path / "x.safetensors")  # there to be found, were it looked for
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q] = place
    index.write_text(json.dumps(content))
    assert f"puts {Q} into {place!r}" in refused(tmp_path / "m", config)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "{", '{"weight_map": {}}'])
def test_refuses_a_malformed_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(tmp_path, make.TINY)


def test_names_a_missing_shard(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    text = refused(tmp_path, config)
    assert "lacks 1 of the 3 files that its index names: model-00002-of-00003.safetensors" in text


def test_refuses_a_weight_that_lies_in_two_shards(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path, shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    assert f"{name} is in both" in refused(tmp_path, config)


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    assert "holds no weights" in refused(tmp_path, make.TINY)


def test_refuses_pytorch_model_bin(tmp_path: Path) -> None:
    torch.save(make.random_weights(make.TINY), tmp_path / "pytorch_model.bin")
    assert "convert them to safetensors" in refused(tmp_path, make.TINY)


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    cuts = {*range(12), header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}
    for size in sorted(cuts | set(range(0, len(whole), len(whole) // 40))):
        file.write_bytes(whole[:size])
        assert str(file) in refused(tmp_path, config), size


def test_garbage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    config = make.write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    for content in (b"\x80\x04" * 100, b"\0" * 100, struct.pack("<Q", 2) + b"[]" + b"x" * 50):
        file.write_bytes(content)
        assert str(file) in refused(tmp_path, config)


def test_refuses_a_header_over_the_limit_before_parsing_it(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    assert f"over the limit of {MAX_HEADER_BYTES}" in refused(tmp_path, make.TINY)


# ---- Meta


@pytest.mark.parametrize("split_embedding", ["vocab", "features"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_meta_weights_are_those_of_hugging_face(
    tmp_path: Path, shards: int, split_embedding: str, tied: bool
) -> None:
    config = make.write_meta_checkpoint(
        tmp_path,
        shards=shards,
        split_embedding=split_embedding,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    want = make.random_weights(config, dtype=torch.bfloat16)
    assert_same(loaded(tmp_path, config, dtype=torch.bfloat16), want)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("shards", "split_embedding"), [(1, "vocab"), (2, "vocab"), (2, "features")]
)
def test_vocabulary_size_is_read_from_the_weights(
    tmp_path: Path, shards: int, split_embedding: str
) -> None:
    config = make.write_meta_checkpoint(
        tmp_path,
        shards=shards,
        split_embedding=split_embedding,
        params_overrides={"vocab_size": -1},  # as in Llama 2
    )
    assert read_config(tmp_path) == config


def test_row_order_keeps_the_attention_scores_of_meta(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    raw = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    ours = loaded(tmp_path, config)
    x = torch.randn(5, config.hidden_size)

    def rotated(rows: Tensor, pairs: bool) -> Tensor:
        y = (x @ rows.T).unflatten(-1, (-1, config.head_dim))  # [tokens, heads, head_dim]
        half = config.head_dim // 2
        angle = torch.arange(5.0)[:, None, None] * 10_000 ** (-torch.arange(half) / half)
        a, b = (y[..., 0::2], y[..., 1::2]) if pairs else (y[..., :half], y[..., half:])
        turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.cat(turned, -1)

    def scores(wq: Tensor, wk: Tensor, pairs: bool) -> Tensor:
        q, k = rotated(wq, pairs), rotated(wk, pairs).repeat_interleave(2, 1)
        return torch.einsum("thd,shd->hts", q, k)

    theirs = scores(*(raw[f"layers.0.attention.{w}.weight"] for w in ("wq", "wk")), pairs=True)
    got = scores(*(ours[f"model.layers.0.self_attn.{m}_proj.weight"] for m in "qk"), pairs=False)
    torch.testing.assert_close(got, theirs)


def edit_shard(folder: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / f"consolidated.{number:02d}.pth"
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def meta_faults() -> Iterator[Any]:
    wq = "layers.0.attention.wq.weight"
    yield pytest.param(lambda w: w.pop(wq), [wq, "consolidated.01.pth"], id="missing in one shard")
    yield pytest.param(
        lambda w: w.update({wq: torch.ones(32, 60)}), [wq, "[32, 60]", "[32, 64]"], id="width"
    )
    yield pytest.param(
        lambda w: w.update({wq: torch.ones(16, 64)}), [Q, "[48, 64]", "[64, 64]"], id="rows"
    )
    yield pytest.param(lambda w: w.update({wq: w[wq].half()}), [wq, "float16"], id="dtype")
    yield pytest.param(lambda w: w.update({wq: torch.tensor(1.0)}), [wq, "[]"], id="scalar")
    yield pytest.param(lambda w: w.update({wq: 3}), [wq, "not a plain tensor"], id="number")
    yield pytest.param(
        lambda w: w.update({wq: w[wq].to_sparse()}), [wq, "not a plain tensor"], id="sparse"
    )


@pytest.mark.parametrize(("change", "texts"), list(meta_faults()))
def test_names_the_fault_of_a_meta_shard(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], texts: list[str]
) -> None:
    config = make.write_meta_checkpoint(tmp_path, shards=2)
    edit_shard(tmp_path, 1, change)
    text = refused(tmp_path, config)
    assert all(part in text for part in texts), text


def test_names_missing_and_extra_meta_weights(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    edit_shard(tmp_path, 0, lambda w: w.update({"layers.0.attention.wq.bias": torch.ones(64)}))
    assert "layers.0.attention.wq.bias" in refused(tmp_path, config)
    edit_shard(tmp_path, 0, lambda w: w.pop("layers.0.attention.wq.weight"))
    assert f"lacks 1 of the model's 21 weights: {Q}" in refused(tmp_path, config)


def test_refuses_int8_meta_weights(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    edit_shard(tmp_path, 0, lambda w: w.update({"norm.weight": w["norm.weight"].to(torch.int8)}))
    assert "model.norm.weight has dtype int8" in refused(tmp_path, config)


def test_names_a_gap_in_the_numbers_of_meta_shards(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path, shards=2)
    (tmp_path / "consolidated.00.pth").unlink()
    assert "lacks consolidated.00.pth" in refused(tmp_path, config)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_payload_is_refused_and_does_not_run(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    marker, control = tmp_path / "marker", tmp_path / "control"
    file = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(64), "x": _Payload(control)}, file)
    torch.load(file, weights_only=False)
    assert control.exists()  # the payload is a real one
    torch.save({"norm.weight": torch.ones(64), "x": _Payload(marker)}, file)
    assert str(file) in refused(tmp_path, config)
    with pytest.raises(CheckpointError, match="more than"):
        read_config(tmp_path)
    assert not marker.exists()


def test_every_truncation_of_a_meta_file_names_it(tmp_path: Path) -> None:
    config = make.write_meta_checkpoint(tmp_path)
    file = tmp_path / "consolidated.00.pth"
    whole = file.read_bytes()
    for size in [0, 1, 8, len(whole) - 1, *range(100, len(whole), len(whole) // 15)]:
        file.write_bytes(whole[:size])
        assert str(file) in refused(tmp_path, config), size


def test_refuses_a_meta_file_that_is_no_table(tmp_path: Path) -> None:
    torch.save([torch.ones(3)], tmp_path / "consolidated.00.pth")
    assert "no table of tensors" in refused(tmp_path, make.TINY)


# ---- memory


BIG = {
    "hidden_size": 512,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "num_layers": 3,
}

# The targets are filled first, so that growth is what loading itself needs.
MEASURE = """
import json, os, threading, torch
from multilora.checkpoint.reader import Part, load_checkpoint, read_config
torch.set_num_threads(1)
config = read_config(os.environ["FOLDER"])
shapes = json.loads(os.environ["SHAPES"])
targets = {name: torch.ones(shape) for name, shape in shapes.items()}

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(field + " is unknown")

def watched(name, target):
    def load(read):
        weight = read(name)
        target.copy_(weight)
        samples.append(memory(os.environ["FIELD"]))  # both are in memory: the peak
    return Part({name: tuple(target.shape)}, load)

samples = []
before = memory(os.environ["FIELD"])
load_checkpoint(os.environ["FOLDER"], [watched(*item) for item in targets.items()], config)
samples.append(memory("VmHWM") if os.environ["FIELD"] == "VmRSS" else before)
print(max(samples) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_peak_memory_is_the_model_and_one_tensor(
    tmp_path: Path, run_python: Callable[..., str], layout: str
) -> None:
    if layout == "hf":
        config = make.write_checkpoint(tmp_path, **BIG)
    else:
        config = make.write_meta_checkpoint(tmp_path, shards=2, **BIG)
    shapes = make.weight_shapes(config)
    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    assert sum(sizes) > 64e6
    # Hugging Face: all memory. Meta: the files stay mapped, which the kernel can take back at any
    # time, so only memory of our own is counted.
    field = "VmRSS" if layout == "hf" else "RssAnon"
    env = {"FOLDER": str(tmp_path), "SHAPES": json.dumps(shapes), "FIELD": field}
    grown = int(run_python(MEASURE, OMP_NUM_THREADS="1", **env))
    assert grown <= max(sizes) + 8e6, f"{grown / 1e6:.1f} MB"
