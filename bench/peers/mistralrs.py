"""mistral.rs by its Python package: an adapter for each request, batched."""

from __future__ import annotations

import os
import re
from typing import Any

from work import Work

from .base import Clock, Peer


class MistralRs(Peer):
    def __init__(self, work: Work, precision: str, threads: int, settings: dict[str, Any]) -> None:
        super().__init__(work, precision, threads, settings)
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        os.environ["HF_HUB_OFFLINE"] = "1"
        import mistralrs

        self.lib = mistralrs
        dtypes = {"fp32": mistralrs.ModelDType.F32, "bf16": mistralrs.ModelDType.BF16}
        template = work.own("mistralrs") / "plain.jinja"
        self.runner = mistralrs.Runner(
            which=mistralrs.Which.Lora(
                model_id=str(work.base),
                arch=mistralrs.Architecture.Llama,
                dtype=dtypes[precision],
                adapters=[
                    mistralrs.LoraAdapter(f"a{i}", str(path))
                    for i, path in enumerate(work.adapters)
                ],
            ),
            max_seqs=16,
            prefix_cache_n=0,
            jinja_explicit=str(template),
        )

    @staticmethod
    def prepare(work: Work) -> None:
        folder = work.own("mistralrs")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def run(self, prompts: list[list[int]], adapters: list[int | None], new: int) -> Clock:
        """Streams, a chunk from each in turn: its blocking calls cannot overlap."""
        clock, streams = Clock.of(len(prompts)), {}
        for i, (ids, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            request = self.lib.ChatCompletionRequest(
                model="default",
                messages=[{"role": "user", "content": " ".join(f"w{t}" for t in ids)}],
                max_tokens=new,
                temperature=0.0,
                top_k=1,
                ignore_eos=True,
                stream=True,
                adapter=None if adapter is None else f"a{adapter}",
            )
            streams[i] = iter(self.runner.send_chat_completion_request(request))
        while streams:
            for i in list(streams):
                chunk = next(streams[i], None)
                if chunk is None:
                    del streams[i]
                    continue
                text = chunk.choices[0].delta.content or ""
                clock.put(i, [int(t) for t in re.findall(r"w(\d+)", text)])
        return clock.stop()


PEER = MistralRs
