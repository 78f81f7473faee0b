"""Tables from the raw results of bench_cpu.py: medians, ratios, percent of the floor."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from floor import Floor, Peaks, floor_of
from work import CASES, PRECISIONS, SHAPES, WEIGHT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Result = dict[str, Any]  # one call of `bench_cpu.py run`: see there
NEAR_TIE = 1e-3
"""fp32 engines sum in different orders: a token whose logit is this close to the best is right."""


@dataclass(frozen=True)
class Line:
    """One peer in one case: medians over the repeats."""

    peer: str
    precision: str
    case: str
    requests: int
    rate: float  # new tokens per second, prefill included
    decode: float | None
    first: float  # seconds until the last request's first token
    ratio: float | None  # ours / peer
    floor: float  # our rate would be this at the floor
    floor_dots: float
    seconds: float
    floor_seconds: Floor
    read: float | None  # share of the bandwidth that decoding one request reads at
    wrong: str


def lines(results: Sequence[Result]) -> Iterator[Line]:
    """By precision, number of requests and case; the fastest first."""
    for result in sorted(results, key=lambda r: PRECISIONS.index(r["precision"])):
        found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for timing in result["timings"]:
            found[timing["case"], timing["peer"]].append(timing)
        for case in CASES:
            peers = [peer for c, peer in found if c == case]
            made = [_line(result, case, peer, found) for peer in peers]
            yield from sorted(made, key=lambda line: -line.rate)


def _line(
    result: Result, case: str, peer: str, found: dict[tuple[str, str], list[dict[str, Any]]]
) -> Line:
    runs, ours = found[case, peer], found.get((case, "ours"))
    shape, peaks = SHAPES[result["work"]], Peaks(**result["peaks"])
    size = {name: result[name] for name in ("requests", "prompt", "new")}
    rate = median(run["rate"] for run in runs)
    decodes = [run["decode"] for run in runs]
    decode = None if None in decodes else median(decodes)
    floors = [
        floor_of(shape, peaks, result["precision"], case, dots=dots, **size)
        for dots in (False, True)
    ]
    tokens = size["requests"] * size["new"]
    weights = (shape.body + shape.head) * WEIGHT_BYTES[result["precision"]]
    single = decode is not None and size["requests"] == 1 and case == "base"
    return Line(
        peer=peer,
        precision=result["precision"],
        case=case,
        requests=size["requests"],
        rate=rate,
        decode=decode,
        first=median(run["first_last"] for run in runs),
        ratio=median(run["rate"] for run in ours) / rate if ours and peer != "ours" else None,
        floor=rate * floors[0].total / tokens,
        floor_dots=rate * floors[1].total / tokens,
        seconds=median(run["seconds"] for run in runs),
        floor_seconds=floors[0],
        read=decode * weights / peaks.read / 1e9 if single and decode else None,
        wrong=_verdict(result.get("gaps", {}).get(f"{peer} {case}")),
    )


def _verdict(gaps: dict[str, Any] | None) -> str:
    """How the tokens compare with PEFT's in fp32: see `gap_summary`."""
    if gaps is None:
        return ""
    if not gaps["others"]:
        return "all"
    return f"{gaps['same']:.1%}, gap {gaps['largest']:.2g}"


def gap_summary(gaps: Sequence[Sequence[float]]) -> dict[str, Any]:
    """From the logit gaps of an answer's tokens: the share that PEFT would choose, and the rest.

    `others` counts tokens further from the best than a near tie, `largest` is the largest gap.
    """
    flat = [gap for row in gaps for gap in row]
    return {
        "tokens": len(flat),
        "same": sum(gap == 0 for gap in flat) / len(flat),
        "others": sum(gap > NEAR_TIE for gap in flat),
        "largest": max(flat),
    }


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    rows = [
        ("precision", "requests", "case", "engine", "tokens/s", "ours is x", "decode tokens/s",
         "first token s", "% of floor", "% with dots", "% of bandwidth", "tokens as PEFT fp32"),
    ]  # fmt: skip
    for line in lines(results):
        rows.append(
            (
                line.precision,
                str(line.requests),
                line.case,
                line.peer,
                f"{line.rate:.1f}",
                "" if line.ratio is None else f"{line.ratio:.2f}",
                "" if line.decode is None else f"{line.decode:.1f}",
                f"{line.first:.2f}",
                f"{line.floor:.0%}",
                "" if line.precision == "fp32" else f"{line.floor_dots:.0%}",
                "" if line.read is None else f"{line.read:.0%}",
                line.wrong,
            )
        )
    return markdown(rows)


def lora_cost(results: Sequence[Result]) -> str:
    """What the adapters add to our decoding, over what they add to the floor."""
    found = {(line.precision, line.requests, line.case): line for line in lines(results)
             if line.peer == "ours"}  # fmt: skip
    rows = [("precision", "requests", "case", "LoRA adds ms/step", "at the floor", "ratio")]
    for (precision, requests, case), line in found.items():
        base = found.get((precision, requests, "base"))
        if case == "base" or base is None or not line.decode or not base.decode:
            continue
        new = next(r["new"] for r in results if r["requests"] == requests)
        added = requests / line.decode - requests / base.decode
        least = (line.floor_seconds.decode - base.floor_seconds.decode) / (new - 1)
        rows.append(
            (precision, str(requests), case, f"{added * 1e3:.2f}", f"{least * 1e3:.2f}",
             f"{added / least:.2f}")
        )  # fmt: skip
    return markdown(rows) if len(rows) > 1 else ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with a head; columns are as wide as they need to be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
            for row in rows]  # fmt: skip
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)
