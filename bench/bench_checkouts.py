"""Two checkouts side by side: a 132M model's decode steps and prompts, in interleaved pairs.

    python bench/bench_checkouts.py OTHER_CHECKOUT --pairs 10

Each run is a process of its own in a checkout whose `.venv` has the package; this checkout is the
newer one. Prints the median of old seconds / new seconds: above 1, the newer one is faster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2304,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
ADAPTERS, RANK = 16, 16
WORK = {"decode, 1 row": (1, 16, 60), "decode, 16 rows": (16, 16, 40), "2 prompts": (2, 1000, 1)}
"""(requests, prompt tokens, new tokens), each request with an adapter of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the older checkout")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--once", action="store_true", help="measure this process's own package")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure()))
        return
    runs = [(once(args.other, args.other), once(ROOT, args.other)) for _ in range(args.pairs)]
    for name in WORK:
        ratios = sorted(old[name] / new[name] for old, new in runs)
        times = [1e3 * median(run[side][name] for run in runs) for side in (0, 1)]
        print(
            f"{name:16} {times[0]:8.2f} -> {times[1]:8.2f} ms, ratio {median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


def once(checkout: Path, other: Path) -> dict[str, float]:
    """What a process of that checkout's own environment measures."""
    command = [str(checkout / ".venv/bin/python"), __file__, str(other), "--once"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure() -> dict[str, float]:
    """Seconds: the median decode step, and the whole of prompts."""
    engine = make_engine()
    for batch in (1, ADAPTERS):
        run(engine, batch, 16, 8)  # kernels, pools and captured steps are there
    found = {}
    for name, (batch, prompt, new) in WORK.items():
        steps = run(engine, batch, prompt, new)
        found[name] = sum(steps) if new == 1 else median(steps)
    return found


def make_engine() -> Any:
    import torch

    from multilora import Engine, EngineConfig

    try:
        from multilora.adapters.random_adapter import random_adapter
    except ImportError:  # before the folders
        from multilora.dummy import random_adapter  # type: ignore[no-redef]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        settings = {"max_model_len": 1024, "max_num_seqs": 16, "max_loras": ADAPTERS}
        engine = Engine(
            EngineConfig(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                **settings,  # type: ignore[arg-type]
            )
        )
    for i in range(ADAPTERS):
        adapter = random_adapter(engine.model_config, RANK, i, dtype=torch.float32)
        engine.store.load(f"a{i}", adapter)
    return engine


def run(engine: Any, batch: int, prompt: int, new: int) -> list[float]:
    """Seconds of each step."""
    from multilora import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    add = getattr(engine, "add_request", None) or engine.add
    for i in range(batch):
        add([5 + (7 * i + j) % 31_000 for j in range(prompt)], params, adapter=f"a{i}")
    steps = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    return steps


if __name__ == "__main__":
    sys.exit(main())
