"""Four experts of freelance work on one small Llama: the demo that ships with the package.

`run_batch` and `measure` drive the engine and know nothing of screens; the rest draws.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from statistics import median
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import RequestError
from ..sampling_params import SamplingParams
from .llm import LLM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ..engine.engine import Engine
    from ..outputs import RequestOutput

EXPERTS = ("job-analysis", "profile-review", "proposal", "feedback")
MEASURED_TOKENS = 24  # of each prompt, in the runs that are timed
MEASURED_ROUNDS = 2  # of each kind, in turn, so that a busy machine slows both


@dataclass(frozen=True, slots=True)
class Scene:
    """A job post and a freelancer, with a prompt and the expected answer for each expert."""

    title: str
    post: str
    profile: str
    draft: str
    prompts: Mapping[str, str]
    answers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class State:
    """Where a batch stands after one step of the engine."""

    outputs: Mapping[str, RequestOutput]  # by expert, cumulative; only those that began
    new_tokens: int  # that the step added
    seconds: float  # that the step took
    kv_bytes: int  # of the blocks in use


@dataclass(frozen=True, slots=True)
class Report:
    """What a run cost."""

    tokens: int
    seconds: float
    step_with: float  # median seconds of a decode step of four sequences, each with its adapter
    step_without: float  # the same without adapters
    base_bytes: int
    adapter_bytes: int
    kv_bytes: int  # at the peak
    ranks: Mapping[str, int]


@contextmanager
def assets() -> Iterator[Path]:
    """The folder with `base/`, `adapters/` and `samples.json`."""
    with as_file(files("multilora") / "assets" / "uma") as folder:
        yield folder


def load() -> LLM:
    """The base in float32 with the four experts."""
    with assets() as folder:
        return LLM(
            str(folder / "base"),
            adapters={name: folder / "adapters" / name for name in EXPERTS},
            dtype="float32",
            max_num_seqs=len(EXPERTS),
        )


def load_scene(number: int) -> Scene:
    """Scene `number`, from 1; RequestError when there is none."""
    with assets() as folder:
        scenes = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["scenes"]
    if not 1 <= number <= len(scenes):
        raise RequestError(f"there is no scene {number}; choose 1 to {len(scenes)}")
    return Scene(**scenes[number - 1])


def run_batch(
    llm: LLM, prompts: Mapping[str, str], params: SamplingParams, *, with_adapters: bool = True
) -> Iterator[State]:
    """Adds every expert's prompt to one batch and yields after each step until all are done.

    What still runs when the caller stops iterating is aborted.
    """
    engine: Engine = llm.engine
    assert engine.tokenizer is not None
    experts: dict[str, str] = {}  # by request id
    outputs: dict[str, RequestOutput] = {}
    try:
        for expert, prompt in prompts.items():
            ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            adapter = expert if with_adapters else None
            experts[engine.add_request(ids, params, adapter=adapter)] = expert
        while engine.has_work:
            before = _count(outputs)
            start = time.perf_counter()
            advanced = engine.step()
            seconds = time.perf_counter() - start
            outputs |= {experts[o.request_id]: o for o in advanced}
            tokens = _count(outputs) - before
            yield State(dict(outputs), tokens, seconds, engine.memory()["kv"])
    finally:
        for request_id, expert in experts.items():
            if expert not in outputs or not outputs[expert].finished:
                engine.abort(request_id)


def measure(llm: LLM, scene: Scene, states: list[State]) -> Report:
    """Sums up a finished run, and times decode steps with and without adapters."""
    params = SamplingParams(temperature=0, max_tokens=MEASURED_TOKENS, ignore_eos=True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(1 + MEASURED_ROUNDS):
        for with_adapters, found in seconds.items():
            run = list(run_batch(llm, scene.prompts, params, with_adapters=with_adapters))
            if round_:  # the first one warms up
                found += [s.seconds for s in run if s.new_tokens == len(EXPERTS)]
    infos = llm.adapters
    return Report(
        tokens=sum(s.new_tokens for s in states),
        seconds=sum(s.seconds for s in states),
        step_with=median(seconds[True]),
        step_without=median(seconds[False]),
        base_bytes=llm.engine.memory()["base"],
        adapter_bytes=sum(infos[name].num_bytes for name in EXPERTS),
        kv_bytes=max(s.kv_bytes for s in states),
        ranks={name: infos[name].rank for name in EXPERTS},
    )


def show(out: TextIO, *, scene: int = 1, max_tokens: int = 220, plain: bool = False) -> None:
    """Runs a scene and draws it on `out`: four panels that fill on a terminal, else plain text."""
    chosen = load_scene(scene)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    llm = load()
    if plain or not out.isatty():
        states = _show_plain(out, llm, chosen, params)
    else:
        states = _show_panels(out, llm, chosen, params)
    for line in report_lines(measure(llm, chosen, states)):
        out.write(f"{line}\n")
    out.flush()


def report_lines(report: Report) -> list[str]:
    """What happened, in lines of text."""
    cost = report.step_with / report.step_without - 1
    ranks = ", ".join(f"{name} {rank}" for name, rank in report.ranks.items())
    merged = len(EXPERTS) * report.base_bytes
    shared = report.base_bytes + report.adapter_bytes
    return [
        "What happened",
        f"  One batch    {report.tokens} tokens in {report.seconds:.2f} s: "
        f"{report.tokens / report.seconds:.0f} tokens/s over {len(EXPERTS)} experts",
        f"  LoRA cost    {report.step_with * 1e3:.2f} ms for a decode step, "
        f"{report.step_without * 1e3:.2f} ms without adapters: {cost:+.0%}",
        f"  Memory       base {_mib(report.base_bytes)}, adapters {_mib(report.adapter_bytes)}, "
        f"KV at the peak {_mib(report.kv_bytes)}",
        f"  Ranks        {ranks}",
        f"  Instead of   {len(EXPERTS)} merged models: {_mib(merged)}; "
        f"one base and its adapters: {_mib(shared)}, {merged / shared:.1f} times less",
    ]


def _show_plain(out: TextIO, llm: LLM, scene: Scene, params: SamplingParams) -> list[State]:
    for heading, text in (("Job post", scene.post), ("Freelancer", scene.profile)):
        out.write(f"== {heading} ==\n{text}\n\n")
    states, shown = [], set()
    for state in run_batch(llm, scene.prompts, params):
        states.append(state)
        for expert, output in state.outputs.items():
            if output.finished and expert not in shown:
                shown.add(expert)
                out.write(f"== {expert} ==\n{output.outputs[0].text}\n\n")
                out.flush()
    return states


def _show_panels(out: TextIO, llm: LLM, scene: Scene, params: SamplingParams) -> list[State]:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=out)
    console.print(_panel("Job post", scene.post, "cyan"))
    console.print(_panel("Freelancer", scene.profile, "cyan"))
    states: list[State] = []
    # What is drawn live is cut to the height of the terminal; the whole is printed once at the end.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        drawn = 0.0
        for state in run_batch(llm, scene.prompts, params):
            states.append(state)
            if time.perf_counter() - drawn > 1 / 20:  # drawing at each step would slow the steps
                live.update(_grid(state), refresh=True)
                drawn = time.perf_counter()
    console.print(_grid(states[-1]))
    return states


def _grid(state: State) -> Any:
    """The four answers so far, two by two."""
    from rich.table import Table

    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    panels = []
    for expert in EXPERTS:
        output = state.outputs.get(expert)
        text = output.outputs[0].text if output else ""
        panels.append(_panel(expert, text, "green" if output and output.finished else "yellow"))
    for left, right in zip(panels[::2], panels[1::2], strict=True):
        grid.add_row(left, right)
    return grid


def _panel(title: str, text: str, style: str) -> Any:
    from rich.panel import Panel
    from rich.text import Text

    return Panel(Text(text), title=title, title_align="left", border_style=style)


def _count(outputs: Mapping[str, RequestOutput]) -> int:
    return sum(len(o.outputs[0].token_ids) for o in outputs.values())


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
