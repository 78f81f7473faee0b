"""Part "smoke" of `bench/gpu.py`: is what the kernels compute right, and if not, how wrong?

One LoRA op and one paged attention in bf16 against the reference in float64. Then a tiny engine in
bf16 on the device against one on the CPU in fp32, which scores the same tokens: those of the
prompts, computed in chunks, and those that the device chose, computed in captured decode steps.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from gpu_common import Report, parse, say
from torch import Tensor

import multilora_kernels as mk
from multilora.device.cpu import Device
from multilora.engine.engine import Engine
from multilora.outputs import RequestOutput
from multilora.sampling_params import SamplingParams
from multilora_kernels import reference
from multilora_kernels.testing.precision import to_float64
from tests.harness.adapter_folders import write_adapter
from tests.harness.gpu_rehearsal import cpu_ops
from tests.harness.kernel_calls.lora import POPULARITY, make_lora_call
from tests.harness.model_folders import write_checkpoint
from tests.harness.tiny_engines import Job, make_engine, prompt_of, run

OP = 0.02  # the largest difference of a bf16 result, relative to the largest value
# Mean difference of a request's log probabilities, with a tiny model in bf16; an answer is short.
PROMPT_SCORE, ANSWER_SCORE = 0.03, 0.05
ANSWER = 4  # tokens
SHAPE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}  # as a GPU likes it
SPECS: tuple[str | Mapping[str, float] | None, ...] = (None, "a", {"a": 0.5, "b": -2.0})


class Check(NamedTuple):
    """How far a result is from what it should be, and how far it may be."""

    error: float
    limit: float


def lora(device: Device, inner: int) -> dict[str, Check]:
    """Adapters of ranks 8 to 128 with weights of their own, in tiles of decode steps."""
    call = make_lora_call(POPULARITY["zipf"], torch.bfloat16, in_=inner)
    wanted = call._replace(y=call.y.double())
    wide = type(call)(*to_float64(*wanted))
    reference.lora_(*wide)
    table = mk.Table(*(None if t is None else t.to(device.torch) for t in call.table))
    tiles = mk.Tiles(*(t.to(device.torch) for t in call.tiles))
    y, *rest = (t.to(device.torch) for t in call[:4])
    mk.lora_(y, *rest, table, tiles, call.slice_starts)
    return {"lora": Check(difference(y, wide.y), OP)}


def attention(device: Device, length: int) -> dict[str, Check]:
    """A decode step, a prompt's chunk and an idle sequence, over shuffled blocks."""
    lens, queries, size = torch.tensor([length, 64, 0]).int(), (1, 20, 0), 16
    blocks = torch.randperm(3 * length // size).view(3, -1).int()
    k, v = (torch.randn(blocks.numel(), size, 2, 64).bfloat16() for _ in range(2))
    q = torch.randn(sum(queries), 8, 64).bfloat16()
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)]).int()
    wanted = reference.paged_attention(
        q.double(), k.double(), v.double(), blocks, lens, starts, scale=0.125
    )
    there = [t.to(device.torch) for t in (q, k, v, blocks, lens, starts)]
    found = mk.paged_attention(*there, scale=0.125, max_query_len=max(queries), max_seq_len=length)
    return {"attention": Check(difference(found, wanted), OP)}


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest one, relative to the largest value; NaN if there is one."""
    found = found.cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def engine(folder: Path, device: str, **shape: int) -> dict[str, Check]:
    """An engine with adapters a and b, requests of the base, of one adapter and of a mix.

    `shape` are fields of ModelConfig, whose defaults are those of `model_folders.TINY`.
    """
    config = write_checkpoint(folder / "base", dtype=torch.bfloat16, **shape)
    names = {}
    for name, rank in (("a", 8), ("b", 16)):
        names[name] = write_adapter(folder / name, config, rank=rank, seed=rank, scale=0.05)

    def start(**settings: Any) -> Engine:
        return make_engine(folder / "base", names, max_num_seqs=len(SPECS), **settings)

    settings = {"temperature": 0, "ignore_eos": True, "prompt_logprobs": 0}
    params = SamplingParams(**settings, max_tokens=ANSWER, logprobs=0)
    prompts = [prompt_of(9 + 8 * i, seed=i) for i in range(len(SPECS))]
    ours = run(
        start(device=device), [Job(p, params, s) for p, s in zip(prompts, SPECS, strict=True)]
    )
    params = SamplingParams(**settings, max_tokens=1)
    again = [
        Job((*prompt, *output.outputs[0].token_ids), params, spec)
        for prompt, output, spec in zip(prompts, ours, SPECS, strict=True)
    ]
    with cpu_ops():
        exact = run(start(device="cpu", dtype="float32", lora_dtype="float32"), again)
    gaps = []  # of each request, for its prompt and for its answer
    for prompt, mine, theirs in zip(prompts, ours, exact, strict=True):
        pairs = zip(scores(mine), scores(theirs), strict=True)
        found = [abs(a - b) for a, b in pairs]
        gaps.append((mean(found[: len(prompt) - 1]), mean(found[len(prompt) - 1 :])))
    prompt_gap, decode_gap = torch.tensor(gaps).amax(0).tolist()  # NaN stays NaN
    return {
        "engine, prompts": Check(prompt_gap, PROMPT_SCORE),
        "engine, decode": Check(decode_gap, ANSWER_SCORE),
    }


def scores(output: RequestOutput) -> list[float]:
    """The log probability of each token but the first, of the prompt and then of the answer."""
    answer = output.outputs[0]
    assert output.prompt_logprobs is not None
    tokens = [*output.prompt_token_ids[1:]]
    tables = [*output.prompt_logprobs[1:]]
    if answer.logprobs is not None:
        tokens += answer.token_ids
        tables += answer.logprobs
    return [found[token].logprob for token, found in zip(tokens, tables, strict=True) if found]


def check(name: str, work: Callable[[], dict[str, Check]], report: Report) -> list[str]:
    """Runs one piece of work and reports what it found; a line for each check."""
    start, lines = time.perf_counter(), []
    try:
        checks = work()
    except Exception as error:  # a kernel that cannot be launched, among others; the rest may
        report.fail(f"{name}: {traceback.format_exc()}")
        return [f"{name} {type(error).__name__}"]
    seconds = round(time.perf_counter() - start, 2)
    for case, (error, limit) in checks.items():
        right = error <= limit  # NaN is wrong
        report.add(case=case, right=right, error=error, limit=limit, seconds=seconds)
        lines.append(f"{case} {'right' if right else 'WRONG'}, {error:.2g} of {limit:.2g}")
        if not right:
            report.fail(f"{case} is off by {error:.3g}, at most {limit:.3g} is rounding")
    return lines


def main() -> int:
    args, device, report = parse(__doc__ or "")
    torch.manual_seed(0)
    inner, length, shape = (160, 96, {}) if args.rehearse else (4096, 1024, SHAPE)
    with TemporaryDirectory() as folder:
        lines = [
            *check("lora", lambda: lora(device, inner), report),
            *check("attention", lambda: attention(device, length), report),
            *check("engine", lambda: engine(Path(folder), "cuda", **shape), report),
        ]
    report.write()
    say("; ".join(lines))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
