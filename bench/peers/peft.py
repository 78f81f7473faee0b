"""transformers' `generate` with PEFT: `adapter_names` for a mixed batch. Also the oracle."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LogitsProcessor
from work import Work

from .base import Clock, Peer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Watch(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Is called before each token is chosen, which is as good as when it comes."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for i in range(len(scores)):
            self.clock.put(i, [0])
        return scores


class Peft(Peer):
    def __init__(self, work: Work, precision: str, threads: int, settings: dict[str, Any]) -> None:
        super().__init__(work, precision, threads, settings)
        torch.set_num_threads(threads)
        base = AutoModelForCausalLM.from_pretrained(work.base, dtype=DTYPES[precision])
        # A 16-bit adapter stays one.
        keep: dict[str, Any] = {"autocast_adapter_dtype": precision == "fp32"}
        self.model = PeftModel.from_pretrained(base, work.adapters[0], adapter_name="a0", **keep)
        for i, path in enumerate(work.adapters[1:], 1):
            self.model.load_adapter(path, adapter_name=f"a{i}", **keep)
        self.model.eval()

    def _choose(
        self, adapters: list[int | None]
    ) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
        """PEFT's own way for a batch: no adapter, the one that is active, or one for each row."""
        kinds = set(adapters)
        if kinds == {None}:
            return self.model.disable_adapter(), {}
        if len(kinds) == 1:
            self.model.set_adapter(f"a{adapters[0]}")
            return nullcontext(), {}
        names = ["__base__" if a is None else f"a{a}" for a in adapters]
        return nullcontext(), {"adapter_names": names}

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], adapters: list[int | None], new: int) -> Clock:
        ids, clock = torch.tensor(prompts), Clock.of(len(prompts))
        context, options = self._choose(adapters)
        with context:
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[_Watch(clock)],
                **options,
            )
        clock.stop()
        clock.tokens = out[:, ids.shape[1] :].tolist()
        return clock

    @torch.inference_mode()
    def gaps(
        self, prompts: list[list[int]], adapters: list[int | None], tokens: list[list[int]]
    ) -> list[list[float]]:
        """For each token the best logit in its place less its own: 0 where PEFT would choose it.

        Each place is scored after the given tokens before it, so that one near tie costs one token.
        """
        context, options = self._choose(adapters)
        ids = torch.tensor([p + t for p, t in zip(prompts, tokens, strict=True)])
        new = len(tokens[0])
        with context:
            logits = self.model(input_ids=ids, logits_to_keep=new + 1, **options).logits[:, :-1]
        chosen = logits.gather(-1, ids[:, -new:, None])[..., 0]
        gaps: list[list[float]] = (logits.amax(-1) - chosen).tolist()
        return gaps


PEER = Peft
