"""Which modules of a model an adapter changes, at which rank and scale: PEFT's matching rules."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import regex

from ...errors import AdapterInvalid, AdapterTooLarge, shown
from .patterns import check_pattern

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ...config.lora_sites import Site
    from .config import LoraSpec

MAX_MATCH_SECONDS = 0.15  # of processor time, for all expressions of an adapter together

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Target:
    """One linear (or the embedding) that an adapter changes by `scale * B A`."""

    site: Site
    layer: int
    index: int  # slice within the site
    rank: int
    scale: float

    @property
    def a_shape(self) -> tuple[int, int]:
        """Shape of A: [rank, in]; for the embedding [rank, vocab]."""
        return self.rank, self.site.in_

    @property
    def b_shape(self) -> tuple[int, int]:
        """Shape of B: [out, rank]."""
        return self.site.slices[self.index].out, self.rank


def find_targets(
    spec: LoraSpec,
    sites: Mapping[str, Site],
    max_rank: int,
    *,
    saved: Collection[str] = (),  # sites that are saved whole, and so no target
    tied: bool = False,  # whether the embedding and the head are targets together
) -> dict[str, Target]:
    """The modules that `spec` targets, by checkpoint path ("model.layers.0.self_attn.q_proj").

    Raises AdapterInvalid when there are none, or an expression is malformed or takes too long, and
    AdapterTooLarge when one of them has a rank above `max_rank`.
    """
    places = {
        site.module_path(layer, index): (site, layer, index)
        for site in sites.values()
        for layer in range(site.layers)
        for index in range(len(site.slices))
    }
    matcher = _Matcher(spec, places)
    targeted = {path for path, (site, *_) in places.items() if matcher.targets(path, site)}
    ends = {path for path, (site, *_) in places.items() if not site.in_layers}
    if tied and not targeted.isdisjoint(ends):
        targeted |= ends
    found = {}
    for path, (site, layer, index) in places.items():
        if path not in targeted or site.name in saved:
            continue
        rank = matcher.first("rank_pattern", spec.rank_pattern, path, spec.rank)
        if rank > max_rank:
            raise AdapterTooLarge(
                f"{path} has rank {shown(rank)}, above max_lora_rank={max_rank}; "
                f"restart with max_lora_rank>={shown(-(-rank // 8) * 8)}"
            )
        alpha = matcher.first("alpha_pattern", spec.alpha_pattern, path, spec.alpha)
        scale = alpha / (math.sqrt(rank) if spec.rslora else rank)
        found[path] = Target(site, layer, index, rank, scale)
    if not found:
        names = spec.targets if isinstance(spec.targets, str) else sorted(spec.targets)
        raise AdapterInvalid(
            f"target_modules={shown(names)} (with exclude_modules and layers_to_transform) names "
            f"no module of this base; its modules end in {', '.join(_last_names(sites))}"
        )
    return found


class _Matcher:
    """PEFT's rules, with a time limit on expressions, which anyone can make explode."""

    def __init__(self, spec: LoraSpec, paths: Mapping[str, object]) -> None:
        self._spec = spec
        self._ends = {path: _endings(path) for path in paths}
        self._known = frozenset[str]().union(*self._ends.values())
        self._compiled: dict[str, Any] = {}
        self._deadline = time.thread_time() + MAX_MATCH_SECONDS

    def targets(self, path: str, site: Site) -> bool:
        """Whether the module is adapted."""
        spec = self._spec
        if isinstance(spec.exclude, str):
            if self._run("exclude_modules", "fullmatch", spec.exclude, path):
                return False
        elif not self._ends[path].isdisjoint(spec.exclude):
            return False
        if isinstance(spec.targets, str):
            if spec.targets.lower() == "all-linear":  # PEFT leaves the output layer out
                return site.in_layers
            return bool(self._run("target_modules", "fullmatch", spec.targets, path))
        if path in spec.targets:
            return True  # by its full path: PEFT then looks at no layer
        return not self._ends[path].isdisjoint(spec.targets) and self._in_layers(path)

    def first(self, field: str, table: Mapping[str, V], path: str, default: V) -> V:
        """Value of the first key, in the order of the file, that matches an ending of `path`."""
        for key, value in table.items():
            # An ending of some module's path can match no other path, so the usual key costs one
            # lookup: a 70B adapter may carry one key for each of its 560 modules.
            if key in self._known:
                if key in self._ends[path]:
                    return value
            elif self._run(field, "match", rf"(.*\.)?({key})$", path):
                return value
        return default

    def _in_layers(self, path: str) -> bool:
        layers = self._spec.layers
        if layers is None:
            return True
        for pattern in self._spec.layers_patterns or (r"[^.]*",):
            start = r"(?:^|.*?\.)" if self._spec.layers_patterns else r".*?\."
            match = self._run("layers_pattern", "match", rf"{start}{pattern}\.(?P<idx>\d+)\.", path)
            if match:
                return int(match["idx"]) in layers if match["idx"] else False
        return False

    def _run(self, field: str, method: str, pattern: str, path: str) -> Any:
        """`regex`'s match object or None. `method` is "match" or "fullmatch"."""
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                compiled = self._compiled[pattern] = _compile(field, pattern)
            left = self._deadline - time.thread_time()
            if left <= 0:
                raise TimeoutError
            return getattr(compiled, method)(path, timeout=left)
        except TimeoutError as error:
            raise AdapterInvalid(
                f"{field}: its expressions take more than {MAX_MATCH_SECONDS} s to match; "
                f"simplify {shown(pattern)}, or list the modules by name"
            ) from error


def _compile(field: str, pattern: str) -> Any:
    check_pattern(field, pattern)
    try:
        # Not cached by the library: its cache is shared, and these come from strangers.
        return regex.compile(pattern, cache_pattern=False)
    except (regex.error, RecursionError, OverflowError, ValueError, IndexError) as error:
        raise AdapterInvalid(
            f"{field}: {shown(pattern)} is not a regular expression: {error}"
        ) from error


def _endings(path: str) -> frozenset[str]:
    """The path and what follows each of its dots: "a.b.c", "b.c", "c"."""
    words = path.split(".")
    return frozenset(".".join(words[start:]) for start in range(len(words)))


def _last_names(sites: Mapping[str, Site]) -> list[str]:
    return [piece.module for site in sites.values() for piece in site.slices]
