"""One peer in a process of its own, in its own environment; bench_cpu.py starts it and asks.

Reads a JSON object on each line of stdin and answers each with one on stdout. Ends with stdin.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from peers.base import NotSupportedError, Peer
from work import THREADS, Work, adapters_of, prompts

PACKAGES = {
    "ours": ("multilora", "torch"),
    "peft": ("transformers", "peft", "torch"),
    "mistralrs": ("mistralrs",),
    "llamacpp": ("gguf",),
    "openvino": ("openvino", "openvino-genai", "optimum-intel"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PACKAGES)
    parser.add_argument("action", choices=("prepare", "serve"))
    parser.add_argument("--work", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    work = Work(args.work, args.root)
    kind: type[Peer] = importlib.import_module(f"peers.{args.peer}").PEER
    if args.action == "prepare":
        kind.prepare(work)
        return
    try:
        peer = kind(work, args.precision, args.threads, args.settings)
    except NotSupportedError as error:
        print(json.dumps({"not_supported": str(error)}), file=answers)
        return
    print(json.dumps({"versions": versions(args.peer)}), file=answers)
    try:
        for line in sys.stdin:
            print(json.dumps(answer(peer, work, json.loads(line))), file=answers)
    finally:
        peer.close()


def answer(peer: Peer, work: Work, asked: dict[str, Any]) -> dict[str, Any]:
    """Does one thing; a failure is told and logged, and the peer stays."""
    rows = prompts(asked["requests"], asked["prompt"], work.shape.vocab)
    adapters = adapters_of(asked["case"], len(rows))
    try:
        if "tokens" in asked:
            return {"gaps": peer.gaps(rows, adapters, asked["tokens"])}  # type: ignore[attr-defined]
        clock = peer.run(rows, adapters, asked["new"])
        short = [i for i, row in enumerate(clock.tokens) if len(row) != asked["new"]]
        if short:
            counts = [len(clock.tokens[i]) for i in short]
            print(f"requests {short} got {counts} tokens, not {asked['new']}", file=sys.stderr)
        return {**clock.figures(), "tokens": clock.tokens, "peak_mib": peak_mib(peer.pid())}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def versions(peer: str) -> dict[str, str]:
    found = {}
    for name in PACKAGES[peer]:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_mib(pid: int) -> int:
    """The largest resident memory that a process has had, mapped files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    main()
