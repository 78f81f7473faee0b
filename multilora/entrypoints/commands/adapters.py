"""`multilora adapters pull`, `list`, `show` and `gc`: the cache of what was fetched."""

from __future__ import annotations

import time
from pathlib import Path  # at run time too: typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import AdapterInvalid, shown
from .info import parse_size

if TYPE_CHECKING:
    from ...adapters.sources.cache import SourceCache

CacheDir = Annotated[
    Path | None, typer.Option(help="Folder of the cache; ~/.cache/multilora/adapters.")
]
Source = Annotated[str, typer.Argument(help="hf://org/name[@revision], s3://bucket/folder, ...")]
NUM_SHOWN, MIN_DIGITS = 12, 6  # digits of a content's name


def pull(source: Source, cache_dir: CacheDir = None) -> None:
    """Fetches an adapter into the cache, where engines find it, and prints its folder."""
    from ...adapters.sources.folders import SourceFolders

    with SourceFolders([source], _cache(cache_dir)).folder(source) as folder:
        print(folder)


def list_(cache_dir: CacheDir = None) -> None:
    """Lists what the cache holds, the most recently used first: content, bytes, used, sources."""
    cache = _cache(cache_dir)
    sources: dict[str, list[str]] = {}
    for note in cache.sources():
        sources.setdefault(note.content, []).append(note.source)
    for folder in reversed(cache.folders()):
        used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.used))
        places = " ".join(sources.get(folder.content, ["-"]))
        print(f"{folder.content[:NUM_SHOWN]}  {folder.num_bytes:>13,}  {used}  {places}")


def show(
    source: Annotated[
        str,
        typer.Argument(help="A source that was fetched, the first digits of a content, a folder."),
    ],
    cache_dir: CacheDir = None,
) -> None:
    """Prints what an adapter's config says, without its base and without the network."""
    from ...adapters.peft.config import MAX_CONFIG_BYTES, parse_config
    from ...adapters.peft.files import CONFIG_FILE, open_regular, strict_json

    folder = _folder_of(source, _cache(cache_dir))
    with open_regular(folder / CONFIG_FILE, MAX_CONFIG_BYTES) as file:
        data = file.read(MAX_CONFIG_BYTES)
    spec = parse_config(data)
    targets = spec.targets if isinstance(spec.targets, str) else ", ".join(sorted(spec.targets))
    base = strict_json(data, CONFIG_FILE).get("base_model_name_or_path")
    kinds = {"DoRA": spec.dora, "rsLoRA": spec.rslora, "activated": bool(spec.invocation)}
    print(f"folder   {folder}")
    print(f"bytes    {sum(f.stat().st_size for f in folder.iterdir() if f.is_file())}")
    print(f"base     {shown(base)}")
    print(f"rank     {spec.rank}")
    print(f"alpha    {spec.alpha:g}")
    print(f"targets  {targets}")
    print(f"kind     {', '.join(name for name, is_it in kinds.items() if is_it) or 'LoRA'}")


def gc(
    max_bytes: Annotated[str, typer.Option(help="Of the cache afterwards: 10GiB, 500MB, 0.")],
    cache_dir: CacheDir = None,
) -> None:
    """Removes what was not used for longest from the cache, but nothing that is being read."""
    left = _cache(cache_dir).make_room(parse_size(max_bytes, "--max-bytes", 0))
    print(f"{left:,} bytes are left")


def _cache(root: Path | None) -> SourceCache:
    from ...adapters.sources.cache import SourceCache, default_root

    return SourceCache(default_root() if root is None else root)


def _folder_of(source: str, cache: SourceCache) -> Path:
    from ...adapters.sources.address import parse

    found = [folder.content for folder in cache.folders() if folder.content.startswith(source)]
    if len(found) == 1 and len(source) >= MIN_DIGITS:
        return cache.path(found[0])
    place = parse(source)
    if isinstance(place, Path):
        return place
    known = cache.known(str(place))
    if known is None:
        raise AdapterInvalid(
            f"{place} is not in the cache; fetch it first: multilora adapters pull {place}"
        )
    return cache.path(known.content)
