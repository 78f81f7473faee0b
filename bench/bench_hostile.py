"""What hostile files cost: adapter folders, base folders and chat templates that mean harm.

    python bench/bench_hostile.py               # 300 adapters, 400 bases, 250 templates
    python bench/bench_hostile.py --seed 7 --adapters 50

Each is made from a good one by one to three changes, drawn from the seed, and loaded as a user
would. Right is a typed error, or to be served: a change may be harmless. `raw` counts exceptions
that are not the package's, and must be 0. Milliseconds are the clock's; MB is how far the peak of
memory rose meanwhile. Needs the extra `test`: it uses the tests' writers of checkpoints.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkout import load_checkout

load_checkout()

from multilora import LLM, Engine, EngineConfig, MultiloraError  # noqa: E402
from tests.harness.adapter_folders import write_adapter  # noqa: E402
from tests.harness.model_folders import TINY, write_checkpoint  # noqa: E402
from tests.harness.paths import UMA  # noqa: E402
from tests.harness.refused_adapters import packed  # noqa: E402

BASE = UMA / "base"
CHAT = [{"role": "user", "content": "hi " * 50}]
DEEP = "[" * 100_000 + "]" * 100_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 8, 10**30, 1e308, -0.5, float("nan"), float("inf")),
    *("", "x", "x" * 1_000_000, "(a+)+$", "(.*)*" * 50, "\ud800", "\x00", "..", "/dev/zero"),
    *([], {}, [[]], ["q_proj"] * 10_000, {str(i): i for i in range(5000)}, {"a": {"b": [1]}}),
)
Change = Callable[[Path, random.Random], object]


@dataclass
class Tally:
    """What came of the cases of one kind. What goes beyond its limits is said."""

    most_ms: float
    most_mb: float
    ends: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Does one and measures it."""
        gc.collect()
        before, start = peak(), time.perf_counter()
        try:
            work()
            end = "served"
        except MultiloraError:
            end = "typed"
        except Exception as error:
            end = "raw"
            print(f"  {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        self.ends[end] += 1
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        self.megabytes.append((peak(reset=False) - before) / 1e6)
        if self.milliseconds[-1] > self.most_ms or self.megabytes[-1] > self.most_mb:
            print(
                f"  {name}: {self.milliseconds[-1]:.0f} ms, {self.megabytes[-1]:.0f} MB", flush=True
            )

    def line(self, name: str) -> str:
        """Counts, median and largest."""
        ms, mb = sorted(self.milliseconds), sorted(self.megabytes)
        counts = "".join(f"{self.ends[end]:8}" for end in ("typed", "served", "raw"))
        return f"{name:10}{len(ms):7}{counts}{ms[len(ms) // 2]:11.1f}{ms[-1]:9.1f}{mb[-1]:9.1f}"


def peak(*, reset: bool = True) -> int:
    """Bytes of the process, and with `reset` its peak is from now on; without, that peak."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# Changes ------------------------------------------------------------------------------------------


def set_fields(name: str) -> Change:
    def change(folder: Path, draw: random.Random) -> None:
        path = folder / name
        if path not in files(folder):
            return
        content = json.loads(path.read_text())
        for key in draw.sample(sorted(content), min(draw.randint(1, 3), len(content))):
            content[key] = draw.choice(VALUES)
        if draw.random() < 0.3:
            content[draw.choice(("unknown", "use_dora", "architectures", "x" * 10_000))] = 1
        path.write_text(json.dumps(content))

    return change


def cut(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size + 1)])


def flip(folder: Path, draw: random.Random) -> None:
    path = draw.choice(files(folder))
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 20)):
        at = draw.randrange(min(len(content), draw.choice((64, 2000, len(content)))) or 1)
        content[at : at + 1] = bytes([draw.randrange(256)])
    path.write_bytes(content)


def replace(folder: Path, draw: random.Random) -> None:
    """A file by what is none, or is something else."""
    path = draw.choice(files(folder))
    path.unlink()
    kind = draw.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to(draw.choice(("/dev/zero", "/dev/urandom", "/proc/self/mem", "/nowhere")))
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(draw.choice((5 << 30, 1 << 40)))  # sparse
    elif kind == 5:
        path.write_text(draw.choice((DEEP, "{" * 200_000, '{"a":' * 50_000, "null", "\ufeff{}")))


def lie(folder: Path, draw: random.Random) -> None:
    """A safetensors header that says what is not so."""
    found = [path for path in files(folder) if path.suffix == ".safetensors"]
    if not found:
        return
    path = draw.choice(found)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[draw.choice(names)]
    entry[draw.choice(("dtype", "shape", "data_offsets"))] = draw.choice(
        ("F32", "I64", "F8_E4M3", [], [2**62], [-1, 4], [1] * 9, [0, 10**15], [4, 0], None, 1.5)
    )
    if draw.random() < 0.3:
        header[draw.choice(("", "x" * 100_000, "../../etc/passwd", names[0] + "\x00"))] = entry
    changed = packed(header, content[8 + length :])
    size = struct.unpack("<Q", changed[:8])[0]
    said = draw.choice((size, size, 2**63, 0, size - 1))
    path.write_bytes(struct.pack("<Q", said) + changed[8:])


def files(folder: Path) -> list[Path]:
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and p.stat().st_size < 1 << 26]
    return found or [folder / "none"]


def changed(good: Path, bad: Path, changes: tuple[Change, ...], draw: random.Random) -> str:
    """A folder with one to three changes; their names."""
    shutil.copytree(good, bad)
    names = []
    for change in draw.choices(changes, k=draw.randint(1, 3)):
        try:
            change(bad, draw)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # an earlier change left nothing to change
        names.append(getattr(change, "__qualname__", "").partition(".")[0])
    return "+".join(names)


# Kinds --------------------------------------------------------------------------------------------


def adapters(count: int, root: Path, draw: random.Random) -> Tally:
    write_checkpoint(root / "base")
    write_adapter(root / "good", TINY, use_dora=True)
    engine = Engine(EngineConfig(model=str(root / "base"), skip_tokenizer_init=True))
    engine.load_adapter("good", root / "good")
    changes = (set_fields("adapter_config.json"),) * 3 + (cut, flip, replace, lie, lie)
    tally, before = Tally(200, 32), engine.adapters["good"]
    for i in range(count):
        name = changed(root / "good", root / f"a{i}", changes, draw)
        tally.run(f"a{i} {name}", lambda i=i: engine.load_adapter("bad", root / f"a{i}"))
        if "bad" in engine.adapters:
            engine.unload_adapter("bad")
        assert engine.adapters == {"good": before}
        shutil.rmtree(root / f"a{i}")
    return tally


def bases(count: int, root: Path, draw: random.Random) -> Tally:
    good = root / "model"
    write_checkpoint(good, vocab_size=json.loads((BASE / "config.json").read_text())["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(BASE / name, good)
    json_files = [path.name for path in sorted(good.glob("*.json"))]
    changes = (*map(set_fields, json_files), set_fields("config.json"), cut, flip, replace, lie)
    tally = Tally(2000, 200)
    for i in range(count):
        name = changed(good, root / f"b{i}", changes, draw)
        tally.run(f"b{i} {name}", lambda i=i: serve(root / f"b{i}"))
        shutil.rmtree(root / f"b{i}")
    return tally


def serve(folder: Path) -> None:
    LLM(str(folder), max_model_len=64, max_num_seqs=2, num_kv_blocks=8, max_loras=2)


PIECES = (
    *("{% for m in messages %}", "{{ m.content }}", "{{ m['role'] }}", "{% endfor %}", "hello"),
    *("{{ messages | tojson }}", "{% set ns = namespace(x=0) %}", "{{ raise_exception('no') }}"),
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}", "{{ 9 ** 9 ** 9 }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{% include 'x' %}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ lipsum(100000) }}", "{{ cycler }}"),
    *("{% set x = 'a' %}{% for i in range(40) %}{% set x = x ~ x %}{% endfor %}", "{{ x"),
    *("{{ '%1000000000d' | format(1) }}", "{{ 'a' | center(10**9) }}", "{% if %}", "\ud800"),
    *("{{ (range(10**7) | list) | length }}", "{{ dict(a=1).popitem }}", "{% extends 'a' %}"),
    *("{{ self }}", "{{ undefined_name.field }}", "{% break %}", "{#", "x" * 100_000),
    *("{{ [0] * 10**9 }}",),
)  # fmt: skip


def templates(count: int, draw: random.Random) -> Tally:
    llm = LLM(str(BASE), dtype="float32", max_model_len=2048)
    tokenizer, tally = llm.get_tokenizer(), Tally(25_000, 200)
    for i in range(count):
        source = "".join(draw.choices(PIECES, k=draw.randint(1, 5)))
        tally.run(
            f"t{i} {source[:60]!r}",
            lambda source=source: tokenizer.apply_chat_template(
                CHAT, chat_template=source, max_length=2047
            ),
        )
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=300)
    parser.add_argument("--bases", type=int, default=400)
    parser.add_argument("--templates", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    draw, lines = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kinds = {
            "adapters": lambda: adapters(args.adapters, root, draw),
            "bases": lambda: bases(args.bases, root, draw),
            "templates": lambda: templates(args.templates, draw),
        }
        raw = 0
        for name, run in kinds.items():
            tally = run()
            raw += tally.ends["raw"]
            lines.append(tally.line(name))
    head = "".join(f"{word:>8}" for word in ("typed", "served", "raw"))
    print(f"{'':10}{'count':>7}{head}{'ms median':>11}{'largest':>9}{'MB':>9}")
    print("\n".join(lines))
    return 1 if raw else 0


if __name__ == "__main__":
    sys.exit(main())
