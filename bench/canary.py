"""A base and 64 adapters that each say a marker of their own: adapter i says token i.

The six bits of i are decided at six places, in closed form: there the adapter's delta reads a
direction that every token has and pushes the residual stream (at the head: the logits) one way or
the other, and the head's row of marker i is the sum of the six ways. So a single wrong page at any
of the places, or the KV of another adapter, makes another adapter's marker. Around that all weights
are random, so that logprobs differ from prompt to prompt.

A mix of three adapters with equal weights says the marker of their majority, bit by bit; the base
says `BASE_MARKER`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from checkout import load_checkout

load_checkout()

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.harness import adapter_folders  # noqa: E402
from tests.harness.model_folders import TINY as CONFIG  # noqa: E402
from tests.harness.model_folders import write_checkpoint  # noqa: E402

BITS = 6
ADAPTERS = 2**BITS
BASE_MARKER = ADAPTERS
RANKS = (4, 8, 12, 24)
CONSTANT = 8.0  # what every token's embedding has at `EVERY`, beside random values around 1
EVERY, VOTES = 0, slice(1, 1 + BITS)  # places in the residual stream: read; pushed, by bit
PUSHED, READ = 0, 1  # places of each head: of the values that qkv pushes, and of those that o reads
PUSH = 1.5  # of all layers that decide a bit
LEAD = 1.5  # of a logit, for each unit of a vote
SMALL = 0.01  # random parts of the adapters
NORMED = (CONFIG.hidden_size / (1 + CONFIG.hidden_size / CONSTANT**2)) ** 0.5
"""About what a norm makes of `CONSTANT`."""

ROOT, MLP = "base_model.model", ("gate", "up", "down")

Place = tuple[str, tuple[int, ...]]  # a site and its layers
PLACES: dict[str, tuple[Place, ...]] = {
    "all sites": (
        ("embed", ()),
        *((site, (0, 1)) for site in ("qkv", "o", "gate_up", "down")),
        ("lm_head", ()),
    ),
    # No embedding and no head: decode steps are captured.
    "in layers": (
        *((site, (0,)) for site in ("qkv", "o", "gate_up")),
        *((site, (1,)) for site in ("qkv", "o", "down")),
    ),
}


def marker_of(adapters: Collection[int]) -> int:
    """The token that a request with these adapters must say; they are one, three or none."""
    if not adapters:
        return BASE_MARKER
    votes = (sum(sign(i, bit) for i in adapters) for bit in range(BITS))
    return sum((vote > 0) << bit for bit, vote in enumerate(votes))


def sign(adapter: int, bit: int) -> int:
    """The way in which an adapter pushes for a bit: 1 or -1."""
    return 1 if adapter >> bit & 1 else -1


@dataclass(frozen=True)
class Teacher:
    """Writes the base and the adapters for some places, one for each bit."""

    places: tuple[Place, ...]

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(site for site, _ in self.places))

    def write_base(self, folder: Path) -> None:
        """The base, with a place for each bit's vote."""
        write_checkpoint(folder)
        path = folder / "model.safetensors"
        weights = load_file(path)
        embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
        embedding[:, EVERY], embedding[:, VOTES] = CONSTANT, 0
        for layer in range(CONFIG.num_layers):
            self._place_votes(weights, layer)
        head *= 0.5
        head[:, EVERY], head[:, VOTES], head[:ADAPTERS] = 0, 0, 0
        head[BASE_MARKER, EVERY] = 1
        for marker in range(ADAPTERS):
            for bit, (site, _) in enumerate(self.places):
                if site != "lm_head":  # whose LoRA gives the logits itself
                    head[marker, VOTES.start + bit] = LEAD * sign(marker, bit)
        save_file(weights, path, metadata={"format": "pt"})

    def _place_votes(self, weights: dict[str, Tensor], layer: int) -> None:
        """Leads what the LoRA of qkv and gate_up push to their places in the residual stream."""
        path, size = f"model.layers.{layer}", CONFIG.head_dim
        q, k, v, o = (weights[f"{path}.self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (weights[f"{path}.mlp.{name}_proj.weight"] for name in MLP)
        for weight in (q, k, v, gate, up):  # who else would read them
            weight[:, EVERY], weight[:, VOTES] = 0, 0
        o[EVERY], o[VOTES], down[EVERY], down[VOTES] = 0, 0, 0, 0
        for place in (PUSHED, READ):
            v[place::size], o[:, place::size] = 0, 0
        v[READ::size, EVERY] = 1 / NORMED
        for weight in (gate, up, down.T):
            weight[:2] = 0
        gate[:2, EVERY] = 1  # two neurons that are always on: gate_up pushes at the first one,
        up[1, EVERY] = 1 / NORMED**2  # down reads the second
        for place, push in self._pushes("qkv", layer):
            o[place, PUSHED::size] = push / CONFIG.num_heads
        for place, push in self._pushes("gate_up", layer):
            down[place, 0] = 2 * push

    def _pushes(self, site: str, layer: int) -> list[tuple[int, float]]:
        """The place in the stream that a site of a layer pushes, and how much; or none."""
        return [
            (VOTES.start + bit, PUSH / len(layers))
            for bit, (name, layers) in enumerate(self.places)
            if name == site and layer in layers
        ]

    def write_adapter(self, folder: Path, number: int) -> Path:
        """The adapter that says token `number`."""
        rank = RANKS[number % len(RANKS)]
        has_ends = "embed" in self.sites
        targets = (*adapter_folders.LINEARS, *(("embed_tokens", "lm_head") if has_ends else ()))
        adapter_folders.write_adapter(
            folder, CONFIG, rank=rank, alpha=rank, seed=number, targets=targets, scale=SMALL
        )
        adapter_folders.change_tensors(folder, lambda tensors: self._push(tensors, number, rank))
        return folder

    def _push(self, tensors: dict[str, Tensor], number: int, rank: int) -> None:
        """Adds the pushes, the same part of each by every rank row."""
        for bit, (site, layers) in enumerate(self.places):
            way = sign(number, bit) / rank
            for layer in layers:
                self._push_layer(tensors, site, layer, way)
            if site == "embed":
                tensors[f"{ROOT}.model.embed_tokens.lora_embedding_A"] += 1
                b = tensors[f"{ROOT}.model.embed_tokens.lora_embedding_B"]
                b[VOTES.start + bit] += PUSH * way
            if site == "lm_head":
                a, b = _pair(tensors, "lm_head")
                a[:, EVERY] += 1 / NORMED
                for marker in range(ADAPTERS):
                    b[marker] += LEAD * sign(marker, bit) * way

    def _push_layer(self, tensors: dict[str, Tensor], site: str, layer: int, way: float) -> None:
        path, size = f"model.layers.{layer}", CONFIG.head_dim
        if site == "qkv":
            a, b = _pair(tensors, f"{path}.self_attn.v_proj")
            a[:, EVERY] += 1 / NORMED
            b[PUSHED::size] += way
        if site == "gate_up":
            a, b = _pair(tensors, f"{path}.mlp.up_proj")
            a[:, EVERY] += 1 / NORMED**2
            b[0] += way
        if site == "o":
            a, b = _pair(tensors, f"{path}.self_attn.o_proj")
            a[:, READ::size] += 1 / CONFIG.num_heads
        if site == "down":
            a, b = _pair(tensors, f"{path}.mlp.down_proj")
            a[:, 1] += 1
        if site in ("o", "down"):  # they push by themselves; the others by way of the base
            for place, push in self._pushes(site, layer):
                b[place] += push * way


def _pair(tensors: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """A and B of a module."""
    return tensors[f"{ROOT}.{module}.lora_A.weight"], tensors[f"{ROOT}.{module}.lora_B.weight"]
