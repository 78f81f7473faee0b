"""`multilora info`: against numbers computed by hand, without a weight or a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from multilora.device.cpu import DeviceMemory
from multilora.entrypoints.commands.info import parse_size
from multilora.errors import ConfigError
from tests.harness.command_line import run
from tests.harness.fake_cuda import FakeCuda, install
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.tiny_engines import make_engine

ROOT = Path(__file__).resolve().parents[4]
B8, B70 = "llama-3.1-8b", "llama-3.1-70b"


def table(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, tuple[int, str]]:
    """Name -> (number, what stands behind it) of each line."""
    code, out, err = run(capsys, "info", *args)
    assert (code, err) == (0, "")
    return {
        line[:38].rstrip(): (int(line[38:54].replace(",", "")), line[54:].strip())
        for line in out.splitlines()
    }


def test_8b_on_a_gpu_of_80_gib(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters as published. A token's KV: K and V, 32 layers, 8 heads of 128, 2 bytes each."""
    found = table(capsys, B8, "--device", "cuda", "--memory", "80GiB", "--max-model-len", 8192)
    numbers = {name: number for name, (number, _) in found.items()}
    assert numbers["parameters"] == 8_030_261_248
    assert numbers["base in float32"] == 4 * 8_030_261_248
    assert numbers["base in bfloat16"] == numbers["base in float16"] == 2 * 8_030_261_248
    assert numbers["KV of a token"] == 2 * 32 * 8 * 128 * 2 == 131_072
    assert numbers["KV of 8,192 tokens"] == 8192 * 131_072
    columns = (3 + 1 + 2) * 4096 + 14336 + (6144 + 4096 + 28672 + 4096)
    page = 32 * 8 * 2 * columns
    assert numbers["rank pages of an adapter of rank 16"] == 2 * page == 83_886_080
    assert numbers["rank pages"] == 64 * page == 2_684_354_560
    fixed = numbers["all but KV"]
    parts = ("base in bfloat16", "rank pages", "activations", "graphs")
    assert fixed == sum(numbers[part] for part in parts)
    assert 19_100_000_000 < fixed < 19_200_000_000  # 16.06 + 2.68 + 0.42 GB
    # 0.9 x 85.9 GB less 19.16 GB is 58.15 GB: 54 requests of 1.07 GB, and a part of another
    assert numbers["memory"] == 80 * 2**30
    assert numbers["requests of 8,192 tokens at once"] == 54
    assert found["adapters of rank 16 resident"] == (16, "max_loras")


def test_8b_quantised_on_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    """int8: a byte for each weight of a linear and a scale of 4 for each output."""
    linears = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    outputs = 32 * (6144 + 4096 + 28672 + 4096)
    rest = 128_256 * 4096 + 4 * 128_256 + 2 * (128_256 * 4096 + 65 * 4096)
    options = ("--quantization", "int8", "--kv-cache-dtype", "int8", "--max-model-len", 8192)
    found = table(capsys, B8, *options, "--memory", "64GB", "--lora-rank", 256)
    int8, int4 = (found[f"base in {name}, the rest in bfloat16"] for name in ("int8", "int4"))
    assert int8[0] == linears + 4 * outputs + rest
    assert int8[1].endswith("chosen")
    assert int4[0] == linears // 2 + 4 * linears // 32 + rest
    assert found["KV of a token"] == (65_536, "bytes   65.54 kB  int8")
    # 64 GB less 14.18 GB is 49.82 GB: 92 requests of 0.54 GB
    count, note = found["requests of 8,192 tokens at once"]
    assert count == 64
    # 4 GiB of KV hold 8 of them
    assert note == "max_num_seqs; there is room for 92; 8 unless num_kv_blocks=32768"
    # 128 pages at each linear, 32 of an adapter
    assert found["adapters of rank 256 resident"] == (4, "128 at each linear: lora_pages")
    found = table(capsys, B8, *options, "--memory", "64GB", "--max-num-seqs", 100)
    assert found["requests of 8,192 tokens at once"][0] == 92


def test_70b_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """K and V of 80 layers, 8 heads of 128. The weights of 141 GB need more than one H100."""
    options = (B70, "--device", "cuda", "--max-model-len", 32_768)
    code, out, err = run(capsys, "info", *options, "--memory", "80GiB")
    assert code == 1
    assert "parameters" in out
    assert err.startswith("error: llama-3.1-70b needs ")
    assert "The weights alone do not fit" in err
    found = table(capsys, *options, "--memory", "192GB", "--kv-cache-dtype", "fp8")
    assert found["parameters"][0] == 70_553_706_496
    assert found["base in bfloat16"] == (141_107_412_992, "bytes  141.11 GB  chosen")
    assert found["KV of a token"][0] == 2 * 80 * 8 * 128 == 163_840
    assert found["KV of 32,768 tokens"][0] == 163_840 * 32_768 == 5_368_709_120
    assert found["rank pages"][0] == 64 * 207_093_760
    # 0.9 x 192 GB less 141.11 + 13.25 + 0.76 GB is 17.7 GB: 3 requests of 5.37 GB
    assert found["requests of 32,768 tokens at once"] == (3, "")


