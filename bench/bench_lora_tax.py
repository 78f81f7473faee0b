"""What LoRA costs: steps with adapters beside steps of the base alone, in interleaved runs.

    python bench/bench_lora_tax.py --shape 132m,1b --precision fp32,bf16

Random weights on a CPU. For each batch a decode step and the prompts, of 128 tokens a request, in
milliseconds, and what they take more than `without`, medians of the runs' ratios:

    without    an engine that has never seen an adapter
    unused     one with 16 adapters in their slots, all requests on the base
    rank 16    all requests on one adapter of that rank
    rank 64    the same (one request), or
    distinct   an adapter for each request, of ranks 8, 16, 32 and 64 in turn

`bytes` is what reading those adapters once adds to reading the weights once: what a decode step
must take more on a machine that does nothing but read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from checkout import load_checkout

load_checkout()

import torch  # noqa: E402
from models import config_of  # noqa: E402
from work import SHAPES, Shape, rank_of  # noqa: E402

from multilora import Engine, EngineConfig, SamplingParams  # noqa: E402
from multilora.adapters.random_adapter import random_adapter  # noqa: E402
from tests.harness.model_folders import hf_config  # noqa: E402

ADAPTERS, PROMPT = 16, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK_16, RANK_64 = 1, 3  # adapters of those ranks
Times = tuple[float, float]  # ms of a decode step, ms of the prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="132m", help="of " + ", ".join(SHAPES))
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    print("| shape | precision | batch | adapters | decode ms | prompts ms | more | more | bytes |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    for name in args.shape.split(","):
        for precision in args.precision.split(","):
            shape, dtype = SHAPES[name], DTYPES[precision]
            engines = {way: make_engine(shape, dtype, loaded=way) for way in (False, True)}
            for batch in (int(number) for number in args.batch.split(",")):
                for row in compare(engines, shape, batch, args.runs, args.steps):
                    print(f"| {name} | {precision} | {batch} | {row} |", flush=True)


def ways_of(batch: int) -> dict[str, list[int | None]]:
    """The adapter of each request, by way."""
    last: dict[str, list[int | None]] = (
        {"rank 64": [RANK_64]} if batch == 1 else {"distinct": [*range(batch)]}
    )
    base: list[int | None] = [None] * batch
    return {"without": base, "unused": base, "rank 16": [RANK_16] * batch, **last}


def compare(
    engines: dict[bool, Engine], shape: Shape, batch: int, runs: int, steps: int
) -> list[str]:
    """A table row for each way."""
    ways, times = ways_of(batch), defaultdict(list)
    for number in range(runs + 2):
        for way, adapters in ways.items():
            found = measure(engines[way != "without"], adapters, steps)
            if number >= 2:  # by then memory is touched and steps are captured
                times[way].append(found)
    rows = []
    for way, adapters in ways.items():
        decode, prompts = (median(run[i] for run in times[way]) for i in range(2))
        pairs = list(zip(times[way], times["without"], strict=True))
        ratios = (median(own[i] / other[i] for own, other in pairs) for i in range(2))
        more = [f"{100 * (ratio - 1):+.1f}%" for ratio in ratios]
        ranks = sum(rank_of(i) for i in set(adapters) if i is not None)
        floor = 100 * ranks * shape.per_rank / (shape.body + shape.head)
        rows.append(f"{way} | {decode:.2f} | {prompts:.0f} | {more[0]} | {more[1]} | +{floor:.1f}%")
    return rows


def make_engine(shape: Shape, dtype: torch.dtype, *, loaded: bool) -> Engine:
    config = config_of(shape)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(config)))
        engine = Engine(
            EngineConfig(
                model=folder,
                load_format="dummy",
                dtype=dtype,  # type: ignore[arg-type]
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                max_model_len=512,
                max_num_seqs=ADAPTERS,
                max_loras=ADAPTERS,
            )
        )
    for i in range(ADAPTERS if loaded else 0):
        adapter = random_adapter(engine.model_config, rank_of(i), i, dtype=dtype)
        engine.store.load(f"a{i}", adapter)
    return engine


def measure(engine: Engine, adapters: list[int | None], steps: int) -> Times:
    """One run of a request for each of these adapters."""
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
    for i, adapter in enumerate(adapters):
        ids = [5 + (7 * i + j) % (engine.model_config.vocab_size - 5) for j in range(PROMPT)]
        engine.add_request(ids, params, adapter=None if adapter is None else f"a{adapter}")
    times = []
    while engine.has_work:
        before = engine.stats.prompt_tokens
        start = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - start
        times.append((engine.stats.prompt_tokens > before, 1e3 * seconds))
    prompts = sum(ms for has_prompt, ms in times if has_prompt)
    return median(ms for has_prompt, ms in times if not has_prompt), prompts


if __name__ == "__main__":
    main()
