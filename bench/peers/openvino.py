"""OpenVINO GenAI's continuous batching pipeline.

The adapter is a state of the whole pipeline: `generate` applies the first request's to all and
`add_request` none. So requests are grouped by adapter, and the groups served one after another.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from work import Work

from .base import Clock, Peer

FOLDERS = {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
SCALE = 2.0  # lora_alpha / r of all our adapters: the pipeline does not read adapter_config.json


class OpenVino(Peer):
    def __init__(self, work: Work, precision: str, threads: int, settings: dict[str, Any]) -> None:
        super().__init__(work, precision, threads, settings)
        self.adapters = [
            genai.Adapter(str(path / "adapter_model.safetensors")) for path in work.adapters
        ]
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 16, 2048
        scheduler.enable_prefix_caching = False
        mode = genai.AdapterConfig.Mode.MODE_DYNAMIC
        self.pipe = genai.ContinuousBatchingPipeline(
            str(work.own("openvino") / FOLDERS[precision]),
            scheduler,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": HINTS[precision],
                "adapters": genai.AdapterConfig(self.adapters, mode=mode),
            },
        )
        self.serial = 0

    @staticmethod
    def prepare(work: Work) -> None:
        for kind in ("fp32", "int8"):
            folder = work.own("openvino") / kind
            if (folder / "openvino_model.bin").is_file():
                continue
            command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
            options = ["--task", "text-generation-with-past", "--weight-format", kind]
            subprocess.run([*command, "-m", str(work.base), *options, str(folder)], check=True)

    def _config(self, adapter: int | None, new: int) -> Any:
        config = genai.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False
        )
        config.adapters = genai.AdapterConfig()
        if adapter is not None:
            config.adapters = genai.AdapterConfig(self.adapters[adapter], SCALE)
        return config

    def run(self, prompts: list[list[int]], adapters: list[int | None], new: int) -> Clock:
        clock, groups = Clock.of(len(prompts)), dict[int | None, list[int]]()
        for i, adapter in enumerate(adapters):
            groups.setdefault(adapter, []).append(i)
        for adapter, members in groups.items():
            # One token: what makes the pipeline change its adapter.
            self.pipe.generate([_ids(prompts[members[0]][:1])], [self._config(adapter, 1)])
            handles = {}
            for i in members:
                self.serial += 1
                config = self._config(adapter, new)
                handles[i] = self.pipe.add_request(self.serial, _ids(prompts[i]), config)
            while self.pipe.has_non_finished_requests():
                self.pipe.step()
                for i, handle in handles.items():
                    if handle.can_read():
                        for out in handle.read().values():
                            clock.put(i, list(out.generated_ids))
        return clock.stop()


def _ids(row: list[int]) -> ov.Tensor:
    return ov.Tensor(np.array([row], dtype=np.int64))


PEER = OpenVino
