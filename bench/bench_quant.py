"""What quantising costs in accuracy: perplexities of the demo's base and experts.

    python bench/bench_quant.py --json build/bench/quant.json

The texts are held out (examples/uma/README.md): job posts, profiles and drafts for the base alone,
and for each expert the right answers to such prompts, with its adapter in full precision on the
quantised base. Everything runs through the engine, which also says how often the token that it
finds likeliest is the one that float32 finds likeliest.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import multilora_kernels as mk
from multilora import LLM, SamplingParams
from multilora.entrypoints.demo import EXPERTS, assets

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization": "int8"},
    "int8, group 128": {"quantization": "int8", "quantization_group_size": 128},
    "int4, group 32": {"quantization": "int4"},
    "int4, group 64": {"quantization": "int4", "quantization_group_size": 64},
    "int4, group 128": {"quantization": "int4", "quantization_group_size": 128},
    "float32, KV int8": {"kv_cache_dtype": "int8"},
    "int8, KV int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
}
BASE = "base"


@dataclass(frozen=True)
class Text:
    """Token ids, of which those from `start` on are scored."""

    ids: list[int]
    start: int
    reader: str  # BASE or an expert


@dataclass(frozen=True)
class Result:
    """One kind of base."""

    kind: str
    num_bytes: int
    perplexity: dict[str, float]  # by reader
    same_token: float  # share of all scored positions


def make_texts(llm: LLM, count: int) -> list[Text]:
    """`count` held-out prompts of each expert for the base, and as many answers for the expert."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "uma"))
    from corpus import answer, make_scene, prompt

    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    texts = []
    for expert in EXPERTS:
        rng = random.Random(f"bench_quant {expert}")
        for _ in range(count):
            scene = make_scene(rng, held=True)
            message = {"role": "user", "content": prompt(expert, scene)}
            asked = tokenizer.apply_chat_template([message])
            reply = tokenizer.encode(answer(expert, scene))
            begin = llm.engine.model_config.bos_token_id
            texts.append(Text(asked, 1, BASE))
            texts.append(Text(asked + [t for t in reply if t != begin], len(asked), expert))
    return texts


def score(llm: LLM, texts: Sequence[Text]) -> tuple[dict[str, float], list[int]]:
    """Perplexity by reader, and the likeliest token at each scored position."""
    outputs = llm.generate(
        [text.ids for text in texts],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
        adapter=[None if text.reader == BASE else text.reader for text in texts],
    )
    losses: dict[str, list[float]] = {}
    best: list[int] = []
    for text, output in zip(texts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for position in range(text.start, len(text.ids)):
            found = output.prompt_logprobs[position]
            assert found is not None
            losses.setdefault(text.reader, []).append(-found[text.ids[position]].logprob)
            best.append(max(found, key=lambda token: found[token].logprob))
    return {reader: math.exp(math.fsum(x) / len(x)) for reader, x in losses.items()}, best


def measure(kind: str, count: int, wanted: list[int]) -> tuple[Result, list[int]]:
    """Scores one kind of base; `wanted` are float32's likeliest tokens, or empty."""
    with assets() as folder:
        llm = LLM(
            folder / "base",
            adapters={name: folder / "adapters" / name for name in EXPERTS},
            dtype="float32",
            max_model_len=1024,
            **KINDS[kind],
        )
    perplexity, best = score(llm, make_texts(llm, count))
    same = sum(a == b for a, b in zip(best, wanted or best, strict=True)) / len(best)
    return Result(kind, llm.engine.memory()["base"], perplexity, same), best


def table(results: Sequence[Result]) -> str:
    """Markdown; what is not float32 has its difference from it."""
    readers = (BASE, *EXPERTS)
    first = results[0]
    lines = [
        f"| weights | MB | {' | '.join(readers)} | same token |",
        "|---|---:|" + "---:|" * (len(readers) + 1),
    ]
    for r in results:
        cells = [r.kind, f"{r.num_bytes / 1e6:.2f}"]
        for reader in readers:
            change = r.perplexity[reader] / first.perplexity[reader] - 1
            cells.append(
                f"{r.perplexity[reader]:.3f}" + ("" if r is first else f" ({change:+.1%})")
            )
        lines.append(f"| {' | '.join(cells)} | {r.same_token:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measures every kind and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=25, help="of each expert")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    results: list[Result] = []
    wanted: list[int] = []
    for kind in KINDS:
        result, best = measure(kind, args.texts, wanted)
        wanted = wanted or best
        results.append(result)
    print(table(results))
    print(f"\n{len(wanted)} scored tokens; C++ {mk.HAS_CPP}; {platform.processor()}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"torch": torch.__version__, "cpp": mk.HAS_CPP, "texts": args.texts}
        content = {**facts, "results": [asdict(r) for r in results]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
