"""llama.cpp's llama-server. It batches only requests with the same adapters."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from work import NUM_ADAPTERS, Work

from .base import Clock, Peer

FILES = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
BIN = Path(sys.executable).parent  # of the environment: the built programs lie beside its Python


class LlamaCpp(Peer):
    def __init__(self, work: Work, precision: str, threads: int, settings: dict[str, Any]) -> None:
        super().__init__(work, precision, threads, settings)
        folder, kind = work.own("llamacpp"), "f32" if precision == "fp32" else "f16"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        loras = ",".join(str(folder / f"a{i}-{kind}.gguf") for i in range(NUM_ADAPTERS))
        model = folder / f"{FILES[precision]}.gguf"
        command: list[str | Path] = [BIN / "llama-server", "-m", model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--lora", loras]
        command += ["-t", str(threads), "-tb", str(threads), "-np", "16", "-c", str(16 * 256)]
        command += ["--lora-init-without-apply", "--no-warmup", "--no-webui"]
        self.server = subprocess.Popen(command, stdout=sys.stderr)
        self._wait()

    def _wait(self, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.server.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        self.close()
        raise RuntimeError("llama-server did not start; its log says why")

    @staticmethod
    def prepare(work: Work) -> None:
        from .gguf_files import write_adapter, write_base

        folder = work.own("llamacpp")
        folder.mkdir(parents=True, exist_ok=True)
        write_base(work.base, folder / "f32.gguf")
        for kind in ("bf16", "q8_0", "q4_0"):
            if not (folder / f"{kind}.gguf").is_file():
                files = [folder / "f32.gguf", folder / f"{kind}.gguf"]
                subprocess.run([BIN / "llama-quantize", *files, kind], check=True)
        for i, path in enumerate(work.adapters):
            for kind in ("f32", "f16"):
                write_adapter(work.base, path, folder / f"a{i}-{kind}.gguf")

    def pid(self) -> int:
        return self.server.pid

    def run(self, prompts: list[list[int]], adapters: list[int | None], new: int) -> Clock:
        clock = Clock.of(len(prompts))
        threads = [
            threading.Thread(target=self._one, args=(clock, i, prompts[i], adapters[i], new))
            for i in range(len(prompts))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return clock.stop()

    def _one(self, clock: Clock, i: int, prompt: list[int], adapter: int | None, new: int) -> None:
        body = {
            "prompt": prompt,
            "n_predict": new,
            "temperature": 0.0,
            "top_k": 1,
            "samplers": ["top_k"],
            "stream": True,
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
            # An empty list was seen to apply every adapter; a scale of 0 is the base.
            "lora": [{"id": adapter or 0, "scale": float(adapter is not None)}],
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                message = json.loads(line[6:])
                if not message.get("stop"):
                    clock.put(i, message["tokens"])
        connection.close()

    def close(self) -> None:
        self.server.terminate()
        self.server.wait(30)


PEER = LlamaCpp
