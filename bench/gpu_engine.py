"""Part "engine" of `bench/gpu.py`: whole steps of an 8B shape with random weights.

Decode steps without adapters, with adapters that are idle, and with 1 to 64 of them; prompts with
and without LoRA; the workloads of the Punica paper; the same batch in transformers and PEFT.
"""

from __future__ import annotations

import gc
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_common import Report, parse, say
from gpu_kernels import slots_of

from multilora.adapters.random_adapter import random_adapter
from multilora.config.engine import EngineConfig
from multilora.config.model import ModelConfig
from multilora.config.presets import shape_of
from multilora.device.cpu import Device
from multilora.engine.engine import Engine
from multilora.sampling_params import SamplingParams


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
    chunk: int  # tokens of a step
    requests: int  # of a Punica workload
    answer: int  # longest answer of one
    batch: int  # requests at once
    decodes: tuple[tuple[int, int], ...]  # (batch, adapters in it); 0 = loaded, but the base's


FULL = Size(
    model="llama-3.1-8b",
    dtype="bfloat16",
    rank=16,
    adapters=64,
    context=1024,
    steps=48,
    prefill=8192,
    chunk=4096,
    requests=64,
    answer=128,
    batch=32,
    decodes=(
        *((1, 1), (32, 0), (32, 32), (8, 8), (64, 64), (64, 8), (32, 6)),
        *((64, 0), (1, 0), (32, 1), (32, 8), (8, 1)),
    ),
)
TINY = Size(
    model="",  # a checkpoint that is written for it
    dtype="bfloat16",
    rank=8,
    adapters=4,
    context=20,
    steps=4,
    prefill=64,
    chunk=32,
    requests=4,
    answer=3,
    batch=4,
    decodes=((1, 1), (4, 0), (4, 4), (4, 2)),
)
PEFT_ADAPTERS = 8  # each adapter takes PEFT about a second to add
POPULARITIES = ("distinct", "uniform", "zipf", "identical")


