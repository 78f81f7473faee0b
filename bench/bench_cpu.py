"""Ours and every installed peer on the same work, one machine, one go.

    python bench/bench_cpu.py all                     # everything below, for all precisions
    python bench/bench_cpu.py prepare                 # models, adapters, each peer's own formats
    python bench/bench_cpu.py run --precision int8    # measure: a raw result in build/bench/raw
    python bench/bench_cpu.py check                   # are the tokens PEFT's?
    python bench/bench_cpu.py table --save bench/results/cpu.json

The work: 16 prompts of 128 random tokens, 64 greedy tokens each, a random Llama of 132 million
parameters, 2 threads. In `distinct` every prompt has an adapter of its own (ranks 8, 16, 32, 64 in
turn), in `identical` all have the same, in `base` none. Every peer is a process of its own that
stays up; each repeat runs every case of every peer in turn, so that a busy machine slows all alike.
The tables show medians. README.md says how to install the peers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import report
from floor import measure
from machine import machine
from peers import AT_HOME, PRECISIONS
from work import CASES, SHAPES, THREADS, Work
from work import PRECISIONS as ALL_PRECISIONS

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("all", "prepare", "run", "check", "table"))
    parser.add_argument("--work", default="132m", choices=SHAPES)
    parser.add_argument("--root", type=Path, default=Path("build/bench"), help="where files lie")
    parser.add_argument("--envs", type=Path, help="<envs>/<peer>/bin/python; default <root>/envs")
    parser.add_argument("--peers", default=",".join(PRECISIONS))
    parser.add_argument("--precision", default=",".join(ALL_PRECISIONS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ours", type=json.loads, default={}, help="our settings, as JSON")
    parser.add_argument("--save", type=Path, help="write the results without tokens")
    args = parser.parse_args()
    args.envs = args.envs or args.root / "envs"
    actions = ("prepare", "run", "check", "table") if args.action == "all" else (args.action,)
    for action in actions:
        {"prepare": prepare, "run": run, "check": check, "table": show}[action](args)


# Peers --------------------------------------------------------------------------------------------


def python_of(peer: str, envs: Path) -> Path | None:
    """The Python that runs a peer, or None (and a line that says so) if there is none."""
    own = envs / peer / "bin" / "python"
    if own.is_file():
        return own.absolute()
    if peer in AT_HOME:
        return Path(sys.executable)
    print(f"{peer}: skipped, {own} is missing; bench/README.md says how to install it")
    return None


class Worker:
    """A peer's process; `ask` sends it a task and waits."""

    def __init__(self, peer: str, python: Path, precision: str, args: argparse.Namespace) -> None:
        self.peer, self.log = peer, args.root / "logs" / f"{peer}-{precision}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [python, HERE / "worker.py", peer, "serve", "--work", args.work]
        command += ["--root", args.root, "--precision", precision, "--threads", str(args.threads)]
        command += ["--settings", json.dumps(args.ours if peer == "ours" else {})]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.hello = self._read()

    @property
    def ready(self) -> bool:
        return "versions" in self.hello

    def ask(self, **task: Any) -> dict[str, Any]:
        """The answer; one with `error` when the peer failed."""
        _pipe(self.process.stdin).write(json.dumps(task) + "\n")
        _pipe(self.process.stdin).flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = _pipe(self.process.stdout).readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended; see {self.log}"}
        return answer

    def close(self) -> None:
        _pipe(self.process.stdin).close()
        self.process.wait(60)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def start(precision: str, args: argparse.Namespace) -> list[Worker]:
    """The peers that can compute in this precision; a line for each that cannot."""
    workers = []
    for peer in args.peers.split(","):
        if precision not in PRECISIONS[peer]:
            continue
        python = python_of(peer, args.envs)
        if python is None:
            continue
        worker = Worker(peer, python, precision, args)
        if worker.ready:
            workers.append(worker)
            continue
        reason = worker.hello.get("not_supported", worker.hello.get("error"))
        print(f"{peer} {precision}: not supported: {reason}")
        worker.close()
    return workers


# Actions ------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    """Writes the files that are missing."""
    from models import write_all

    write_all(Work(args.work, args.root))
    for peer in args.peers.split(","):
        python = python_of(peer, args.envs)
        if python is not None:
            options = ["--work", args.work, "--root", args.root]
            subprocess.run([python, HERE / "worker.py", peer, "prepare", *options], check=True)


