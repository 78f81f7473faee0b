"""What a step of the engine must cost on a GPU: a roofline for every kernel, and launches.

A kernel takes the larger of `bytes / bandwidth` and `flops / peak`, and never less than
`Card.kernel_us`; from one to the next passes `Card.gap_us`. Bytes are of two sorts: `memory`
(weights, KV, adapters), too much for a cache to hold until the next step, and `activations`, which
one may hold. Floors count the first alone. `python bench/gpu_model.py` prints the numbers of this
model beside the targets, and what was measured where there are results.

Plain Python: a simulator may ask it for the time of any step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from work import FUSED, Shape

LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, 128_256, dtype="bfloat16")
LLAMA_70B = Shape(80, 8192, 64, 8, 128, 28672, 128_256, dtype="bfloat16")


@dataclass(frozen=True)
class Card:
    """A GPU, as fast as a good kernel finds it."""

    name: str
    bandwidth: float  # bytes per second, read and written, of a large copy
    bf16: float  # flops per second of a large matrix product
    fp8: float
    attention: float  # flops per second of a long prompt's attention
    kernel_us: float  # the shortest kernel
    gap_us: float  # from the end of one kernel of a graph to the start of the next
    launch_us: float  # the host's time for a launch of the forward pass, or of a whole graph
    step_us: float  # the host's time for the rest of a step, sampling too,
    row_us: float  # and for each sequence in it


H200 = Card(
    name="H200",
    # NVIDIA's data sheet: 4.8 TB/s. Copies of H100s (3.35) reach some 90% of theirs.
    bandwidth=4.3e12,
    # Data sheet, dense: 989 and 1,979 TFLOP/s at the boost clock. At 700 W large products run at
    # some 80%.
    bf16=790e12,
    fp8=1580e12,
    # FlashAttention-3 (Shah et al., 2024), H100, bf16, causal, head 128, 8k to 16k tokens.
    attention=600e12,
    # A kernel of next to no work takes some 2 us in a graph, and the next starts about 1 us after
    # it: to be measured, `bench/gpu_profile.py` prints both.
    kernel_us=2.0,
    gap_us=1.0,
    # Measured on a busy CPU core with triton 3.6: 14 ms for the 350 launches of an eager 8B step.
    launch_us=40.0,
    # Measured likewise, of decode steps: 0.25 ms at batch 1, 0.9 at 32, 5.5 to 7.2 at 256.
    step_us=250.0,
    row_us=21.0,
)


@dataclass(frozen=True)
class Chunk:
    """What a step computes of one sequence."""

    queries: int  # new tokens
    context: int  # tokens in the KV cache when the step is done, the new ones among them

    @property
    def pairs(self) -> float:
        """Products of a query with a key, causally."""
        return self.queries * (self.context - (self.queries - 1) / 2)


@dataclass(frozen=True)
class Step:
    """What a step computes. Every chunk gives one row of logits."""

    chunks: tuple[Chunk, ...]
    ranks: tuple[int, ...] = ()  # of the adapters in the batch, which have equal shares of it
    drawn: int = 0  # rows that are sampled and not greedy
    graphs: int = 1  # launches of a graph that do the forward pass; 0 = eager
    overlap: bool = True  # shrink runs beside the base's product
    weight_bits: float = 16  # of the base's linears; 8 are e4m3, and multiplied as such
    kv_bits: float = 16

    @property
    def tokens(self) -> int:
        return sum(chunk.queries for chunk in self.chunks)

    @property
    def rank(self) -> float:
        """Of a token, on average."""
        return sum(self.ranks) / max(len(self.ranks), 1)


def decode(batch: int, context: int = 1024, adapters: int = 0, rank: int = 16, **rest: Any) -> Step:
    """A decode step: one token of each of `batch` sequences."""
    return Step((Chunk(1, context),) * batch, (rank,) * adapters, **rest)


def prefill(tokens: int, prompts: int = 1, adapters: int = 0, rank: int = 16, **rest: Any) -> Step:
    """A step of whole prompts of `tokens` together. It runs eagerly."""
    length = tokens // prompts
    return Step((Chunk(length, length),) * prompts, (rank,) * adapters, graphs=0, **rest)


SEGMENT = 512  # tokens of KV
SAMPLE_LAUNCHES, DRAW_LAUNCHES = 12, 60  # of torch's operators, after the graph
DRAW_BYTES = 1000  # for each logit: a sort of (fp32, int64) pairs, softmax in fp64, sums in int64


@dataclass(frozen=True)
class Kernel:
    """One kind of kernel; bytes and flops are those of one launch."""

    label: str  # such as "linear qkv"
    count: int  # launches in a step
    memory: float = 0  # bytes
    activations: float = 0  # bytes
    flops: float = 0
    rate: str = "bf16"  # the field of Card that the flops run at
    beside: str | None = None  # the label of the kernel that it runs beside, on another stream

    @property
    def bytes(self) -> float:
        return self.memory + self.activations

    def floor_us(self, card: Card) -> float:
        """What no cache and no fusion can save."""
        return 1e6 * max(self.memory / card.bandwidth, self.flops / getattr(card, self.rate))

    def roofline_us(self, card: Card) -> float:
        return 1e6 * max(self.bytes / card.bandwidth, self.flops / getattr(card, self.rate))

    def predicted_us(self, card: Card) -> float:
        """Of one launch that has the GPU to itself."""
        return max(self.roofline_us(card), card.kernel_us)

    def in_step_us(self, card: Card) -> float:
        """What one launch adds to a step: beside another one, its bytes or flops alone."""
        return self.roofline_us(card) if self.beside else self.predicted_us(card) + card.gap_us


def lora(
    site: str,
    width: tuple[int, int],  # in, out
    tokens: int,
    ranks: Sequence[int],  # of the adapters
    row_ranks: float,  # the sum of the tokens' ranks
    count: int = 1,
    overlap: bool = False,
) -> list[Kernel]:
    """Shrink and expand at one site: A and B once, x read, planes of fp32 and y both ways."""
    (in_, out), slices = width, len(FUSED[site])
    planes = 4 * slices * row_ranks
    shrink = Kernel(
        f"lora_shrink {site}", count,
        memory=2 * sum(ranks) * slices * in_,
        activations=2 * tokens * in_ + planes,
        flops=2 * row_ranks * slices * in_,
        beside=f"linear {site}" if overlap else None,
    )  # fmt: skip
    expand = Kernel(
        f"lora_expand {site}", count,
        memory=2 * sum(ranks) * out,
        activations=4 * tokens * out + planes,
        flops=2 * row_ranks * out,
    )  # fmt: skip
    return [shrink, expand]


def linear(site: str, width: tuple[int, int], tokens: int, bits: float, count: int) -> Kernel:
    in_, out = width
    return Kernel(
        f"linear {site}", count,
        memory=in_ * out * bits / 8,
        activations=2 * tokens * (in_ + out),
        flops=2.0 * tokens * in_ * out,
        rate="fp8" if bits == 8 else "bf16",
    )  # fmt: skip


def attention(shape: Shape, step: Step, count: int = 1) -> list[Kernel]:
    """The pass over KV, and the join of segments, of sequences with few new tokens."""
    row = 2 * shape.heads * shape.head_dim  # bytes of one token's q, or output
    kv = 2 * shape.kv_heads * shape.head_dim * step.kv_bits / 8  # bytes of one token's K and V
    most = max(16 * shape.kv_heads // shape.heads, 1)
    short = [chunk for chunk in step.chunks if chunk.queries <= most]
    partial = 2 * row * sum(c.queries * -(-c.context // SEGMENT) for c in short)  # in fp32
    memory = sum(c.context for c in step.chunks) * kv
    flops = 4.0 * shape.heads * shape.head_dim * sum(c.pairs for c in step.chunks)
    joined = row * sum(c.queries for c in short)  # their output, which the join writes
    activations = 2 * step.tokens * row - joined + partial
    return [
        Kernel("attention", count, memory, activations, flops, "attention"),
        Kernel("merge", count, activations=joined + partial),
    ]


def kernels(shape: Shape, step: Step) -> list[Kernel]:
    """All kernels of a step, in the order of a layer."""
    tokens, layers, rows = step.tokens, shape.layers, len(step.chunks)
    hidden = 2 * tokens * shape.hidden  # bytes of the residual stream
    qkv = 2 * tokens * shape.fused["qkv"][1]
    found = [
        Kernel("embed", 3, activations=hidden),
        Kernel("rms_norm", 2 * layers + 1, activations=4 * hidden),
    ]
    for site in FUSED:
        width = shape.fused[site]
        found.append(linear(site, width, tokens, step.weight_bits, layers))
        if step.ranks:
            found += lora(site, width, tokens, step.ranks, tokens * step.rank, layers, step.overlap)
        if site == "qkv":
            found.append(Kernel("rope_store_kv", layers, activations=2 * qkv))
            found += attention(shape, step, layers)
        if site == "gate_up":
            found.append(Kernel("silu_mul", layers, activations=6 * tokens * shape.inter))
    found.append(linear("lm_head", shape.fused["lm_head"], rows, 16, 1))
    found.append(
        Kernel("sample", SAMPLE_LAUNCHES, activations=2 * rows * shape.vocab / SAMPLE_LAUNCHES)
    )
    if step.drawn:
        each = DRAW_BYTES * step.drawn * shape.vocab / DRAW_LAUNCHES
        found.append(Kernel("draw", DRAW_LAUNCHES, activations=each))
    return found


@dataclass(frozen=True)
class Prediction:
    """Of a step."""

    kernels: tuple[Kernel, ...]
    floor_us: float  # memory or flops alone
    gpu_us: float
    host_us: float
    launches: int

    @property
    def us(self) -> float:
        """The step's time: the host prepares the next one meanwhile."""
        return max(self.gpu_us, self.host_us)


