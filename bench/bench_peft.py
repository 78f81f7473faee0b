"""Ours against transformers + PEFT: one run, one machine, the same weights, prompts and threads.

    python bench/bench_peft.py --json build/bench/peft.json

Three cases, each a batch of 16 prompts of 128 random tokens with 64 greedy tokens to come: in
`distinct` every prompt has its own adapter, in `identical` all have the same, in `base` none.
The model has 132 million random float32 weights. Each repeat runs every case of both sides in turn,
so that a busy machine slows both; the table shows medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import subprocess
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS, HIDDEN, HEADS, KV_HEADS, INTER, VOCAB = 12, 768, 12, 4, 2304, 32_000
HEAD_DIM = HIDDEN // HEADS
LINEARS = {  # name -> (parent, out, in)
    "q_proj": ("self_attn", HIDDEN, HIDDEN),
    "k_proj": ("self_attn", KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": ("self_attn", KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": ("self_attn", HIDDEN, HIDDEN),
    "gate_proj": ("mlp", INTER, HIDDEN),
    "up_proj": ("mlp", INTER, HIDDEN),
    "down_proj": ("mlp", HIDDEN, INTER),
}
RANKS = (8, 16, 32, 64)  # of the adapters, in turn
BATCH, PROMPT, NEW = 16, 128, 64
CASES = ("distinct", "identical", "base")
BASE = "__base__"  # PEFT's name for no adapter


@dataclass(frozen=True)
class Timing:
    """One case of one side, once."""

    side: str
    case: str
    seconds: float  # all of it
    first_seconds: float  # until every sequence has its first token
    tokens: list[list[int]]  # new ids of each prompt

    @property
    def rate(self) -> float:
        """New tokens per second, prefill included."""
        return BATCH * NEW / self.seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first of each sequence."""
        return BATCH * (NEW - 1) / (self.seconds - self.first_seconds)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    model, adapters = write_model(work / "base"), write_adapters(work / "adapters")
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(3, VOCAB, (BATCH, PROMPT), generator=generator).tolist()
    sides: list[Any] = [Ours(model, adapters)]
    if not args.no_peft:
        sides.append(Peft(model, adapters))
    for side in sides:  # warm up: thread pools, buffers, the adapters' pages
        for case in CASES:
            side.run(case, prompts, new=2)
    timings: list[Timing] = []
    for repeat in range(args.repeat):
        for case in CASES:
            for side in sides if repeat % 2 == 0 else sides[::-1]:
                gc.collect()
                timings.append(side.run(case, prompts, new=NEW))
    print_table(timings)
    if not args.no_peft:
        print_agreement(timings)
    if args.profile:
        print_profile(sides[0], prompts)
    if args.json:
        write_json(Path(args.json), timings, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="build/bench", help="where model and adapters are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true", help="run ours only")
    parser.add_argument("--profile", action="store_true", help="show a decode step's operators")
    parser.add_argument("--json", metavar="FILE", help="write the raw results")
    return parser.parse_args()


# What is measured ---------------------------------------------------------------------------------


def adapter_of(case: str, i: int) -> str | None:
    """The adapter of prompt `i`."""
    return {"distinct": f"a{i}", "identical": "a2", "base": None}[case]


class Ours:
    """multilora's engine, fed token ids."""

    def __init__(self, model: Path, adapters: list[Path]) -> None:
        from multilora import LLM

        self.llm = LLM(
            str(model),
            adapters={f"a{i}": path for i, path in enumerate(adapters)},
            dtype="float32",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # every repeat computes its prompts
            max_model_len=PROMPT + NEW,
            max_num_seqs=BATCH,
            max_loras=len(adapters),
            max_num_batched_tokens=512,
        )

    def start(self, case: str, prompts: list[list[int]], *, new: int) -> dict[str, list[int]]:
        """Adds the batch; returns an empty list of new ids by request, in order."""
        from multilora import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine = self.llm.engine
        return {
            engine.add(ids, params, adapter=adapter_of(case, i)): []
            for i, ids in enumerate(prompts)
        }

    def run(self, case: str, prompts: list[list[int]], *, new: int) -> Timing:
        """Runs a case to its end."""
        start, first = time.perf_counter(), 0.0
        tokens = self.start(case, prompts, new=new)
        while self.llm.engine.has_work:
            for output in self.llm.engine.step():
                tokens[output.request_id] = output.outputs[0].token_ids
            if not first and all(tokens.values()):
                first = time.perf_counter() - start
        return Timing("multilora", case, time.perf_counter() - start, first, list(tokens.values()))


class Peft:
    """transformers' generate with a batch of PEFT's `adapter_names`."""

    def __init__(self, model: Path, adapters: list[Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, adapters[0], adapter_name="a0")
        for i, path in enumerate(adapters[1:], 1):
            self.model.load_adapter(path, adapter_name=f"a{i}")
        self.model.eval()

    def run(self, case: str, prompts: list[list[int]], *, new: int) -> Timing:
        """Runs a case to its end; `base` with the adapters taken out of the way."""
        from transformers.generation.streamers import BaseStreamer

        class Clock(BaseStreamer):  # type: ignore[misc, unused-ignore]
            """Notes when the first tokens arrive: `generate` puts the prompt, then each step."""

            def __init__(self) -> None:
                self.times: list[float] = []

            def put(self, value: torch.Tensor) -> None:
                self.times.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids, clock = torch.tensor(prompts), Clock()
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
            "streamer": clock,
        }
        with torch.inference_mode():
            start = time.perf_counter()
            if case == "base":
                with self.model.disable_adapter():
                    out = self.model.generate(ids, **options)
            else:
                names = [adapter_of(case, i) or BASE for i in range(BATCH)]
                out = self.model.generate(ids, adapter_names=names, **options)
            seconds = time.perf_counter() - start
        first = clock.times[1] - start  # the first put is the prompt
        return Timing("peft", case, seconds, first, out[:, PROMPT:].tolist())


