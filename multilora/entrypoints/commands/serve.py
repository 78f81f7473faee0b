"""`multilora serve`: the OpenAI-compatible server."""

from __future__ import annotations

import json
import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import ConfigError
from . import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...config.engine import EngineConfig
    from ...server.settings import ServerSettings

NEEDS = ("fastapi", "uvicorn", "prometheus_client", "pydantic")
KEY, ADMIN_KEY, ADMIN = (
    "MULTILORA_API_KEY",
    "MULTILORA_ADMIN_API_KEY",
    "MULTILORA_ENABLE_LORA_ADMIN",
)
SERVER = ("host", "port", "enable_lora_admin", "max_body_bytes", "drain_seconds")
SETTINGS = (
    *("tokenizer", "dtype", "quantization", "quantization_group_size", "kv_cache_dtype", "device"),
    *("load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_loras"),
    *("max_lora_rank", "lora_pages", "num_kv_blocks", "gpu_memory_utilization", "max_logprobs"),
    *("adapter_chat_template", "split_special_tokens", "generation_config", "seed"),
    *("enforce_eager", "adapter_sources", "adapter_cache_dir"),
)
Modules = Annotated[
    list[str] | None,
    typer.Option(
        help="name=folder, or JSON with name and path; several may follow one --lora-modules."
    ),
]
Names = Annotated[
    list[str] | None, typer.Option(help="Name of the base in requests; repeat for more.")
]
Keys = Annotated[
    list[str] | None,
    typer.Option(help=f"A key that clients must send; repeat for more. Better: {KEY}."),
]
AdminKeys = Annotated[
    list[str] | None, typer.Option(help=f"A key for loading adapters. Better: {ADMIN_KEY}.")
]
Sources = Annotated[
    list[str] | None, typer.Option(help="Prefix that adapters may be fetched from; repeat.")
]
Lora = Annotated[bool, typer.Option("--enable-lora", help="As in vLLM; adapters are always on.")]
Admin = Annotated[
    bool, typer.Option("--enable-lora-admin", envvar=ADMIN, help="Load adapters over HTTP.")
]
Split = Annotated[bool, typer.Option("--split-special-tokens", help="In prompts they are text.")]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="Decode steps are not captured.")]


def serve(
    model: Annotated[str, typer.Argument(help="Folder of the base checkpoint.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 = any that is free.")] = 8000,
    served_model_name: Names = None,
    lora_modules: Modules = None,
    api_key: Keys = None,
    admin_api_key: AdminKeys = None,
    enable_lora: Lora = False,
    enable_lora_admin: Admin = False,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait.")] = 4096,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = 4 << 20,
    drain_seconds: Annotated[float, typer.Option(help="For requests, after SIGTERM.")] = 30.0,
    tokenizer: Annotated[str | None, typer.Option(help="Its folder; the model's.")] = None,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    quantization_group_size: options.GroupSize = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    device: options.Device = "cpu",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Of a step; 512.")] = None,
    max_loras: options.MaxLoras = None,
    max_lora_rank: options.MaxLoraRank = None,
    lora_pages: options.LoraPages = None,
    num_kv_blocks: options.NumKVBlocks = None,
    gpu_memory_utilization: options.MemoryShare = None,
    max_logprobs: Annotated[int | None, typer.Option(help="At a place; 20.")] = None,
    adapter_chat_template: Annotated[str, typer.Option(help="ignore or use.")] = "ignore",
    adapter_sources: Sources = None,
    adapter_cache_dir: Annotated[str | None, typer.Option(help="Keeps what was fetched.")] = None,
    generation_config: Annotated[str, typer.Option(help="auto or vllm.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of requests that set none.")] = 0,
    split_special_tokens: Split = False,
    enforce_eager: Eager = False,
) -> None:
    """Serves a base and its adapters over HTTP, as OpenAI's clients ask for them."""
    _run({name: value for name, value in locals().items() if value is not None})


def _run(given: dict[str, Any]) -> None:
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise ConfigError(f"serve needs {', '.join(missing)}: pip install 'multilora[server]'")
    from ...config.engine import EngineConfig

    folders = parse_modules([*given.get("lora_modules", ()), *given.get("more", ())])
    settings = server_settings(given, os.environ.get(KEY), os.environ.get(ADMIN_KEY))
    own = {name: given[name] for name in SETTINGS if name in given}
    _log()
    _serve(EngineConfig(model=given["model"], **own), settings, folders, given["max_waiting"])


def server_settings(given: dict[str, Any], key: str | None, admin: str | None) -> ServerSettings:
    """The server's own settings, with keys of the environment, where there are any."""
    from ...server.settings import ServerSettings

    return ServerSettings(
        served_model_name=tuple(given.get("served_model_name", ())),
        api_keys=(*given.get("api_key", ()), *([key] if key else ())),
        admin_keys=(*given.get("admin_api_key", ()), *([admin] if admin else ())),
        **{name: given[name] for name in SERVER},
    )


def parse_modules(given: Sequence[str]) -> dict[str, str]:
    """name -> folder, from "name=folder" and vLLM's JSON. A ConfigError for anything else."""
    found: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                entry = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"--lora-modules {text!r} is no JSON: {error}") from None
            name, folder = entry.pop("name", ""), entry.pop("path", "")
            entry.pop("base_model_name", None)  # there is one base
            if entry:
                raise ConfigError(f"--lora-modules knows no {min(entry)!r}; give name and path")
        if not (isinstance(name, str) and isinstance(folder, str) and name and folder):
            raise ConfigError(f"--lora-modules must be name=folder, not {text!r}")
        if name in found:
            raise ConfigError(f"--lora-modules gives {name!r} twice; use two names")
        found[name] = folder
    return found


def _serve(
    config: EngineConfig, settings: ServerSettings, folders: dict[str, str], max_waiting: int
) -> None:
    """Loads everything and serves until it is told to end."""
    import asyncio

    from ...server.run import Server, bound_socket
    from ...serving.async_engine import AsyncEngine

    if taken := [name for name in settings.served_model_name or (config.model,) if name in folders]:
        raise ConfigError(f"{taken[0]!r} is the base and an adapter; use two names")
    address = bound_socket(settings)
    engine = AsyncEngine(config, max_waiting=max_waiting)

    async def main() -> None:
        server = Server(engine, settings)
        try:
            for name, folder in folders.items():
                await engine.load_adapter(name, folder)
            await server.serve([address])
        finally:
            await engine.shutdown()

    asyncio.run(main())


def _log() -> None:
    """Ours and uvicorn's on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("multilora", "uvicorn"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