def predict(shape: Shape, step: Step, card: Card = H200) -> Prediction:
    """What a step costs."""
    found = kernels(shape, step)
    forward = sum(k.count for k in found if k.label not in ("sample", "draw"))
    host = card.step_us + card.row_us * len(step.chunks)
    return Prediction(
        tuple(found),
        floor_us=sum(k.count * k.floor_us(card) for k in found),
        gpu_us=sum(k.count * k.in_step_us(card) for k in found),
        host_us=host + card.launch_us * (step.graphs or forward),
        launches=sum(k.count for k in found),
    )


def shape_of(config: Any) -> Shape:
    """The shape of a `multilora.config.model.ModelConfig`."""
    return Shape(
        config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads,
        config.head_dim, config.intermediate_size, config.vocab_size,
    )  # fmt: skip


# Targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What LoRA may add to the base's step, in percent."""

    batch: int  # sequences; 0 = prompts of 8,192 tokens together, one for each adapter
    adapters: int
    must: float
    stretch: float

    @property
    def case(self) -> str:
        if not self.batch:
            return f"prefill of 8,192 tokens, {self.adapters} adapters"
        return f"{self.batch} x {self.adapters}"

    def step(self, adapters: int, **rest: Any) -> Step:
        if not self.batch:
            return prefill(8192, prompts=self.adapters, adapters=adapters, **rest)
        return decode(self.batch, adapters=adapters, **rest)


