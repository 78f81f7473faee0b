"""What a profiler's trace says of steps: whose time each kernel is, where the GPU waits.

A trace is what `torch.profiler` writes for Chrome. Of a GPU its kernels, copies and fills count; in
a rehearsal, which has none, the outermost operators. Kernels have names that differ from one cuBLAS
to the next, so that a product is known by what came before it: each layer is norm, qkv, attention,
o, norm, gate_up, silu_mul, down, and the last norm is the head's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from gpu_model import Card, Kernel

KINDS = (
    ("rms_norm", r"rms_norm"),
    ("silu_mul", r"silu_mul"),
    ("rope_store_kv", r"rope_store_kv"),
    ("attention", r"paged_attention|_split_kernel|_chunk_kernel"),
    ("merge", r"merge_kernel"),
    ("lora_shrink", r"lora_shrink|_shrink_kernel"),
    ("lora_expand", r"lora_expand|_expand_kernel"),
    ("linear", r"multilora::linear|_matmul_kernel|nvjet|gemm|gemv|cutlass|cublas|splitK"),
    ("copy", r"[Mm]emcpy|[Mm]emset|aten::copy_"),
)
"""What a kernel is, by its name: the first that matches. The rest are torch's own."""
REST = "rest"
IN_A_SITE = ("linear", "lora_shrink", "lora_expand")
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")


@dataclass(frozen=True)
class Launch:
    """One kernel that ran; times in microseconds."""

    name: str
    start: float
    us: float

    @property
    def end(self) -> float:
        return self.start + self.us


@dataclass
class Row:
    """All launches of one label."""

    label: str
    names: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # us of each

    @property
    def count(self) -> int:
        return sum(map(len, self.names.values()))

    @property
    def us(self) -> float:
        return sum(map(sum, self.names.values()))

    @property
    def main(self) -> str:
        """The name that takes most of the time."""
        return max(self.names, key=lambda name: sum(self.names[name]))


def launches(trace: dict[str, Any]) -> list[Launch]:
    """What ran, in the order in which it started."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    found = [e for e in events if e.get("cat") in _GPU]
    if not found:
        found = _outermost(e for e in events if e.get("cat") == "cpu_op")
    made = [Launch(e["name"], float(e["ts"]), float(e["dur"])) for e in found]
    return sorted(made, key=lambda launch: launch.start)


def host_launches(trace: dict[str, Any]) -> int:
    """Calls of the driver that start something: kernels, whole graphs, copies."""
    runtime = [e for e in trace["traceEvents"] if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    return sum(bool(_LAUNCH.match(e["name"])) for e in runtime)


def _outermost(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other one of their thread holds."""
    found: list[dict[str, Any]] = []
    ends: dict[Any, float] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= ends.get(event.get("tid"), float("-inf")):
            ends[event.get("tid")] = event["ts"] + event["dur"]
            found.append(event)
    return found


