"""What a model asks of a checkpoint, part by part, and what a checkpoint offers."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


DTYPES = ("F32", "F16", "BF16")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Tables of rotary frequencies that old files carry; they follow from the config.
_IGNORED = ("*.rotary_emb.inv_freq", "rope.freqs")


@dataclass(frozen=True, slots=True)
class Part:
    """What is loaded at one go, such as a fused linear."""

    shapes: Mapping[str, tuple[int, ...]]  # of its weights, by Hugging Face's names
    # Takes a function that reads one of these weights, in the checkpoint's dtype; what it returns
    # may be a view of a mapped file: to be copied, never written to.
    load: Callable[[Callable[[str], Tensor]], None]


def fill(targets: Mapping[str, Tensor]) -> Part:
    """The part that copies each weight into its target, cast once to the target's dtype."""

    def load(read: Callable[[str], Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(read(name))

    return Part({name: tuple(target.shape) for name, target in targets.items()}, load)


@dataclass(frozen=True, slots=True)
class CheckpointWeight:
    """One weight of a checkpoint that is not read yet."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, e.g. "BF16"
    file: Path  # where it lies; the first file of a weight that is split over several
    read: Callable[[], Tensor]


def some_of(names: list[str], shown: int = 5) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def is_ignored(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _IGNORED)
