"""Reads an adapter into page layout. It changes nothing: any thread may do it, beside the steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.loader import AdapterSource, LoadedAdapter
from ..adapters.mix import check_name
from ..adapters.peft.files import adapter_folder
from ..adapters.peft.reader import Adapter, adapter_from_tensors, read_adapter
from ..adapters.sources.cache import SourceCache, default_root
from ..adapters.sources.folders import SourceFolders
from ..adapters.store import AdapterStore
from ..checkpoint.reader import read_base_weight
from ..config.engine import EngineConfig
from ..config.model import ModelConfig
from ..errors import AdapterInvalid, shown
from ..model.llama import Llama
from ..tokenization.chat_template import other_templates
from ..tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class AdapterReader:
    """What an engine's adapters are read with; `Engine.install_adapter` serves what it gives."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: Llama,
        store: AdapterStore,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._config, self._model_config, self._model = config, model_config, model
        self._store, self._tokenizer = store, tokenizer
        self._fetched = threading.Lock()  # one of these is read at a time: there are the steps
        cache = None
        if config.adapter_sources:  # or nothing is ever fetched
            root = Path(config.adapter_cache_dir) if config.adapter_cache_dir else default_root()
            cache = SourceCache(root, config.adapter_cache_bytes)
        self.folders = SourceFolders(config.adapter_sources, cache)

    def read(self, name: str, source: AdapterSource) -> LoadedAdapter:
        """The adapter at a source, packed.

        What the cache has of a source is used without asking where a digest is to be met; if it is
        another one, the source may have the right one by now.
        """
        with self.folders.folder(source.path, is_pinned=source.digest is not None) as folder:
            found = self._read(name, source, folder)
        if source.digest not in (None, found.digest):
            with self.folders.folder(source.path) as folder:
                found = self._read(name, source, folder)
        return found

    def read_folder(self, name: str, path: str | Path) -> LoadedAdapter:
        """The adapter of a PEFT folder, or what is fetched; see `Engine.load_adapter`."""
        if not isinstance(path, str | Path):
            raise AdapterInvalid(f"an adapter's folder must be a path, not {shown(path)}")
        check_name(name)
        return self.read(name, AdapterSource(path))

    def _read(self, name: str, source: AdapterSource, folder: Path) -> LoadedAdapter:
        with self._fetched if source.is_remote else nullcontext():
            return self._read_now(name, source, folder)

    def _read_now(self, name: str, source: AdapterSource, folder: Path) -> LoadedAdapter:
        adapter = read_adapter(folder, self._model_config, max_rank=self._config.max_lora_rank)
        found = self._pack(name, adapter)
        templates = self._templates(folder)
        template = templates.get("default")
        if templates and self._config.adapter_chat_template == "ignore":
            logger.warning(
                "adapter %r: %s has a chat template of its own, and chats are rendered with the "
                "base's; start with adapter_chat_template='use' if it was trained with that one",
                name,
                source.path,
            )
        elif templates and template is None:
            logger.warning(
                "adapter %r: %s has the chat templates %s, and chats are rendered with the base's: "
                "of an adapter the default one alone is used",
                name,
                source.path,
                ", ".join(sorted(templates)),
            )
        return replace(found, chat_template=template, path=str(source.path))

    def chat_template(self, source: AdapterSource) -> str | None:
        """The chat template of an adapter; None if it has none, or the base's."""
        with self.folders.folder(source.path, is_pinned=source.digest is not None) as folder:
            return self._templates(folder).get("default")

    def _templates(self, folder: Path) -> dict[str, str]:
        """Those of a folder that the base has not, by name."""
        if self._tokenizer is None:
            return {}
        return other_templates(adapter_folder(folder), self._tokenizer.chat_templates)

    def read_tensors(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> LoadedAdapter:
        """The adapter that lies in memory; see `Engine.load_adapter_from_tensors`."""
        for what, given in (("config", config), ("tensors", tensors)):
            if not isinstance(given, Mapping):
                raise AdapterInvalid(f"an adapter's {what} must be a mapping, not {shown(given)}")
        max_rank = self._config.max_lora_rank
        adapter = adapter_from_tensors(config, tensors, self._model_config, max_rank=max_rank)
        return self._pack(name, adapter)

    def _pack(self, name: str, adapter: Adapter) -> LoadedAdapter:
        base = {
            site: read_base_weight(self._config.model, site, self._model_config)
            for site in adapter.weights
        }
        host = self._store.pack(name, adapter, base=base, served=self._model)
        return LoadedAdapter(adapter.digest, host)
