"""multilora's engine, fed token ids."""

from __future__ import annotations

from typing import Any

import torch
from work import Work

from multilora import LLM, SamplingParams
from multilora.errors import ConfigError

from .base import Clock, NotSupportedError, Peer

# Activations, adapters and KV of quantised bases have 16 bits; the others round activations to 8.
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


class Ours(Peer):
    def __init__(self, work: Work, precision: str, threads: int, settings: dict[str, Any]) -> None:
        super().__init__(work, precision, threads, settings)
        torch.set_num_threads(threads)
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,  # every repeat computes its prompts
            "max_model_len": 512,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,  # all prompts in one step, as OpenVINO's setting
            "max_loras": len(work.adapters),
        }
        adapters = {f"a{i}": path for i, path in enumerate(work.adapters)}
        try:
            self.llm = LLM(work.base, adapters=adapters, **options | SETTINGS[precision] | settings)
        except ConfigError as error:
            raise NotSupportedError(str(error)) from error

    def run(self, prompts: list[list[int]], adapters: list[int | None], new: int) -> Clock:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine, clock = self.llm.engine, Clock.of(len(prompts))
        request_of = {
            engine.add_request(ids, params, adapter=None if a is None else f"a{a}"): i
            for i, (ids, a) in enumerate(zip(prompts, adapters, strict=True))
        }
        while engine.has_work:
            for output in engine.step():
                i = request_of[output.request_id]
                clock.put(i, output.outputs[0].token_ids[len(clock.tokens[i]) :])
        return clock.stop()


PEER = Ours
