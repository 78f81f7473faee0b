"""The GPU's cost model, against sums by hand and the floors that were computed apart from it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_model
import pytest
from gpu_model import H200, LLAMA_8B, LLAMA_70B, Card, Chunk, Kernel, Step, decode, predict, prefill
from work import Shape

ROOT = Path(__file__).resolve().parents[2]
RANKS = (8, 16, 32, 64, 128)

# What LoRA adds to the base's step in percent, batch x adapters, ranks 8 to 128: its weights alone,
# and with x, planes and y both ways. Computed before there was a model, from bytes and flops only.
FLOORS_8B = """
1 x 1     | 0.3 / 0.3 | 0.6 / 0.6 | 1.1 / 1.2 | 2.2 / 2.3 | 4.4 / 4.5
8 x 1     | 0.3 / 0.6 | 0.5 / 0.9 | 1.0 / 1.4 | 2.1 / 2.5 | 4.2 / 4.5
8 x 8     | 2.1 / 2.4 | 4.2 / 4.5 | 8.3 / 8.7 | 16.7 / 17.1 | 33 / 34
32 x 1    | 0.2 / 1.4 | 0.4 / 1.6 | 0.9 / 2.1 | 1.7 / 3.0 | 3.5 / 4.7
32 x 6    | 1.3 / 2.5 | 2.6 / 3.8 | 5.2 / 6.4 | 10.4 / 11.6 | 21 / 22
32 x 32   | 7.0 / 8.2 | 13.9 / 15.1 | 28 / 29 | 56 / 57 | 111 / 113
64 x 8    | 1.4 / 3.4 | 2.8 / 4.8 | 5.7 / 7.7 | 11.4 / 13.4 | 23 / 25
64 x 64   | 11.4 / 13.3 | 22.7 / 24.7 | 46 / 48 | 91 / 93 | 182 / 184
128 x 12  | 1.6 / 4.4 | 3.1 / 6.0 | 6.3 / 9.1 | 12.5 / 15.4 | 25 / 28
256 x 1   | 0.1 / 3.4 | 0.2 / 3.5 | 0.3 / 3.7 | 0.6 / 4.0 | 1.2 / 4.7
256 x 16  | 1.2 / 4.6 | 2.4 / 5.8 | 4.9 / 8.2 | 9.7 / 13.1 | 19 / 23
256 x 256 | 19 / 23 | 39 / 42 | 78 / 81 | 155 / 159 | 311 / 314
"""
FLOORS_70B = """
1 x 1     | 0.1 / 0.2 | 0.3 / 0.3 | 0.6 / 0.6 | 1.2 / 1.2 | 2.4 / 2.4
8 x 8     | 1.2 / 1.4 | 2.3 / 2.5 | 4.7 / 4.9 | 9.4 / 9.6 | 19 / 19
32 x 6    | 0.8 / 1.6 | 1.7 / 2.4 | 3.3 / 4.1 | 6.6 / 7.4 | 13 / 14
32 x 32   | 4.4 / 5.2 | 8.9 / 9.6 | 18 / 18 | 35 / 36 | 71 / 72
64 x 64   | 8.3 / 9.7 | 16.5 / 17.9 | 33 / 34 | 66 / 68 | 132 / 134
256 x 16  | 1.2 / 4.4 | 2.4 / 5.6 | 4.7 / 8.0 | 9.5 / 12.7 | 19 / 22
256 x 256 | 19 / 22 | 38 / 41 | 76 / 79 | 152 / 155 | 303 / 307
"""
# Microseconds of shrink and expand, 8B, rank 16, activations counted and planes not.
SITES = ("qkv", "o", "gate_up", "down")
FLOORS_OF_SITES = """
1 x 1     | 0.09 / 0.05 | 0.03 / 0.03 | 0.06 / 0.24 | 0.11 / 0.03
32 x 8    | 0.8 / 0.6 | 0.3 / 0.4 | 0.6 / 2.6 | 1.1 / 0.4
32 x 32   | 3.0 / 1.7 | 1.0 / 1.1 | 2.0 / 7.7 | 3.6 / 1.1
64 x 64   | 6.0 / 3.3 | 2.1 / 2.2 | 4.0 / 15.4 | 7.3 / 2.2
256 x 16  | 2.0 / 2.2 | 1.0 / 1.5 | 1.5 / 10.3 | 3.4 / 1.5
256 x 256 | 24 / 13 | 8.3 / 8.8 | 16 / 61 | 29 / 8.8
"""


def cells(table: str) -> list[tuple[int, int, list[tuple[str, str]]]]:
    found = []
    for line in table.strip().splitlines():
        case, *columns = line.split("|")
        batch, adapters = map(int, case.split("x"))
        pairs = [tuple(part.strip() for part in column.split("/")) for column in columns]
        found.append((batch, adapters, pairs))
    return found


def close(value: float, printed: str) -> bool:
    """To the printed digits; in a few cells they were rounded from what was rounded already."""
    unit = 10.0 ** -len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.54 * unit


@pytest.mark.parametrize(
    ("shape", "table"), [(LLAMA_8B, FLOORS_8B), (LLAMA_70B, FLOORS_70B)], ids=["8b", "70b"]
)
def test_it_gives_the_floors_of_lora(shape: Shape, table: str) -> None:
    for batch, adapters, pairs in cells(table):
        base = predict(shape, decode(batch)).floor_us / 1e6
        for rank, printed in zip(RANKS, pairs, strict=True):
            step = predict(shape, decode(batch, adapters=adapters, rank=rank))
            lora = [k for k in step.kernels if k.label.startswith("lora")]
            weights = sum(k.count * k.memory for k in lora) / H200.bandwidth
            traffic = sum(k.count * k.bytes for k in lora) / H200.bandwidth
            for value, text in zip((weights, traffic), printed, strict=True):
                assert close(100 * value / base, text), (batch, adapters, rank, value / base, text)


def test_it_gives_the_floors_of_each_site() -> None:
    for batch, adapters, pairs in cells(FLOORS_OF_SITES):
        for site, printed in zip(SITES, pairs, strict=True):
            width = LLAMA_8B.fused[site]
            found = gpu_model.lora(site, width, batch, [16] * adapters, 16 * batch)
            for kernel, text in zip(found, printed, strict=True):
                assert close(kernel.roofline_us(H200), text), (batch, adapters, kernel, text)


def test_it_gives_the_base_steps() -> None:
    weights = sum(k.count * k.memory for k in predict(LLAMA_8B, decode(1, 0)).kernels)
    assert f"{weights / 1e9:.1f}" == "15.0"
    assert f"{1e3 * weights / H200.bandwidth:.2f}" == "3.49"
    large = sum(k.count * k.memory for k in predict(LLAMA_70B, decode(1, 0)).kernels)
    assert f"{large / 1e9:.0f} {1e3 * large / H200.bandwidth:.1f}" == "139 32.3"
    steps = [predict(LLAMA_8B, decode(b)).floor_us / 1e3 for b in (1, 8, 32, 64, 128, 256)]
    assert [f"{step:.1f}" for step in steps] == ["3.5", "3.7", "4.5", "5.5", "7.5", "12.9"]


def test_an_adapter_has_its_bytes() -> None:
    for shape, megabytes in ((LLAMA_8B, "83.9"), (LLAMA_70B, "414.2")):
        lora = predict(shape, decode(1, adapters=1)).kernels
        memory = sum(k.count * k.memory for k in lora if k.label.startswith("lora"))
        assert f"{memory / 1e6:.1f}" == megabytes
        assert memory == 2 * 16 * shape.per_rank


CARD = Card("slow", 1e6, 1e9, 2e9, 1e8, 5.0, 2.0, 3.0, 100.0, 10.0)
SHAPE = Shape(2, 8, 2, 1, 4, 16, 32)


def test_a_kernel_is_bound_by_bytes_by_flops_or_by_its_launch() -> None:
    kernel = Kernel("k", 3, memory=10, activations=20, flops=1000)
    assert kernel.floor_us(CARD) == pytest.approx(10)
    assert kernel.roofline_us(CARD) == kernel.predicted_us(CARD) == pytest.approx(30)
    assert replace(kernel, flops=50_000).floor_us(CARD) == pytest.approx(50)
    assert replace(kernel, flops=50_000, rate="attention").floor_us(CARD) == pytest.approx(500)
    assert replace(kernel, memory=0, activations=1).predicted_us(CARD) == 5
    assert kernel.in_step_us(CARD) == pytest.approx(30 + 2)
    assert replace(kernel, beside="other").in_step_us(CARD) == pytest.approx(30)


def test_a_step_is_bound_by_the_gpu_or_by_the_host() -> None:
    graph, eager = (predict(SHAPE, decode(3, 5, graphs=n), CARD) for n in (1, 0))
    layer = ("rms_norm",) * 2 + ("linear",) * 4 + ("rope", "attention", "merge", "silu_mul")
    assert graph.launches == eager.launches == 2 * len(layer) + 5 + gpu_model.SAMPLE_LAUNCHES
    assert graph.gpu_us == eager.gpu_us
    assert graph.host_us == 100 + 3 * 10 + 3 * 1
    assert eager.host_us == 100 + 3 * 10 + 3 * (eager.launches - gpu_model.SAMPLE_LAUNCHES)
    assert eager.us == max(eager.gpu_us, eager.host_us)
    with_lora = predict(SHAPE, decode(3, 5, adapters=2), CARD)
    assert with_lora.launches == graph.launches + 2 * 8


def test_bits_of_weights_and_kv_count() -> None:
    wide, narrow = (
        {k.label: k for k in predict(LLAMA_8B, decode(4, 100, weight_bits=b, kv_bits=b)).kernels}
        for b in (16, 8)
    )
    for label in ("linear qkv", "linear down", "attention"):
        assert wide[label].memory == 2 * narrow[label].memory
    assert narrow["linear qkv"].rate == "fp8"
    assert wide["linear lm_head"] == narrow["linear lm_head"]  # it stays as it is


def test_a_chunk_sees_what_is_before_it() -> None:
    assert Chunk(1, 100).pairs == 100
    assert Chunk(4, 4).pairs == 1 + 2 + 3 + 4
    assert Chunk(2, 5).pairs == 4 + 5
    halves = [Step((Chunk(50, 50),)), Step((Chunk(50, 100),))]
    whole = prefill(100)
    assert sum(s.chunks[0].pairs for s in halves) == whole.chunks[0].pairs
    assert whole.tokens == 100
    assert not whole.graphs


def test_only_short_sequences_are_cut_into_segments() -> None:
    """8B: four query heads share K and V, so four new tokens are the most."""
    row, kv = 2 * 4096, 2 * 2 * 1024  # bytes of q or the output, of K and V
    cut, whole = (
        gpu_model.attention(LLAMA_8B, Step((Chunk(queries, 1000),))) for queries in (4, 5)
    )
    partial = 4 * 2 * 2 * row  # of each query two segments, in fp32
    assert [k.memory for k in cut] == [k.memory for k in whole] == [1000 * kv, 0]
    assert [k.activations for k in cut] == [4 * row + partial, 4 * row + partial]
    assert [k.activations for k in whole] == [2 * 5 * row, 0]
    assert cut[0].flops == 4 * 4096 * (997 + 998 + 999 + 1000)


def test_a_sampled_row_costs_more_than_a_greedy_one() -> None:
    greedy, drawn = (predict(LLAMA_8B, decode(64, drawn=n)) for n in (0, 64))
    assert 1500 < drawn.gpu_us - greedy.gpu_us < 2500


def test_70b_in_e4m3_fits_the_floor_of_its_bytes() -> None:
    step = predict(LLAMA_70B, decode(1, weight_bits=8, kv_bits=8))
    assert step.floor_us / 1e3 == pytest.approx(16.5, abs=0.1)


def test_the_shapes_are_the_engines() -> None:
    from multilora.config.presets import SHAPES

    for name, shape in (("llama-3.1-8b", LLAMA_8B), ("llama-3.1-70b", LLAMA_70B)):
        assert replace(gpu_model.shape_of(SHAPES[name]), dtype="bfloat16") == shape


def test_it_needs_no_torch() -> None:
    code = "import sys, gpu_model; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", check=True)


def documented() -> list[list[str]]:
    """The rows of the table of targets in docs/gpu.md."""
    text = (ROOT / "docs" / "gpu.md").read_text().partition("## Targets")[2].partition("\n## ")[0]
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row][2:]


def test_the_documented_targets_are_those_that_it_prints() -> None:
    rows = {case: rest for case, *rest in documented()}
    printed = command().stdout.partition("\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(printed) == len(rows) == len(gpu_model.TARGETS) + len(gpu_model.UNPREDICTED)
    for target in gpu_model.TARGETS:
        floor, must, stretch, _ = rows[target.case]
        assert close(gpu_model.added(LLAMA_8B, target)["floor"], floor)
        assert (must, stretch) == (f"<= {target.must:g}", f"<= {target.stretch:g}")
    for line in printed:
        (case,) = (case for case in rows if line.startswith(f"{case}  "))
        _, must, stretch, seen = rows[case]
        assert line.split()[-len(f"{must} {stretch} never".split()) :] == [
            *must.split(), *stretch.split(), seen
        ]  # fmt: skip


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_model.py"), *options],
        cwd=ROOT / "tests",  # where no results are
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no file"),
        ("{", "holds no results of part engine: JSONDecodeError("),
        ("[]", "holds no results of part engine: TypeError("),
        ('{"results": [{"test": "of another part"}]}', "part engine: KeyError('kind')"),
    ],
)
def test_a_file_that_holds_no_results_is_named_in_a_line(
    tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "engine.json"
    if text is not None:
        path.write_text(text)
    done = command("--engine", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{path} ")
    assert said in line


def test_it_prints_what_was_measured(tmp_path: Path) -> None:
    decode_ = {"kind": "decode", "batch": 32}
    results = [
        {**decode_, "case": "base only", "milliseconds": [5.0, 5.0, 5.0]},
        {**decode_, "case": "6 adapters", "adapters": 6, "milliseconds": [5.5, 5.4, 5.6]},
        {**decode_, "case": "LoRA idle", "adapters": 0, "milliseconds": [9.0, 9.0, 9.0]},
        {**decode_, "case": "1 adapters", "batch": 8, "adapters": 1, "milliseconds": [9, 9, 9]},
        {"kind": "prefill", "adapters": None, "tokens_per_second": 110.0},
        {"kind": "prefill", "adapters": 0, "tokens_per_second": 90.0},
        {"kind": "prefill", "adapters": 4, "tokens_per_second": 100.0},
    ]
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"results": results}))
    found = gpu_model.measured(path)
    prompts = "prefill of 8,192 tokens, 4 adapters"
    assert found == pytest.approx({"32 x 6": 10, prompts: 10, gpu_model.IDLE: 80})
    assert gpu_model.measured(tmp_path / "none.json") == {}
    lines = command("--engine", str(path)).stdout.splitlines()
    assert next(line for line in lines if line.startswith("32 x 6")).split()[-1] == "10.0"
    assert next(line for line in lines if line.startswith("8 x 1 ")).split()[-1] == "never"


def test_it_prints_the_worst_of_the_kernels(tmp_path: Path) -> None:
    sizes = {"large": 17_000_000, "small": 15_000_000}
    rates = [("large", 72.5), ("large", 91.0), ("small", 12.0)]
    results: list[dict[str, object]] = [
        {"kind": "lora", "adapter_bytes": sizes[size], "ours": {"percent_of_copy": rate}}
        for size, rate in rates
    ]
    attention = {"kind": "attention", "queries": 1, "percent_of_copy": 84.25}
    results += [{**attention, "seqs": n, "length": 128 * 1024 // n} for n in (32, 16)]
    (tmp_path / "kernels.json").write_text(json.dumps({"results": results}))
    found = gpu_model.measured(tmp_path / "engine.json")
    assert found == {gpu_model.SITE: 72.5, gpu_model.ATTENTION: 84.25}