def test_a_host_that_holds_no_request_says_what_it_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "requests of 131,072 tokens at once"
    count, note = table(capsys, B8, "--memory", "30GB")[name]
    # 30 GB less 21.78 GB is 8.22 GB: 3,917 blocks of 2 MiB
    assert (count, note) == (0, "there is room for 62,672 tokens: lower max_model_len")
    count, note = table(capsys, B8, "--memory", "20GB")[name]
    assert (count, note[:27]) == (0, "all but KV is more than is ")
    code, _, err = run(capsys, "info", B8, "--memory", "8GB")
    assert code == 1
    assert "16.06 GB, and this machine has 8.00 GB" in err


def test_a_folder_needs_no_weights_and_is_counted_as_an_engine_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path)
    memory = make_engine(tmp_path).memory()
    for path in tmp_path.iterdir():
        if path.name != "config.json":
            path.unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    settings = ("--max-num-seqs", 8, "--max-loras", 4, "--max-model-len", 256, "--memory", "1GB")
    found = table(capsys, tmp_path, *settings, "--num-kv-blocks", 64)
    assert found["base in float32"] == (memory["base"], found["base in float32"][1])
    each = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    assert config["num_hidden_layers"] == TINY.num_layers
    assert found["KV of a token"][0] == each
    assert found["requests of 256 tokens at once"][0] == 4


def test_without_memory_it_asks_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = DeviceMemory(free=60_000_000_000, total=64_000_000_000)
    monkeypatch.setattr("multilora.device.cpu.host_memory", lambda: here)
    found = table(capsys, B8)
    assert found["memory"] == (64_000_000_000, "bytes   64.00 GB  of which 60.00 GB are free")
    # 60 GB less 21.78 GB is 38.2 GB
    assert found["requests of 131,072 tokens at once"][0] == 2
    monkeypatch.setattr("multilora.device.cpu.host_memory", lambda: None)
    code, _, err = run(capsys, "info", B8)
    assert code == 1
    assert "give --memory" in err


def test_a_gpu_of_this_machine_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    gpu = FakeCuda()
    free = DeviceMemory(free=82_000_000_000, total=85_000_000_000)
    monkeypatch.setattr(gpu, "memory", lambda: free)
    monkeypatch.setattr("multilora.device.select.open_device", lambda _: gpu)
    for device in ("cuda", "auto"):
        found = table(capsys, B8, "--device", device, "--max-model-len", 8192)
        assert found["memory"][1].endswith("of which 82.00 GB are free")
        assert found["rank pages"][0] == 64 * 41_943_040  # 4 a slot
        # 0.9 x 85 GB less 3 GB of others and 19.16 GB is 54.3 GB
        assert found["requests of 8,192 tokens at once"] == (50, "")


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The examples in docs/command-line.md; README.md has lines of the first."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```\n\$ multilora (info .*)\n((?:.*\n)+?)```$", page, re.MULTILINE)
    assert len(examples) == 3
    for command, shown in examples:
        line, _, tail = command.partition(" | tail -")
        _, out, err = run(capsys, *line.split())
        assert "".join(out.splitlines(keepends=True)[-int(tail or 0) :]) + err == shown
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "".join(examples[0][1].splitlines(keepends=True)[-5:]) in readme


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("64 GB", 64 * 10**9), ("1.5TB", 15 * 10**11), ("4096", 4096)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "80G", "80gib", "GiB", "-1GB", "1e9", "nanGB", "80 Gib"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="80GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("llama-9",), "llama-3.1-70b"),
        ((B8, "--memory", "much"), "--memory must be a size"),
        ((B8, "--lora-rank", 0), "--lora-rank must be from 1"),
        ((B8, "--lora-rank", 513), "max_lora_rank 512"),
        ((B8, "--max-model-len", 131_073), "max_model_len"),
        ((B8, "--dtype", "int4"), "dtype"),
        ((B8, "--kv-cache-dtype", "fp8", "--memory", "80GB"), "needs a GPU"),
        ((B8, "--device", "cuda", "--memory", "80GB", "--quantization", "int8"), "device='cpu'"),
        ((B8, "--device", "cuda"), "--memory 80GiB"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = run(capsys, "info", *options)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
