"""Whether anybody ever gets a token of another adapter, while everything about adapters changes.

    python bench/bench_canary.py --save bench/results/canary.json

64 adapters that each say a marker of their own, see canary.py, on a small Llama in fp32: 24
requests at once of single adapters, of mixes of three and of the base, on 8 prompts that all share.
There is room for 6 mixes in slots, for 20 rank pages a site, for 16 adapters in host memory, and
for too few KV blocks. Between steps names are loaded with or registered for another adapter, given
another one's tensors, or unloaded and registered again; requests are aborted. Half of the tokens
come of adapters for all sites, half of adapters for the sites in layers, whose decode steps are
captured.

    wrong tokens    are not the marker of what the request's adapters meant when it got them
    other answers   differ from the request alone in a quiet engine, in a token or in any bit of
                    the five best logprobs of each

Then faults are planted, to show that both are counted: two adapters' pages swapped at one site, and
a prefix cache that does not look at adapters.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import canary
from checkout import load_checkout
from machine import save

load_checkout()

from safetensors.torch import load_file  # noqa: E402

from multilora import Engine, EngineConfig, RequestOutput, SamplingParams  # noqa: E402

NAMES, AT_ONCE, IN_HOST, PROMPTS, MOST_TOKENS = 48, 24, 16, 8, 48
COUNTED = ("tokens", "wrong tokens", "answers", "other answers")
Spec = dict[str, float]  # names with weights; {} = the base
TIGHT = {
    "max_num_seqs": 12,
    "max_num_batched_tokens": 96,
    "num_kv_blocks": 64,
    "max_loras": 6,
    "lora_pages": 20,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    logging.getLogger("multilora").setLevel(logging.ERROR)  # who loses an adapter is a warning each
    results = []
    for name, places in canary.PLACES.items():
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder), canary.Teacher(places))
            found = Churn(world, args.seed).run(args.tokens // len(canary.PLACES))
            faults = (*world.teacher.sites, "prefix cache", "nothing")
            planted = {fault: plant(world, fault) for fault in faults}
        results.append({"adapters": name, **found, "planted": planted})
        show(results[-1])
    if args.save:
        save(args.save, results, seed=args.seed, settings=TIGHT)
    wrong = sum(result[what] for result in results for what in ("wrong tokens", "other answers"))
    sys.exit(f"{wrong} are wrong" if wrong else 0)


def show(result: dict[str, Any]) -> None:
    for name, value in result.items():
        if name != "planted":
            print(f"{name:>20} {value:>10{'' if isinstance(value, str) else ','}}")
    print(f"\n{'planted':>20} {'tokens':>10} {'wrong':>7} {'other answers':>14} {'of':>5}")
    for what, tally in result["planted"].items():
        counts = f"{tally['tokens']:10,} {tally['wrong tokens']:7,} {tally['other answers']:14,}"
        print(f"{what:>20} {counts} {tally['answers']:5,}")
    print(flush=True)


class World:
    """The base, the adapters, the prompts, and what each request is answered alone."""

    def __init__(self, folder: Path, teacher: canary.Teacher) -> None:
        self.teacher, self.base = teacher, folder / "base"
        teacher.write_base(self.base)
        numbers = range(canary.ADAPTERS)
        self.adapters = [teacher.write_adapter(folder / f"a{i}", i) for i in numbers]
        draw = random.Random(0)
        tokens = range(canary.BASE_MARKER + 1, canary.CONFIG.vocab_size)
        start = draw.choices(tokens, k=24)  # of half of them
        self.prompts = [
            [*(start if i % 2 else ()), *draw.choices(tokens, k=draw.choice((3, 12, 40)))]
            for i in range(PROMPTS)
        ]
        self._alone: dict[tuple[int, tuple[int, ...]], list[Any]] = {}
        self._quiet = self.engine(enable_prefix_caching=False, max_num_seqs=1, max_loras=16)
        for i, path in enumerate(self.adapters):
            self._quiet.load_adapter(str(i), path)

    def engine(self, **settings: Any) -> Engine:
        return Engine(
            EngineConfig(
                **{
                    "model": str(self.base),
                    "skip_tokenizer_init": True,
                    "max_model_len": 128,
                    "block_size": 8,
                    **settings,
                }
            )
        )

    def alone(self, prompt: int, adapters: tuple[int, ...], count: int) -> list[Any]:
        """So many tokens, each with its logprobs; all are the marker."""
        found = self._alone.get((prompt, adapters), [])
        if len(found) < count:
            spec = {str(i): float(times) for i, times in Counter(adapters).items()}
            ask(self._quiet, self.prompts[prompt], spec, count)
            [output] = finished(self._quiet)
            found = self._alone[prompt, adapters] = tokens_of(output)
            marker = canary.marker_of(adapters)
            assert {token for token, _ in found} == {marker}, f"{adapters} were not taught"
        return found[:count]

    def compare(self, tally: Counter[str], output: RequestOutput, asked: Asked) -> None:
        """Counts an answer, or what there is of it."""
        given = tokens_of(output)
        if not given:
            return
        assert asked.means is not None, "it was answered without its adapters"
        marker = canary.marker_of(asked.means)
        tally["tokens"] += len(given)
        tally["wrong tokens"] += sum(token != marker for token, _ in given)
        tally["other answers"] += given != self.alone(asked.prompt, asked.means, len(given))
        tally["answers"] += 1


@dataclass(slots=True)
class Asked:
    """A request that runs."""

    prompt: int
    spec: Spec
    means: tuple[int, ...] | None  # its adapters, sorted; None until it has them


def ask(engine: Engine, prompt: list[int], spec: Spec, count: int) -> str:
    params = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, logprobs=5, detokenize=False
    )
    return engine.add_request(prompt, params, adapter=spec)


def finished(engine: Engine) -> list[RequestOutput]:
    steps = iter(lambda: engine.has_work, False)
    return [output for _ in steps for output in engine.step() if output.finished]


def tokens_of(output: RequestOutput) -> list[Any]:
    answer = output.outputs[0]
    return list(zip(answer.token_ids, answer.logprobs or (), strict=True))


@dataclass
class Churn:
    """One engine whose names change their meaning all the time."""

    world: World
    seed: int
    tally: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    asked: dict[str, Asked] = field(default_factory=dict)
    means: dict[str, int] = field(default_factory=dict)  # name -> adapter

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        in_host = IN_HOST * bytes_of(self.world)
        self.engine = self.world.engine(max_host_adapter_bytes=in_host, **TIGHT)
        for i in range(NAMES):
            self.register(f"n{i}")

    def run(self, tokens: int) -> dict[str, int]:
        """Goes on until so many tokens have been compared."""
        start, steps = time.perf_counter(), 0
        while self.tally["tokens"] < tokens:
            steps += 1
            if self.draw.random() < 0.2:
                self.change(f"n{self.draw.randrange(NAMES)}")
                self.note_meanings()
            while len(self.asked) < AT_ONCE:
                self.add()
            if self.draw.random() < 0.01:
                self.abort(self.draw.choice(list(self.asked)))
            outputs = self.engine.step()
            self.note_meanings()
            for output in outputs:
                self.tally["cached prompt tokens"] += output.finished * output.num_cached_tokens
                if output.finished:
                    self.end(output)
            if steps % 50 == 0:
                self.engine.check_integrity()
        stats = self.engine.stats
        return {
            **self.tally,
            "steps": stats.steps,
            "preemptions": stats.preemptions,
            "loads on demand": stats.adapter_loads,
            "evictions, host": stats.adapter_evictions,
            "copies to pages": self.engine.store.num_copies,
            "seconds": round(time.perf_counter() - start),
        }

    def register(self, name: str) -> None:
        self.means[name] = self.draw.randrange(canary.ADAPTERS)
        self.engine.register_adapter(name, self.world.adapters[self.means[name]])

    def change(self, name: str) -> None:
        """Replaces what a name means, in one of four ways, also while requests wait for it."""
        way = self.draw.choice(("registered", "loaded", "given", "unloaded"))
        self.tally[f"{way} anew"] += 1
        if way == "unloaded":
            self.engine.unload_adapter(name)  # who waits for it ends
            self.register(name)
        elif way == "registered":
            self.register(name)
        else:
            number = self.means[name] = self.draw.randrange(canary.ADAPTERS)
            path = self.world.adapters[number]
            if way == "loaded":
                self.engine.load_adapter(name, path)
            else:
                config = json.loads((path / "adapter_config.json").read_text())
                tensors = load_file(path / "adapter_model.safetensors")
                self.engine.load_adapter_from_tensors(name, config, tensors)

    def add(self) -> None:
        count = self.draw.choices((0, 1, 3), (1, 5, 2))[0]
        names = self.draw.sample(sorted(self.means), count)
        prompt = self.draw.randrange(len(self.world.prompts))
        spec = dict.fromkeys(names, 1.0)  # two of them may mean one adapter
        tokens = self.draw.randint(1, MOST_TOKENS)
        request = ask(self.engine, self.world.prompts[prompt], spec, tokens)
        self.asked[request] = Asked(prompt, spec, None)
        self.note_meaning(request)

    def note_meanings(self) -> None:
        for request, asked in self.asked.items():
            if asked.means is None:
                self.note_meaning(request)

    def note_meaning(self, request: str) -> None:
        """What the names of a request mean now, if it has just got its adapters."""
        asked, metrics = self.asked[request], self.engine.output(request).metrics
        assert metrics is not None
        if metrics.adapter_ready_ts:
            asked.means = tuple(sorted(self.means[name] for name in asked.spec))

    def abort(self, request: str) -> None:
        self.tally["aborted"] += 1
        output = self.engine.output(request)
        self.engine.abort(request)
        self.world.compare(self.tally, output, self.asked.pop(request))

    def end(self, output: RequestOutput) -> None:
        asked = self.asked.pop(output.request_id)
        if output.error is None:
            self.world.compare(self.tally, output, asked)
        else:
            assert asked.means is None, output.error
            assert "no adapter" in output.error, output.error
            self.tally["lost their adapter"] += 1


def bytes_of(world: World) -> int:
    """Of an adapter in host memory, on average."""
    engine = world.engine()
    for i in range(4):
        engine.load_adapter(str(i), world.adapters[i])
    return engine.store.host_bytes // 4


# Faults -------------------------------------------------------------------------------------------


def plant(world: World, what: str) -> Counter[str]:
    """What is counted of two adapters that differ in each bit when something is made wrong."""
    engine, tally = world.engine(enable_prefix_caching=what == "prefix cache"), Counter[str]()
    pair = (5, canary.ADAPTERS - 1 - 5)
    for i in pair:
        engine.load_adapter(str(i), world.adapters[i])
        ask(engine, world.prompts[0][:3], {str(i): 1.0}, 1)
    finished(engine)  # both are on the device
    if what in world.teacher.sites:
        swap(engine, pair, what)
    blind = mock.patch("multilora.adapters.activation.mix_identity", return_value=b"")
    with blind if what == "prefix cache" else mock.patch.dict({}):
        for prompt, i in ((p, i) for p in range(PROMPTS // 2) for i in pair):
            ask(engine, world.prompts[prompt], {str(i): 1.0}, 16)
            [output] = finished(engine)
            world.compare(tally, output, Asked(prompt, {}, (i,)))
    return tally


def swap(engine: Engine, pair: tuple[int, int], site: str) -> None:
    """Gives each of two adapters the other's pages at a site."""
    infos, store = engine.adapters, engine.store
    slots = []
    for i in pair:
        mix = ((infos[str(i)].digest, 1.0),)
        slots.append(store.pin(mix))
        store.unpin(mix)
    first, second = (store.table.row(slot, site) for slot in slots if slot is not None)
    for slot, (ids, weights) in zip(slots, (second, first), strict=True):
        assert slot is not None
        store.table.write(slot, site, ids, weights)


if __name__ == "__main__":
    main()