IDLE = "no LoRA in the batch"
SITE = "a site beyond 16 MB of adapters, percent of copy bandwidth"
ATTENTION = "decode attention, 32 x 4,096 tokens, percent of copy bandwidth"
UNPREDICTED = ((IDLE, "< 0.5", "0"), (SITE, ">= 70", ">= 85"), (ATTENTION, ">= 80", ">= 90"))
"""Targets with must and stretch of which there is nothing to predict."""

TARGETS = tuple(
    Target(*row)
    for row in (
        (1, 1, 9, 4), (8, 1, 9, 4), (32, 1, 9, 4), (32, 6, 11, 6), (8, 8, 13, 8), (32, 32, 24, 18),
        (64, 8, 11, 6), (64, 64, 33, 27), (256, 16, 11, 6), (256, 256, 55, 46), (0, 4, 9, 4),
    )
)  # fmt: skip


def added(shape: Shape, target: Target, card: Card = H200, **bits: float) -> dict[str, float]:
    """What LoRA adds in percent: floor (weights, or flops), roofline (with x, planes and y both
    ways), predicted; and the base's step in ms, predicted."""
    base, with_lora = (predict(shape, target.step(n, **bits), card) for n in (0, target.adapters))
    of_lora = [k for k in with_lora.kernels if k.label.startswith("lora")]
    return {
        "base_ms": base.us / 1e3,
        "floor": 100 * (with_lora.floor_us / base.floor_us - 1),
        "roofline": 100 * sum(k.count * k.roofline_us(card) for k in of_lora) / base.floor_us,
        "predicted": 100 * (with_lora.us / base.us - 1),
    }