# Weights ------------------------------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    """The random Llama, unless it is there."""
    weights_file = folder / "model.safetensors"
    if weights_file.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(), indent=2))
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    weights = {"model.norm.weight": torch.ones(HIDDEN)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = normal(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{path}.{norm}.weight"] = torch.ones(HIDDEN)
        for name, (parent, out, in_) in LINEARS.items():
            weights[f"{path}.{parent}.{name}.weight"] = normal(out, in_)
    save_file(weights, folder / "part", metadata={"format": "pt"})
    (folder / "part").rename(weights_file)  # so that an interrupted run leaves none
    return folder


def hf_config() -> dict[str, Any]:
    """config.json, in the shape of Llama 3.1's."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTER,
        "vocab_size": VOCAB,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,  # nothing ends an answer early
    }


def write_adapters(folder: Path) -> list[Path]:
    """Sixteen adapters on all linears, unless they are there."""
    paths = [folder / f"a{i}" for i in range(BATCH)]
    for i, path in enumerate(paths):
        if (path / "adapter_model.safetensors").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        rank, generator = RANKS[i % len(RANKS)], torch.Generator().manual_seed(100 + i)
        weights = {}
        for layer in range(LAYERS):
            for name, (parent, out, in_) in LINEARS.items():
                module = f"base_model.model.model.layers.{layer}.{parent}.{name}"
                a = torch.randn(rank, in_, generator=generator) / math.sqrt(in_)
                b = torch.randn(out, rank, generator=generator) * 0.1 / math.sqrt(rank)
                weights |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(LINEARS),
            "bias": "none",
            "inference_mode": True,
        }
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
        save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return paths


# What is shown ------------------------------------------------------------------------------------


def print_table(timings: Sequence[Timing]) -> None:
    found: dict[tuple[str, str], list[Timing]] = defaultdict(list)
    for timing in timings:
        found[timing.side, timing.case].append(timing)
    print(f"{'case':<11}{'side':<11}{'tokens/s':>10}{'decode':>10}{'ratio':>8}{'decode ratio':>14}")
    for case in CASES:
        reference = found.get(("peft", case))
        for side in ("multilora", "peft"):
            runs = found.get((side, case))
            if not runs:
                continue
            rate, decode = median(r.rate for r in runs), median(r.decode_rate for r in runs)
            ratios = f"{'':>8}{'':>14}"
            if reference:
                over = rate / median(r.rate for r in reference)
                decode_over = decode / median(r.decode_rate for r in reference)
                ratios = f"{over:>8.2f}{decode_over:>14.2f}"
            print(f"{case:<11}{side:<11}{rate:>10.1f}{decode:>10.1f}{ratios}")


def agreement(timings: Sequence[Timing], case: str) -> tuple[float, float]:
    """Share of (tokens, whole answers) that the last runs of the two sides have in common.

    Tokens are compared place by place, so that one near tie costs all that follows it.
    """
    last = {t.side: t.tokens for t in timings if t.case == case}
    pairs = list(zip(last["multilora"], last["peft"], strict=True))
    same = sum(x == y for ours, theirs in pairs for x, y in zip(ours, theirs, strict=True))
    return same / (BATCH * NEW), sum(ours == theirs for ours, theirs in pairs) / BATCH


def print_agreement(timings: Sequence[Timing]) -> None:
    for case in CASES:
        tokens, whole = agreement(timings, case)
        verdict = "ok" if tokens >= 0.9 else "TOO LOW: below 90%"
        print(f"{case:<11}same tokens {tokens:.1%}, same answers {whole:.1%}: {verdict}")


def print_profile(ours: Ours, prompts: list[list[int]]) -> None:
    """The operators that take the time of eight decode steps with distinct adapters."""
    from torch.profiler import ProfilerActivity, profile

    engine, tokens = ours.llm.engine, ours.start("distinct", prompts, new=NEW)
    while not all(tokens.values()):
        for output in engine.step():
            tokens[output.request_id] = output.outputs[0].token_ids
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(8):
            engine.step()
        seconds = time.perf_counter() - start
    for request_id in tokens:
        engine.abort(request_id)
    print(f"\n8 decode steps, {seconds / 8 * 1e3:.1f} ms each while profiled")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def write_json(path: Path, timings: Sequence[Timing], args: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(t) | {"rate": t.rate, "decode_rate": t.decode_rate} for t in timings]
    result = {"machine": machine(), "arguments": vars(args), "timings": rows}
    path.write_text(json.dumps(result, indent=1))


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    versions = {}
    for name in ("multilora", "torch", "transformers", "peft"):
        try:
            versions[name] = version_of(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": git.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