class Session:
    """An engine of random weights with adapters a0, a1, ..."""

    def __init__(self, size: Size, device: Device, adapters: int, **settings: Any) -> None:
        start = time.perf_counter()
        length = max(size.context + 4 * size.steps + 16, size.prefill + 16, 512 + size.answer)
        self.size = size
        self.engine = Engine(
            EngineConfig(
                **{
                    "model": size.model,
                    "load_format": "dummy",
                    "dtype": size.dtype,
                    "device": "cuda",
                    "skip_tokenizer_init": True,
                    "enable_prefix_caching": False,
                    "max_model_len": length,
                    "max_num_seqs": max(batch for batch, _ in size.decodes),
                    "max_num_batched_tokens": size.chunk,
                    "max_loras": max(adapters, 1),
                    "lora_pages": max(adapters, 1) * size.rank // 8,
                    **settings,
                }
            )
        )
        self.vocab = self.engine.model_config.vocab_size
        dtype = getattr(torch, size.dtype)
        for i in range(adapters):
            one = random_adapter(self.engine.model_config, size.rank, i, dtype=dtype)
            self.engine.store.load(f"a{i}", one)
        self.seconds = time.perf_counter() - start
        self._draw = random.Random(0)

    def add(self, length: int, new: int, adapter: int | None) -> str:
        """Queues a random prompt."""
        prompt = [self._draw.randrange(self.vocab) for _ in range(length)]
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        name = None if adapter is None else f"a{adapter}"
        return self.engine.add_request(prompt, params, adapter=name)

    def decode(self, batch: int, adapters: int) -> list[float]:
        """Seconds of each decode step of a batch."""
        # The first rows go on while the last prompts are computed; none may end before the clock.
        new = self.size.steps + 8 + 2 * -(-batch * self.size.context // self.size.chunk)
        for i in range(batch):
            self.add(self.size.context, new, i % adapters if adapters else None)
        tokens: dict[str, int] = {}
        while len(tokens) < batch:  # all prompts are computed
            tokens |= {o.request_id: 1 for o in self.engine.step() if o.outputs[0].token_ids}
        for _ in range(4):
            self.engine.step()
        times = []
        for _ in range(self.size.steps):
            start = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - start)
        assert len(self.engine.request_ids) == batch, "a request ended while the clock ran"
        self.abort_all()
        return times

    def prefill(self, adapters: int) -> float:
        """Prompt tokens per second, over four prompts at once."""
        count = 4
        for i in range(count):
            self.add(self.size.prefill // count, 1, i % adapters if adapters else None)
        start = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return self.size.prefill / (time.perf_counter() - start)

    def punica(self, popularity: str) -> dict[str, float]:
        """A closed loop: a batch of requests at any time, adapters by popularity."""
        draw, count, batch = random.Random(1), self.size.requests, self.size.batch
        slots = slots_of(popularity, min(count, self.size.adapters))
        draw.shuffle(slots)
        # Prompts and answers vary as in chats: most are short.
        sizes = [
            (int(draw.triangular(8, 512, 64)), int(draw.triangular(4, self.size.answer, 64)))
            for _ in range(count)
        ]
        if self.size.answer < 64:
            sizes = [(8, self.size.answer) for _ in range(count)]
        waiting = list(range(count))[::-1]
        begun: dict[str, float] = {}
        first: dict[str, float] = {}
        start, tokens, running = time.perf_counter(), 0, 0
        while waiting or running:
            while waiting and running < batch:
                i = waiting.pop()
                begun[self.add(*sizes[i], slots[i % len(slots)])] = time.perf_counter()
                running += 1
            for output in self.engine.step():
                first.setdefault(output.request_id, time.perf_counter())
                if output.finished:
                    tokens += len(output.outputs[0].token_ids)
                    running -= 1
        seconds = time.perf_counter() - start
        waits = sorted(first[i] - begun[i] for i in begun)
        return {
            "tokens_per_second": tokens / seconds,
            "time_to_first_token_median": median(waits),
            "time_to_first_token_p99": waits[int(0.99 * (len(waits) - 1))],
        }

    def abort_all(self) -> None:
        """Ends all requests."""
        for request in self.engine.request_ids:
            self.engine.abort(request)


def groups(size: Size, device: Device) -> Sequence[tuple[str, Callable[[Report], None]]]:
    """The cases in groups, the most telling first; a group shares its engines."""

    def base(report: Report) -> None:
        session = Session(size, device, 0)
        report.content["start_seconds"] = round(session.seconds, 1)
        report.content["memory"] = session.engine.memory()
        for batch in sorted({batch for batch, _ in size.decodes}, reverse=True):
            report.add(
                kind="decode", case="base only", batch=batch, **spread(session.decode(batch, 0))
            )
        report.add(kind="prefill", adapters=None, tokens_per_second=session.prefill(0))

    def adapted(report: Report) -> None:
        session = Session(size, device, size.adapters)
        for batch, adapters in size.decodes:
            case = f"{adapters} adapters" if adapters else "LoRA idle"
            times = session.decode(batch, adapters)
            report.add(kind="decode", case=case, batch=batch, adapters=adapters, **spread(times))
        for adapters in (0, 1, 4):
            rate = session.prefill(adapters)
            report.add(kind="prefill", adapters=adapters, tokens_per_second=rate)
        for popularity in POPULARITIES:
            report.add(kind="punica", popularity=popularity, **session.punica(popularity))

    def sequential(report: Report) -> None:
        settings = {"overlap_lora": False, "async_scheduling": False}
        for name, value in settings.items():
            session = Session(size, device, size.adapters, **{name: value})
            for adapters in (size.batch, 1):
                times = session.decode(size.batch, adapters)
                report.add(
                    kind="decode",
                    case=f"{name}={value}",
                    batch=size.batch,
                    adapters=adapters,
                    **spread(times),
                )
            del session
            release(device)

    theirs = partial(peft, size, device)
    return (
        ("base", base),
        ("adapted", adapted),
        ("peft", theirs),
        ("one thing switched off", sequential),
    )


def peft(size: Size, device: Device, report: Report) -> None:
    """transformers and PEFT: the decode steps of one batch with mixed adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = shape_of(size.model)
    with device.torch:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**hf_fields(config)), dtype=getattr(torch, size.dtype)
        )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=size.rank, target_modules=linears, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, adapter_name="a0").eval()
    for i in range(1, PEFT_ADAPTERS):
        model.add_adapter(f"a{i}", lora)
    model.eval()
    ids = torch.randint(3, config.vocab_size, (size.batch, size.context), device=device.torch)
    for adapters in (PEFT_ADAPTERS, 1):
        names = [f"a{i % adapters}" for i in range(size.batch)]
        seconds = []
        for new in (1, 1 + size.steps // 4, 1, 1 + size.steps // 4):  # the first two warm up
            device.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    adapter_names=names,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            device.synchronize()
            seconds.append(time.perf_counter() - start)
        step = (seconds[3] - seconds[2]) / (size.steps // 4)
        report.add(
            kind="peft decode",
            batch=size.batch,
            adapters=adapters,
            milliseconds=[round(step * 1e3, 3)],
        )


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """The shape in the names of transformers; RoPE scaling does not change the speed."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def spread(times: list[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile in milliseconds."""
    ordered = sorted(times)
    cuts = (median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10])
    return {"milliseconds": [round(t * 1e3, 3) for t in cuts]}


def release(device: Device) -> None:
    """Gives back the memory of engines that are gone."""
    gc.collect()
    device.memory()


def main() -> int:
    args, device, report = parse(__doc__ or "")
    size = FULL
    if args.rehearse:
        from tests.checkpoints import write_checkpoint

        folder = args.out.parent / "tiny"
        write_checkpoint(folder)
        size = replace(TINY, model=str(folder))
    torch.manual_seed(0)
    for name, run in groups(size, device):
        if report.seconds_left < 20 and not args.rehearse:
            report.leave_out(name)
            continue
        try:
            run(report)
        except Exception:  # what it was costs the others nothing
            report.fail(f"{name}: {traceback.format_exc()}")
        release(device)
    report.write()
    say(f"{len(report.content['results'])} results")
    return report.status


if __name__ == "__main__":
    sys.exit(main())
