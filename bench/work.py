"""The work that is measured: shapes of random Llamas, their adapters, the cases, the prompts.

Plain Python, because every peer's environment imports it.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

RANKS = (8, 16, 32, 64)  # of the adapters, in turn
NUM_ADAPTERS = 16
THREADS = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or 2)
"""Of the processor, unless `--threads` says otherwise."""
CASES = ("distinct", "identical", "base")
PRECISIONS = ("fp32", "bf16", "int8", "int4")
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # scales left out
ADAPTER_BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "int4": 2}

FUSED = {  # site -> its linears
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; counts are of parameters."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int
    vocab: int
    tied: bool = False
    dtype: str = "float32"  # of the checkpoint on disk

    @property
    def linears(self) -> dict[str, tuple[str, int, int]]:
        """The adapted linears of a layer: name -> (parent, out, in)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": ("self_attn", q, self.hidden),
            "k_proj": ("self_attn", kv, self.hidden),
            "v_proj": ("self_attn", kv, self.hidden),
            "o_proj": ("self_attn", self.hidden, q),
            "gate_proj": ("mlp", self.inter, self.hidden),
            "up_proj": ("mlp", self.inter, self.hidden),
            "down_proj": ("mlp", self.hidden, self.inter),
        }

    @property
    def fused(self) -> dict[str, tuple[int, int]]:
        """The products that our engine makes of them and the head: site -> (in, out)."""
        size = {name: (in_, out) for name, (_, out, in_) in self.linears.items()}
        found = {
            site: (size[names[0]][0], sum(size[name][1] for name in names))
            for site, names in FUSED.items()
        }
        return found | {"lm_head": (self.hidden, self.vocab)}

    @property
    def body(self) -> int:
        """Linear weights of all layers, without head and embedding."""
        return self.layers * sum(out * in_ for _, out, in_ in self.linears.values())

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def per_rank(self) -> int:
        """An adapter's weights for each unit of its rank, all layers."""
        return self.layers * sum(out + in_ for _, out, in_ in self.linears.values())


SHAPES = {
    "tiny": Shape(2, 64, 4, 2, 16, 96, 320),
    "132m": Shape(12, 768, 12, 4, 64, 2304, 32_000),
    # Llama 3.2 1B
    "1b": Shape(16, 2048, 32, 8, 64, 8192, 128_256, tied=True, dtype="bfloat16"),
}


@dataclass(frozen=True)
class Work:
    """A shape and the folder that holds its files."""

    name: str
    root: Path

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def base(self) -> Path:
        return self.root / self.name / "base"

    @property
    def adapters(self) -> list[Path]:
        return [self.root / self.name / "adapters" / f"a{i}" for i in range(NUM_ADAPTERS)]

    def own(self, peer: str) -> Path:
        """Where a peer keeps the model in its own format."""
        return self.root / self.name / peer


def rank_of(adapter: int) -> int:
    return RANKS[adapter % len(RANKS)]


def adapters_of(case: str, requests: int) -> list[int | None]:
    """The adapter of each request; None is the base."""
    chosen = {"identical": 2, "base": None}
    return [i % NUM_ADAPTERS if case == "distinct" else chosen[case] for i in range(requests)]


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Fixed random token ids; a prompt does not depend on how many there are."""
    rows = []
    for i in range(count):
        rng = random.Random(i)
        rows.append([rng.randrange(3, vocab) for _ in range(length)])
    return rows
