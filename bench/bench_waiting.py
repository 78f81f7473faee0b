"""What those who wait cost a step: requests whose adapters find no slot, beside two that run.

    python bench/bench_waiting.py

The demo's base; two slots, both taken; request slots and KV blocks are free. Medians of the steps'
processor time, in milliseconds; the first row is the step with nobody waiting.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from checkout import load_checkout

load_checkout()

from multilora import Engine, EngineConfig, SamplingParams  # noqa: E402
from tests.harness.paths import UMA  # noqa: E402

RUN = ("job-analysis", "proposal")
WAIT = "feedback"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--waiting", default="0,100,1000,10000")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print(f"{'waiting':>8}{'one mix':>10}{'each its own':>14}   ms a step")
    for count in (int(number) for number in args.waiting.split(",")):
        one, own = (measure(count, args.steps, distinct=distinct) for distinct in (False, True))
        print(f"{count:8,}{one:10.2f}{own:14.2f}")


def measure(count: int, steps: int, *, distinct: bool) -> float:
    """Milliseconds of a step beside `count` waiting requests, of one mix or of one each."""
    config = EngineConfig(
        model=str(UMA / "base"), dtype="float32", max_model_len=256, max_num_seqs=16, max_loras=2
    )
    engine = Engine(config)
    for name in (*RUN, WAIT):
        engine.load_adapter(name, UMA / "adapters" / name)
    params = SamplingParams(temperature=0, max_tokens=steps + 20, ignore_eos=True)
    for name in RUN:
        engine.add_request((5, 6, 7), params, adapter=name)
    for _ in range(5):
        engine.step()
    for i in range(count):
        weight = 1 + i / 1e5 if distinct else 1.0
        engine.add_request((5, 6, 7), params, adapter={WAIT: weight})
    times = []
    for _ in range(steps):
        start = time.process_time()
        engine.step()
        times.append(time.process_time() - start)
    assert (engine.stats.running, engine.stats.waiting) == (2, count)
    return 1e3 * median(times)


if __name__ == "__main__":
    main()
