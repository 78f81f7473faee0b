"""Experts that read one text: activated LoRA, which shares its KV, beside plain LoRA, which cannot.

    python bench/bench_alora.py

A random Llama of 132 million parameters in fp32. All experts come at once, each with the same
context and an instruction of its own. Activated ones begin at the instruction: the context is the
base's, computed once. Prints the prompt tokens computed, and milliseconds to the first token of the
median and of the last expert, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from checkout import load_checkout

load_checkout()

import torch  # noqa: E402
from bench_checkouts import SHAPE  # noqa: E402

from multilora import Engine, EngineConfig, SamplingParams  # noqa: E402
from multilora.adapters.random_adapter import random_adapter  # noqa: E402

INVOCATION = (3, 4)
INSTRUCTION = 30  # tokens after the context, the invocation among them
RANK = 32
KINDS = ("plain", "activated")


class Found(NamedTuple):
    """What one run of a kind gave."""

    tokens: int  # of prompts, computed
    first: float  # ms to the median expert's first token
    last: float  # ms to the last expert's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default="4,16")
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    print(f"{'experts':>8} {'LoRA':>10} {'tokens':>8} {'median ms':>10} {'last ms':>9}")
    for experts in (int(number) for number in args.experts.split(",")):
        engine = make_engine(experts, args.context, args.layers)
        for kind in KINDS:
            measure(engine, kind, experts, 64)  # pools have their memory
        runs = [
            {kind: measure(engine, kind, experts, args.context) for kind in KINDS}
            for _ in range(args.runs)
        ]
        for kind in KINDS:
            tokens, first, last = (median(run[kind][i] for run in runs) for i in range(3))
            print(f"{experts:8} {kind:>10} {tokens:8.0f} {first:10.0f} {last:9.0f}")


def make_engine(experts: int, context: int, layers: int) -> Engine:
    """An engine with each expert twice, plain and activated."""
    length = -(-(context + INSTRUCTION + 2) // 16) * 16
    with tempfile.TemporaryDirectory() as folder:
        shape = {**SHAPE, "num_hidden_layers": layers, "max_position_embeddings": length}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        engine = Engine(
            EngineConfig(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_num_seqs=experts,
                max_loras=experts,
                max_num_batched_tokens=2048,
                num_kv_blocks=length // 16 * experts,
            )
        )
    for i in range(experts):
        plain = random_adapter(engine.model_config, RANK, i, dtype=torch.float32)
        activated = replace(plain, digest=f"{plain.digest}-activated", invocation=INVOCATION)
        for kind, adapter in zip(KINDS, (plain, activated), strict=True):
            engine.store.load(f"{kind}-{i}", adapter)
    return engine


def measure(engine: Engine, kind: str, experts: int, context: int) -> Found:
    """All experts of a kind on a text that nothing is cached of."""
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    text = [5 + 7 * j % 31_000 for j in range(context)]
    before, start = engine.stats.prompt_tokens, time.perf_counter()
    for i in range(experts):
        instruction = [*INVOCATION, *(100 + i + j for j in range(INSTRUCTION - len(INVOCATION)))]
        engine.add_request(text + instruction, params, adapter=f"{kind}-{i}")
    firsts: dict[str, float] = {}
    while engine.has_work:
        for output in engine.step():
            firsts.setdefault(output.request_id, 1e3 * (time.perf_counter() - start))
    tokens = engine.stats.prompt_tokens - before
    return Found(tokens, median(firsts.values()), max(firsts.values()))


if __name__ == "__main__":
    main()
