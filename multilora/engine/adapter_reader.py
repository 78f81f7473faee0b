"""From an adapter's source to its packed pages; changes nothing, so that any thread may do it."""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.loader import AdapterSource, LoadedAdapter
from ..adapters.peft.reader import Adapter, read_adapter
from ..adapters.sources.cache import SourceCache, default_root
from ..adapters.sources.folders import SourceFolders
from ..checkpoint.reader import read_base_weight
from ..tokenization.chat_template import has_other_template

if TYPE_CHECKING:
    from ..adapters.store import AdapterStore
    from ..config.engine import EngineConfig
    from ..config.model import ModelConfig
    from ..model.llama import Llama
    from ..tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class AdapterReader:
    """Reads adapters for one engine."""

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
        root = Path(config.adapter_cache_dir) if config.adapter_cache_dir else default_root()
        self.folders = SourceFolders(
            config.adapter_sources, SourceCache(root, config.adapter_cache_bytes)
        )

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

    def _read(self, name: str, source: AdapterSource, folder: Path) -> LoadedAdapter:
        with self._fetched if source.is_remote else nullcontext():
            return self._read_now(name, source, folder)

    def _read_now(self, name: str, source: AdapterSource, folder: Path) -> LoadedAdapter:
        adapter = read_adapter(folder, self._model_config, max_rank=self._config.max_lora_rank)
        found = self.pack(name, adapter)
        templates = self._tokenizer.chat_templates if self._tokenizer is not None else None
        if templates is not None and has_other_template(folder, templates):
            logger.warning(
                "adapter %r: %s has a chat template of its own, and chats are rendered with the "
                "base's; start with tokenizer=%s if it was trained with that one",
                name,
                source.path,
                "FOLDER, where its tokenizer is," if source.is_remote else repr(str(folder)),
            )
        return found

    def pack(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """The adapter in page layout."""
        base = {
            site: read_base_weight(self._config.model, site, self._model_config)
            for site in adapter.base_weights
        }
        host = self._store.pack(name, adapter, base=base, served=self._model)
        return LoadedAdapter(adapter.digest, host)
