"""Reads an adapter into page layout. It changes nothing: any thread may do it, beside the steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.loader import LoadedAdapter
from ..adapters.mix import check_name
from ..adapters.peft.files import adapter_folder
from ..adapters.peft.reader import Adapter, adapter_from_tensors, read_adapter
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

    def read_folder(self, name: str, path: str | Path) -> LoadedAdapter:
        """The adapter of a PEFT folder; see `Engine.load_adapter`."""
        if not isinstance(path, str | Path):
            raise AdapterInvalid(f"an adapter's folder must be a path, not {shown(path)}")
        check_name(name)
        path = Path(path)
        adapter = read_adapter(path, self._model_config, max_rank=self._config.max_lora_rank)
        found = self._pack(name, adapter)
        template = self.chat_template(path)
        if template is not None and self._config.adapter_chat_template == "ignore":
            logger.warning(
                "adapter %r: %s has a chat template of its own, and chats are rendered with the "
                "base's; start with adapter_chat_template='use' if it was trained with that one",
                name,
                path,
            )
        return replace(found, chat_template=template)

    def chat_template(self, path: Path) -> str | None:
        """The chat template of an adapter's folder; None if it has none, or the base's."""
        if self._tokenizer is None:
            return None
        others = other_templates(adapter_folder(path), self._tokenizer.chat_templates)
        return others.get("default", next(iter(others.values()), None))

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