def kind_of(name: str) -> str:
    """What kind of kernel has such a name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), REST)


def rows_of(found: Sequence[Launch], layers: int) -> dict[str, Row]:
    """The launches by label: a kind, with the site of products and LoRA, the name of the rest."""
    rows: dict[str, Row] = {}
    site, norms = "", 0
    for launch in found:
        kind = kind_of(launch.name)
        if kind == "rms_norm":
            at = norms % (2 * layers + 1)
            site = "lm_head" if at == 2 * layers else ("qkv", "gate_up")[at % 2]
            norms += 1
        elif kind in ("attention", "merge"):
            site = "o"
        elif kind == "silu_mul":
            site = "down"
        part = site if kind in IN_A_SITE else launch.name if kind == REST else ""
        label = f"{kind} {part}".strip()
        rows.setdefault(label, Row(label)).names[launch.name].append(launch.us)
    return rows


def busy(found: Sequence[Launch]) -> tuple[float, list[float]]:
    """How long anything ran, and the gaps in which nothing did, in microseconds."""
    merged: list[list[float]] = []
    for launch in found:
        if merged and launch.start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], launch.end)
        else:
            merged.append([launch.start, launch.end])
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(merged)]
    return sum(end - start for start, end in merged), gaps


@dataclass(frozen=True)
class Expected:
    """What the model gives to a label, all launches together."""

    count: float
    bytes: float
    us: float


def expected(steps: Sequence[Sequence[Kernel]], card: Card) -> dict[str, Expected]:
    """By label, of the kernels of all steps. One beside another may take as long as that one."""
    found: dict[str, Expected] = {}
    for kernels in steps:
        labels = {kernel.label: kernel for kernel in kernels}
        for kernel in kernels:
            us = kernel.predicted_us(card)
            if kernel.beside:
                us = max(us, labels[kernel.beside].predicted_us(card) + kernel.roofline_us(card))
            label = kernel.label if kernel.label not in ("embed", "sample", "draw") else REST
            old = found.get(label, Expected(0, 0, 0))
            found[label] = Expected(
                old.count + kernel.count,
                old.bytes + kernel.count * kernel.bytes,
                old.us + kernel.count * us,
            )
    return found


def table(
    rows: dict[str, Row], model: dict[str, Expected], steps: int, copy: float
) -> list[dict[str, Any]]:
    """One entry for each label, what takes longest first; counts and `us` are of a step.

    `copy` is in bytes per second. Labels without a model have no bytes; rates are those of the
    bytes that must move, activations among them.
    """
    found = []
    for row in sorted(rows.values(), key=lambda row: row.us, reverse=True):
        entry: dict[str, Any] = {
            "kernel": row.label if row.label.partition(" ")[0] != REST else REST,
            "name": row.main,
            "count": round(row.count / steps, 2),
            "us": round(row.us / steps, 2),
            "us_each": round(row.us / row.count, 3),
            "names": {
                name: {"count": round(len(us) / steps, 2), "us": round(sum(us) / steps, 2)}
                for name, us in row.names.items()
            },
        }
        want = model.get(row.label)
        if want is not None:
            rate = want.bytes / row.us * 1e6 if row.us else 0.0
            entry |= {
                "bytes": round(want.bytes / steps),
                "gigabytes_per_second": round(rate / 1e9, 1),
                "percent_of_copy": round(100 * rate / copy, 1),
                "predicted_count": round(want.count / steps, 2),
                "predicted_us": round(want.us / steps, 2),
            }
        found.append(entry)
    return found


def summary(found: Sequence[Launch], steps: int) -> dict[str, float]:
    """Of a step: launches, the kernels' sum, how long any ran, gaps."""
    ran, gaps = busy(found)
    return {
        "launches": round(len(found) / steps, 2),
        "sum_of_kernels_us": round(sum(launch.us for launch in found) / steps, 2),
        "busy_us": round(ran / steps, 2),
        "gap_us": round(sum(gaps) / steps, 2),
        "median_gap_us": round(median(gaps), 3) if gaps else 0.0,
        "largest_gap_us": round(max(gaps, default=0.0), 2),
    }


def lines(entries: Sequence[dict[str, Any]], most: int = 20) -> list[str]:
    """The table to print, as text."""
    head = f"{'kernel':18}{'name':28}{'count':>7}{'us':>10}{'each':>9}{'MB':>9}{'GB/s':>7}"
    text = [head + f"{'% copy':>8}{'model us':>10}"]
    for e in entries[:most]:
        name = e["name"] if len(e["name"]) <= 26 else f"{e['name'][:25]}~"
        line = f"{e['kernel']:18}{name:28}{e['count']:7g}{e['us']:10.1f}{e['us_each']:9.2f}"
        if "bytes" in e:
            line += f"{e['bytes'] / 1e6:9.1f}{e['gigabytes_per_second']:7.0f}"
            line += f"{e['percent_of_copy']:8.1f}{e['predicted_us']:10.1f}"
        text.append(line)
    return text