def measured(engine: Path) -> dict[str, float]:
    """What was measured, by case, from the results of part "engine" and of "kernels" beside them.

    ValueError if a file is not what it should be; one that is not there was not measured.
    """
    found: dict[str, float] = {}
    for path, take in ((engine, of_engine), (engine.with_name("kernels.json"), of_kernels)):
        try:
            found |= take(json.loads(path.read_text())["results"]) if path.is_file() else {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            part = f"part {take.__name__.removeprefix('of_')}"
            raise ValueError(f"{path} holds no results of {part}: {error!r}") from error
    return found


def of_engine(results: list[dict[str, Any]]) -> dict[str, float]:
    """What LoRA added in percent."""
    seconds: dict[tuple[int, int], float] = {}  # by batch (0 = prompts) and adapters (0 = the base)
    idle: dict[int, float] = {}  # by batch, with adapters loaded that no row uses
    for r in results:
        if r["kind"] == "decode" and r["case"] in ("base only", f"{r.get('adapters')} adapters"):
            seconds[r["batch"], r.get("adapters", 0)] = r["milliseconds"][0]
        if r["kind"] == "decode" and r["case"] == "LoRA idle":
            idle[r["batch"]] = r["milliseconds"][0]
        if r["kind"] == "prefill" and r["adapters"] != 0:
            seconds[0, r["adapters"] or 0] = 1 / r["tokens_per_second"]
    found = {
        target.case: 100 * (seconds[key] / seconds[target.batch, 0] - 1)
        for target in TARGETS
        if (key := (target.batch, target.adapters)) in seconds and (target.batch, 0) in seconds
    }
    extra = [100 * (idle[b] / seconds[b, 0] - 1) for b in idle if (b, 0) in seconds]
    return found | ({IDLE: max(extra)} if extra else {})


def of_kernels(results: list[dict[str, Any]]) -> dict[str, float]:
    """Percent of the copy bandwidth, of the worst case."""
    rates: dict[str, list[float]] = {SITE: [], ATTENTION: []}
    for r in results:
        if r["kind"] == "lora" and r["adapter_bytes"] > 16e6:
            rates[SITE].append(r["ours"]["percent_of_copy"])
        if r["kind"] == "attention" and (r["seqs"], r["length"], r["queries"]) == (32, 4096, 1):
            rates[ATTENTION].append(r["percent_of_copy"])
    return {case: min(found) for case, found in rates.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, help="results of part engine; build/gpu/engine.json")
    path = parser.parse_args().engine
    try:
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is no file")
        found = measured(path or Path("build/gpu/engine.json"))
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    models = (
        ("Llama 3.1 8B, bf16", LLAMA_8B, {}),
        ("Llama 3.1 70B, bf16 (141 GB: by layers only)", LLAMA_70B, {}),
        ("Llama 3.1 70B, e4m3 weights and KV", LLAMA_70B, {"weight_bits": 8, "kv_bits": 8}),
    )
    seen = {case: f"{value:.1f}" for case, value in found.items()}
    print(f"{H200.name}: what LoRA of rank 16 on all sites adds to the base's step, in percent.")
    for name, shape, bits in models:
        print(f"\n{name}\n{'case':36}{'base ms':>8}{'floor':>7}{'+ rows':>8}{'model':>7}", end="")
        print(f"{'must':>9}{'stretch':>9}{'measured':>10}" if shape is LLAMA_8B else "")
        for target in TARGETS:
            row = added(shape, target, **bits)
            print(f"{target.case:36}{row['base_ms']:8.1f}{row['floor']:7.1f}", end="")
            print(f"{row['roofline']:8.1f}{row['predicted']:7.1f}", end="")
            limits = f"{f'<= {target.must:g}':>9}{f'<= {target.stretch:g}':>9}"
            print(f"{limits}{seen.get(target.case, 'never'):>10}" if shape is LLAMA_8B else "")
        for case, must, stretch in UNPREDICTED if shape is LLAMA_8B else ():
            print(f"{case:66}{must:>9}{stretch:>9}{seen.get(case, 'never'):>10}")


if __name__ == "__main__":
    main()
