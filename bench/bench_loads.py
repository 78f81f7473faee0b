"""What running requests feel while adapters are read, and what the first request of one waits.

    python bench/bench_loads.py

A random Llama of 132 million parameters in fp32, four requests that decode, and adapters on disk of
ranks 8 to 64 in turn. Gaps are times between two steps that the four see, in milliseconds:

    quiet        nothing else happens
    registered   requests name adapters that are registered, a new one whenever the last is there:
                 they are read beside the steps
    load_adapter the same adapters are loaded between two steps

First tokens: from a request's arrival to its first token, on an adapter that is registered (cold)
and on the same one when it is there (warm), by rank.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from checkout import load_checkout

load_checkout()

from models import write_adapter, write_base  # noqa: E402
from work import SHAPES, rank_of  # noqa: E402

from multilora import Engine, EngineConfig, RequestOutputKind, SamplingParams  # noqa: E402

RUNNING = 4
WAYS = ("quiet", "registered", "load_adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=48)
    parser.add_argument("--shape", default="132m")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = write(Path(root), args.shape, args.adapters)
        print(f"{'way':>13} {'steps':>6} {'median ms':>10} {'p99 ms':>8} {'longest ms':>11}")
        for way in WAYS:
            gaps = sorted(measure(Path(root), folders, way))
            p99 = gaps[int(0.99 * (len(gaps) - 1))]
            print(f"{way:>13} {len(gaps):6} {median(gaps):10.1f} {p99:8.1f} {gaps[-1]:11.1f}")
        print(f"\n{'rank':>13} {'MB':>6} {'cold ms':>10} {'warm ms':>8}")
        for rank, rows in sorted(first_tokens(Path(root), folders).items()):
            size, cold, warm = (median(row[i] for row in rows) for i in range(3))
            print(f"{rank:13} {size:6.2f} {cold:10.1f} {warm:8.1f}")


def write(root: Path, shape: str, count: int) -> list[Path]:
    """The base and as many adapters, each of its own content."""
    write_base(root / "base", SHAPES[shape])
    folders = [root / f"a{i}" for i in range(count)]
    for i, folder in enumerate(folders):
        write_adapter(folder, SHAPES[shape], i)
    return folders


def make_engine(root: Path) -> Engine:
    return Engine(
        EngineConfig(
            model=str(root / "base"),
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=RUNNING + 1,
            num_kv_blocks=1024,
            max_loras=4,
        )
    )


def request(engine: Engine, adapter: str | None, count: int) -> str:
    params = SamplingParams(
        temperature=0,
        max_tokens=count,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    return engine.add_request([5, 6, 7, 8], params, adapter=adapter)


def measure(root: Path, folders: list[Path], way: str) -> list[float]:
    """The gaps until the last adapter has answered, or ten for each where none is loaded."""
    engine = make_engine(root)
    for _ in range(RUNNING):
        request(engine, None, 3000)
    for _ in range(10):
        engine.step()
    for i, folder in enumerate(folders if way == "registered" else ()):
        engine.register_adapter(f"a{i}", folder)
    gaps, waits_for, number = [], "", 0
    most = len(folders) * (10 if way == "quiet" else 1)
    last = time.perf_counter()
    while number < most or waits_for:
        if not waits_for and number < most:
            if way == "load_adapter":
                engine.load_adapter(f"a{number}", folders[number])
            waits_for = request(engine, None if way == "quiet" else f"a{number}", 1)
            number += 1
        for output in engine.step():
            waits_for = "" if output.request_id == waits_for else waits_for
        now = time.perf_counter()
        gaps.append(1e3 * (now - last))
        last = now
    return gaps


def first_tokens(root: Path, folders: list[Path]) -> dict[int, list[tuple[float, float, float]]]:
    """By rank: megabytes in host memory, and milliseconds to the first token, cold and warm."""
    engine, found = make_engine(root), defaultdict(list)
    for i, folder in enumerate(folders):
        name = f"a{i}"
        engine.register_adapter(name, folder)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            request(engine, name, 1)
            while engine.has_work:
                engine.step()
            times.append(1e3 * (time.perf_counter() - start))
        size = engine.adapters[name].num_bytes / 1e6
        found[rank_of(i)].append((size, times[0], times[1]))
    return found


if __name__ == "__main__":
    main()