def run(args: argparse.Namespace) -> None:
    for precision in args.precision.split(","):
        result = measure_one(precision, args)
        folder = args.root / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{args.work}-{precision}-{args.requests}"
        (folder / f"{name}.json").write_text(json.dumps(merge(folder / f"{name}.json", result)))


def measure_one(precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """All cases of all peers in one precision."""
    workers, timings, tokens = start(precision, args), [], {}
    size = {"requests": args.requests, "prompt": args.prompt, "new": args.new}
    cases = args.cases.split(",")
    for worker in workers:
        for case in cases:  # warm up: thread pools, buffers, the adapters' pages
            worker.ask(case=case, **size | {"prompt": 16, "new": 2})
    peaks = measure(args.threads)
    for repeat in range(args.repeat):
        peaks = peaks.or_better(measure(args.threads))
        for case in cases:
            for worker in workers if repeat % 2 == 0 else workers[::-1]:
                answer = worker.ask(case=case, **size)
                if "error" in answer:
                    print(f"{worker.peer} {precision} {case}: failed: {answer['error']}")
                    continue
                tokens[f"{worker.peer} {case}"] = answer.pop("tokens")
                timings.append({"peer": worker.peer, "case": case, "repeat": repeat, **answer})
                rate = answer["rate"]
                print(f"{precision} {case:<10} {worker.peer:<10} {rate:8.1f} tokens/s", flush=True)
    versions = {worker.peer: worker.hello["versions"] for worker in workers}
    for worker in workers:
        worker.close()
    return {
        **{"work": args.work, "precision": precision, "threads": args.threads, **size},
        **{"machine": machine(), "peaks": asdict(peaks), "versions": versions},
        **{"settings": args.ours, "timings": timings, "tokens": tokens, "gaps": {}},
    }


def merge(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """`new` with what an earlier run measured of other peers and cases, for long runs in parts."""
    if not path.is_file():
        return new
    old = json.loads(path.read_text())
    same = ("work", "precision", "threads", "requests", "prompt", "new", "machine")
    if any(old[key] != new[key] for key in same):
        return new
    fresh = {(t["peer"], t["case"]) for t in new["timings"]}
    kept = [t for t in old["timings"] if (t["peer"], t["case"]) not in fresh]
    gone = {f"{peer} {case}" for peer, case in fresh}
    return new | {
        "timings": kept + new["timings"],
        "tokens": old["tokens"] | new["tokens"],
        "versions": old["versions"] | new["versions"],
        "gaps": {key: value for key, value in old["gaps"].items() if key not in gone},
    }


def check(args: argparse.Namespace) -> None:
    """Scores every engine's tokens with PEFT in fp32; ends with 1 if ours differ in fp32."""
    python = python_of("peft", args.envs)
    if python is None:
        return
    worker, wrong = Worker("peft", python, "fp32", args), []
    if not worker.ready:
        sys.exit(f"check: {worker.hello}")
    for path in raw_files(args):
        result = json.loads(path.read_text())
        size = {name: result[name] for name in ("requests", "prompt")}
        for key, tokens in result["tokens"].items():
            if key in result["gaps"]:
                continue
            answer = worker.ask(case=key.split()[1], tokens=tokens, **size)
            if "error" in answer:
                print(f"{result['precision']} {key}: cannot be checked: {answer['error']}")
                continue
            summary = result["gaps"][key] = report.gap_summary(answer["gaps"])
            print(f"{result['precision']} {key}: {summary}", flush=True)
            if key.startswith("ours") and result["precision"] == "fp32" and summary["others"]:
                wrong.append(key)
        path.write_text(json.dumps(result))
    worker.close()
    if wrong:
        sys.exit(f"our tokens are not PEFT's: {', '.join(wrong)}")


def raw_files(args: argparse.Namespace) -> list[Path]:
    return sorted((args.root / "raw").glob(f"{args.work}-*.json"))


def show(args: argparse.Namespace) -> None:
    results = [json.loads(path.read_text()) for path in raw_files(args)]
    for result in results:
        result.pop("tokens")
    print(report.table(results))
    print(report.lora_cost(results))
    for commit in {(r["machine"]["commit"], json.dumps(r["peaks"])) for r in results}:
        print(*commit)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
