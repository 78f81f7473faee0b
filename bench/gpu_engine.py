"""Part "engine" of `bench/gpu.py`: whole steps of an 8B shape with random weights.

Decode steps without adapters, with adapters that are idle, and with 1 to 256 of them; sampled ones;
prompts with and without LoRA; the workloads of the Punica paper; the same batch in transformers and
PEFT. Every case has run before it is timed, and stands beside the time that the model gives it.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import gpu_model
import torch
from gpu_common import parse, say
from gpu_kernels import slots_of
from gpu_limits import KERNEL, STEP
from gpu_preflight import missing
from gpu_session import SAMPLED, Session, Size, release, tiny_model
from gpu_timing import Bench, open_bench

from multilora.config.model import ModelConfig
from multilora.config.presets import shape_of


@dataclass(frozen=True)
class Plan:
    """The cases."""

    size: Size
    decodes: tuple[tuple[int, int], ...]  # (batch, adapters in it); 0 = loaded, but the base's
    sampled: tuple[int, ...]  # batches
    together: int  # requests at once in a Punica workload and in PEFT
    requests: int  # of a Punica workload
    answer: int  # longest answer of one
    popularities: tuple[str, ...] = ("distinct", "uniform", "zipf", "identical")


FULL = Plan(
    Size(
        model="llama-3.1-8b",
        dtype="bfloat16",
        rank=16,
        adapters=256,
        context=1024,
        steps=48,
        prefill=8192,
        prompts=4,
        chunk=4096,
        batch=256,
    ),
    decodes=(
        *((1, 1), (32, 0), (32, 32), (256, 16), (8, 8), (64, 64), (256, 256), (64, 8), (32, 6)),
        *((256, 0), (1, 0), (32, 1), (8, 1), (128, 12)),
    ),
    sampled=(64, 256),
    together=32,
    requests=64,
    answer=128,
)
TINY = Plan(
    Size(
        model="",  # a checkpoint that is written for it
        dtype="bfloat16",
        rank=8,
        adapters=4,
        context=20,
        steps=2,
        prefill=64,
        prompts=4,
        chunk=32,
        batch=4,
    ),
    decodes=((1, 1), (4, 0), (4, 4), (4, 2)),
    sampled=(4,),
    together=4,
    requests=4,
    answer=3,
    popularities=("zipf", "identical"),
)
PEFT_ADAPTERS = 8  # each adapter takes PEFT about a second to add


class Cases:
    """The cases of one engine: each is timed, judged, written and told."""

    def __init__(self, plan: Plan, bench: Bench, adapters: int, **settings: Any) -> None:
        self.plan, self._bench = plan, bench
        self.session = Session(plan.size, bench, adapters, **settings)

    def decode(self, case: str, batch: int, adapters: int | None, **params: Any) -> None:
        """Decode steps; `adapters` is None where there is none in the engine."""
        used = adapters or 0
        timed = self.session.decode(batch, used, **params)
        step = self.session.decode_step(batch, used, batch if params else 0)
        name = f"decode, batch {batch}, {case}"
        fields = {} if adapters is None else {"adapters": adapters}
        milliseconds = spread(timed.seconds)
        self._add(
            name, 1e3 * milliseconds[0], self.session.predicted_us(step), STEP,
            kind="decode", case=case, batch=batch, **fields,
            milliseconds=milliseconds, host_us=round(timed.host_us, 1),
        )  # fmt: skip

    def prefill(self, adapters: int | None) -> None:
        """Prompts, by tokens per second."""
        us = 1e6 * sum(self.session.prefill(adapters or 0).seconds)
        predicted = self.session.predicted_us(*self.session.prefill_steps(adapters or 0))
        rate = self.plan.size.prefill / us * 1e6
        name = f"prefill, {adapters or 0} adapters"
        self._add(
            name, us, predicted, STEP, kind="prefill", adapters=adapters, tokens_per_second=rate
        )

    def punica(self, popularity: str) -> None:
        """A closed loop, done once before it is timed."""
        loop = Loop(self.plan, popularity)
        loop.run(self.session)
        with self._bench.watch.timed(f"punica {popularity}"):
            found = loop.run(self.session)
        us, predicted = 1e6 * found["seconds"], self.session.predicted_us(*loop.steps())
        name = f"punica {popularity}"
        # The prediction takes all prompts first: steps with both are eager, and slower.
        self._add(name, us, predicted, KERNEL, kind="punica", popularity=popularity, **found)

    def _add(self, name: str, us: float, predicted: float, limit: float, **result: Any) -> None:
        beside = self._bench.judge.beside(name, us, predicted, limit=limit)
        self._bench.report.add(**result, **beside)
        say(f"{name}: {us / 1e3:.2f} ms, model {predicted / 1e3:.2f}")


class Loop:
    """A closed loop: a batch of requests at any time, adapters by popularity."""

    def __init__(self, plan: Plan, popularity: str) -> None:
        draw, count = random.Random(1), plan.requests
        self._plan = plan
        self._slots = slots_of(popularity, min(count, plan.size.adapters))
        draw.shuffle(self._slots)
        # Prompts and answers vary as in chats: most are short.
        self._sizes = [
            (int(draw.triangular(8, 512, 64)), int(draw.triangular(4, plan.answer, 64)))
            for _ in range(count)
        ]
        if plan.answer < 64:
            self._sizes = [(8, plan.answer) for _ in range(count)]

    def run(self, session: Session) -> dict[str, float]:
        """Does it all."""
        waiting = list(range(self._plan.requests))[::-1]
        begun: dict[str, float] = {}
        first: dict[str, float] = {}
        start, tokens, running = time.perf_counter(), 0, 0
        while waiting or running:
            while waiting and running < self._plan.together:
                i = waiting.pop()
                slot = self._slots[i % len(self._slots)]
                begun[session.add(*self._sizes[i], slot)] = time.perf_counter()
                running += 1
            for output in session.engine.step():
                first.setdefault(output.request_id, time.perf_counter())
                if output.finished:
                    tokens += len(output.outputs[0].token_ids)
                    running -= 1
        seconds = time.perf_counter() - start
        waits = sorted(first[i] - begun[i] for i in begun)
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "time_to_first_token_median": median(waits),
            "time_to_first_token_p99": waits[int(0.99 * (len(waits) - 1))],
        }

    def steps(self) -> list[gpu_model.Step]:
        """For the model: all prompts in full steps, then all answers in full batches."""
        size, together = self._plan.size, self._plan.together
        prompts, answers = (sum(part) for part in zip(*self._sizes, strict=True))
        ranks = min(len(set(self._slots)), together), size.rank
        context = prompts // len(self._sizes) + answers // len(self._sizes) // 2
        whole = gpu_model.prefill(min(size.chunk, prompts), 1, *ranks)
        decode = gpu_model.decode(together, context, *ranks)
        return [whole] * -(-prompts // size.chunk) + [decode] * -(-answers // together)


def groups(plan: Plan, bench: Bench) -> Sequence[tuple[str, Callable[[], None]]]:
    """The cases in groups, the most telling first; a group shares its engine."""
    report, size = bench.report, plan.size

    def base() -> None:
        cases = Cases(plan, bench, 0)
        report.content["start_seconds"] = round(cases.session.seconds, 1)
        report.content["memory"] = cases.session.engine.memory()
        batches = sorted({batch for batch, _ in plan.decodes}, reverse=True)
        work = [partial(cases.decode, "base only", batch, None) for batch in batches]
        work.append(partial(cases.prefill, None))
        work += [partial(cases.decode, "sampled", b, None, **SAMPLED) for b in plan.sampled]
        run_all(work, bench)

    def adapted() -> None:
        cases = Cases(plan, bench, size.adapters)
        work: list[partial[None]] = []
        for batch, adapters in plan.decodes:
            case = f"{adapters} adapters" if adapters else "LoRA idle"
            work.append(partial(cases.decode, case, batch, adapters))
        work += [partial(cases.prefill, adapters) for adapters in (0, 1, 4)]
        work += [partial(cases.punica, popularity) for popularity in plan.popularities]
        run_all(work, bench)

    def sequential() -> None:
        smaller = replace(plan, size=replace(size, batch=plan.together))
        for name, value in {"overlap_lora": False, "async_scheduling": False}.items():
            cases = Cases(smaller, bench, plan.together, **{name: value})
            work = [
                partial(cases.decode, f"{name}={value}", plan.together, adapters)
                for adapters in (plan.together, 1)
            ]
            run_all(work, bench)
            del cases, work
            release(bench.device)

    return (
        ("base", base),
        ("adapted", adapted),
        ("peft", partial(peft, plan, bench)),
        ("one thing switched off", sequential),
    )


def run_all(work: Sequence[partial[None]], bench: Bench) -> None:
    """Does the cases for which there is time."""
    for case in work:
        name = " ".join([case.func.__name__, *(str(part) for part in case.args)])
        if bench.report.seconds_left < 20 and not bench.rehearsed:
            bench.report.leave_out(name)
            continue
        bench.run(name, case)


def peft(plan: Plan, bench: Bench) -> None:
    """transformers and PEFT: the decode steps of one batch with mixed adapters."""
    if lost := missing(("transformers", "peft")):
        bench.report.content["left_out_for_want_of"] = lost
        say(f"peft left out: missing {', '.join(lost)}")
        return
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    size, device = plan.size, bench.device
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
    ids = torch.randint(3, config.vocab_size, (plan.together, size.context), device=device.torch)
    more = max(size.steps // 4, 1)
    for adapters in (PEFT_ADAPTERS, 1):
        names = [f"a{i % adapters}" for i in range(plan.together)]
        seconds = []
        for new in (1, 1 + more, 1, 1 + more):  # the first two warm up
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
        step = (seconds[3] - seconds[2]) / more
        bench.report.add(
            kind="peft decode",
            batch=plan.together,
            adapters=adapters,
            milliseconds=[round(step * 1e3, 3)],
        )
        say(f"peft decode, batch {plan.together}, {adapters} adapters: {step * 1e3:.2f} ms")


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


def spread(times: Sequence[float]) -> list[float]:
    """Median, 10th and 90th percentile in milliseconds."""
    ordered = sorted(times)
    cuts = (median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10])
    return [round(t * 1e3, 3) for t in cuts]


def main() -> int:
    args, device, report = parse(__doc__ or "")
    plan = FULL
    if args.rehearse:
        model = tiny_model(args.out.parent / "tiny")
        plan = replace(TINY, size=replace(TINY.size, model=model))
    torch.manual_seed(0)
    bench = open_bench(args, device, report)
    for name, run in groups(plan, bench):
        if report.seconds_left < 20 and not args.rehearse:
            report.leave_out(name)
            continue
        bench.run(name, run)
        release(device)
    say(bench.close(f"{len(report.content['results'])} results"))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
