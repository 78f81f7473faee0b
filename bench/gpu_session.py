"""An engine of random weights and its work, for the parts "engine" and "profile"."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_model
import torch
from gpu_timing import Bench, Timed, waiting

from multilora.adapters import store
from multilora.adapters.random_adapter import random_adapter
from multilora.config.engine import EngineConfig
from multilora.device.cpu import Device
from multilora.engine.engine import Engine
from multilora.sampling_params import SamplingParams

SETTLE = 4  # steps after the last prompt before a clock runs
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: str
    dtype: str
    rank: int
    adapters: int
    context: int  # tokens of a prompt before decode steps are timed
    steps: int
    prefill: int  # prompt tokens in the prefill case
    prompts: int  # that they are cut into
    chunk: int  # tokens of a step
    batch: int  # most sequences at once

    def answer(self, batch: int, steps: int) -> int:
        """Tokens that each of a batch must get, for all to decode for so many steps."""
        # The first rows go on while the last prompts are computed; none may end before the clock.
        return steps + 2 * SETTLE + 2 * -(-batch * self.context // self.chunk)

    @property
    def max_model_len(self) -> int:
        """With room for twice the steps."""
        return max(self.context + self.answer(self.batch, 2 * self.steps), self.prefill + 16)


class Session:
    """An engine of random weights with adapters a0, a1, ..."""

    def __init__(self, size: Size, bench: Bench, adapters: int, **settings: Any) -> None:
        start = time.perf_counter()
        self.size, self._bench, self._draw = size, bench, random.Random(0)
        self.engine = Engine(
            EngineConfig(
                **{
                    "model": size.model,
                    "load_format": "dummy",
                    "dtype": size.dtype,
                    "device": "cuda",
                    "skip_tokenizer_init": True,
                    "enable_prefix_caching": False,
                    "max_model_len": size.max_model_len,
                    "max_num_seqs": size.batch,
                    "max_num_batched_tokens": size.chunk,
                    "max_loras": max(adapters, 1),
                    "lora_pages": max(adapters, 1) * size.rank // 8,
                    **settings,
                }
            )
        )
        self.vocab = self.engine.model_config.vocab_size
        self.shape = gpu_model.shape_of(self.engine.model_config)
        self._load(adapters)
        self.seconds = time.perf_counter() - start

    def _load(self, adapters: int) -> None:
        """All have one content, to be packed once and not for minutes; each its own rank pages."""
        config, dtype = self.engine.model_config, getattr(torch, self.size.dtype)
        packed: dict[str, Any] = {}
        pack = store.pack

        def once(adapter: Any, site: Any, *rest: Any) -> Any:
            if site.name not in packed:
                packed[site.name] = pack(adapter, site, *rest)
            return packed[site.name]

        with mock.patch.object(store, "pack", once):
            first = random_adapter(config, self.size.rank, 0, dtype=dtype)
            for i in range(adapters):
                self.engine.store.load(f"a{i}", replace(first, digest=f"{i:064x}"))

    def add(self, length: int, new: int, adapter: int | None, **params: Any) -> str:
        """Queues a random prompt."""
        prompt = [self._draw.randrange(self.vocab) for _ in range(length)]
        fields = {"temperature": 0.0, **params}
        fields |= {"max_tokens": new, "ignore_eos": True, "detokenize": False}
        name = None if adapter is None else f"a{adapter}"
        return self.engine.add_request(prompt, SamplingParams(**fields), adapter=name)

    def fill(self, batch: int, adapters: int, steps: int, **params: Any) -> None:
        """Brings a batch to where all of it decodes, and will for so many steps."""
        self.abort_all()  # what a case that failed has left
        new = self.size.answer(batch, steps)
        for i in range(batch):
            self.add(self.size.context, new, i % adapters if adapters else None, **params)
        tokens: dict[str, int] = {}
        while len(tokens) < batch:  # all prompts are computed
            tokens |= {o.request_id: 1 for o in self.engine.step() if o.outputs[0].token_ids}
        for _ in range(SETTLE):
            self.engine.step()

    def timed(self, steps: int, what: str) -> Timed:
        """The next steps."""
        seconds, batch = [], len(self.engine.request_ids)
        with self._bench.watch.timed(what), waiting() as waits:
            for _ in range(steps):
                start = time.perf_counter()
                self.engine.step()
                seconds.append(time.perf_counter() - start)
        assert len(self.engine.request_ids) == batch, "a request ended while the clock ran"
        return Timed(tuple(seconds), waits.seconds)

    def decode(self, batch: int, adapters: int, **params: Any) -> Timed:
        """Decode steps of a batch."""
        self.fill(batch, adapters, self.size.steps, **params)
        found = self.timed(self.size.steps, f"decode {batch} x {adapters}")
        self.abort_all()
        return found

    def decode_step(self, batch: int, adapters: int, drawn: int = 0) -> gpu_model.Step:
        """What a timed decode step computes, for the model."""
        context = self.size.context + SETTLE + self.size.steps // 2
        return gpu_model.decode(batch, context, adapters, self.size.rank, drawn=drawn)

    def prefill(self, adapters: int) -> Timed:
        """The prompts of the prefill case, all as one; they were computed once before."""
        self.queue_prompts(adapters)
        self.run_out()
        self.queue_prompts(adapters)
        with self._bench.watch.timed(f"prefill, {adapters} adapters"), waiting() as waits:
            start = time.perf_counter()
            self.run_out()
            seconds = time.perf_counter() - start
        return Timed((seconds,), waits.seconds)

    def queue_prompts(self, adapters: int) -> None:
        """Queues the prompts of the prefill case."""
        self.abort_all()
        for i in range(self.size.prompts):
            length = self.size.prefill // self.size.prompts
            self.add(length, 1, i % adapters if adapters else None)

    def run_out(self) -> None:
        """Runs until nothing is left to do."""
        while self.engine.has_work:
            self.engine.step()

    def prefill_steps(self, adapters: int) -> list[gpu_model.Step]:
        """What the steps of the prefill case compute, for the model: whole prompts, or chunks."""
        size, length = self.size, self.size.prefill // self.size.prompts
        prompts = max(size.chunk // length, 1)  # in a step
        used = min(adapters, prompts)
        if length <= size.chunk:
            step = gpu_model.prefill(prompts * length, prompts, used, size.rank)
            return [step] * (size.prompts // prompts)
        ends = range(size.chunk, length + 1, size.chunk)
        chunks = [gpu_model.Chunk(size.chunk, end) for end in ends]
        return [gpu_model.Step((c,), (size.rank,) * used, graphs=0) for c in chunks] * size.prompts

    def abort_all(self) -> None:
        """Ends all requests."""
        for request in self.engine.request_ids:
            self.engine.abort(request)

    def predicted_us(self, *steps: gpu_model.Step) -> float:
        """Of several steps, one after the other."""
        return sum(gpu_model.predict(self.shape, step, self._bench.card).us for step in steps)


def release(device: Device) -> None:
    """Gives back the memory of engines that are gone."""
    gc.collect()
    device.memory()


def tiny_model(folder: Path) -> str:
    """Writes the checkpoint of rehearsals."""
    from tests.harness.model_folders import write_checkpoint

    write_checkpoint(folder)
    return str(folder)
