"""How many kernel variants a GPU compiles at start-up, and for how long: asked without a GPU.

    python bench/compile_time.py          # Llama 3.1 8B for sm_90, at most 256 requests at once
    python bench/compile_time.py --shape llama-3.1-70b --settings '{"batch_invariant": true}'

An engine of one layer and a small vocabulary, which change no variant, starts on a stand-in for a
GPU; its launches are compiled and not run. Twice, each time in a new process: with Triton's cache
empty, and full. CPU seconds are those of one core, the assembler's among them; weights and captures
are no part of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkout import load_checkout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--settings", type=json_object, default={}, help="of the engine, as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.shape, args.settings)
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "full"):
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child"],
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                check=False,
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:  # it has said why
                return done.returncode
            found = json.loads(done.stdout.splitlines()[-1])
            count, total = sum(map(len, found.values())), sum(map(sum, found.values()))
            print(f"{count} variants with the cache {state}: {total:.1f} CPU s")
            for kernel, seconds in sorted(found.items()):
                print(f"  {kernel:24} {len(seconds):3} variants, {sum(seconds):5.2f} CPU s")
    return 0


def json_object(text: str) -> dict[str, Any]:
    """What an option says as JSON; a ValueError if that is no object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def child(shape: str, settings: dict[str, Any]) -> int:
    """Prints what is measured, or why a shape or a setting is refused."""
    load_checkout()
    from multilora.errors import MultiloraError

    try:
        print(json.dumps(measure(shape, settings)))
    except MultiloraError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(shape: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """CPU seconds of each variant that the engine's start compiles, by kernel."""
    import pytest

    from multilora.config.engine import EngineConfig
    from multilora.config.presets import shape_of
    from multilora.engine.engine import Engine
    from multilora_kernels.testing.variants import Compiler
    from tests.harness import dry_launches
    from tests.harness.model_folders import hf_config

    seconds: list[float] = []

    class Timed(Compiler):
        def submit(self, key: str, compile: Callable[[], Any], *rest: Any) -> Any:
            start = cpu_seconds()
            compile()
            seconds.append(cpu_seconds() - start)
            return super().submit(key, compile, *rest)

    config = replace(shape_of(shape), num_layers=1, vocab_size=2048, eos_token_ids=(2,))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(config)))
        dry_launches.install(patch)
        wanted = {
            "model": folder, "load_format": "dummy", "skip_tokenizer_init": True, "device": "cuda",
            "max_num_seqs": 256, "max_model_len": 8192, "num_kv_blocks": 16, "lora_pages": 8,
            "enforce_eager": True, **settings,
        }  # fmt: skip
        with dry_launches.launching(compiler=Timed()) as keys:
            Engine(EngineConfig.from_kwargs(**wanted))
    found = defaultdict(list)
    for key, spent in zip(keys, seconds, strict=True):
        found[key.kernel].append(spent)
    return dict(found)


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    sys.exit(main())
