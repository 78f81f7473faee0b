"""Serves many LoRA adapters from one shared Llama, in one batch.

The names below are loaded when they are first used, so that `import multilora` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import MultiloraError
from .version import __version__

if TYPE_CHECKING:
    from .config.engine import EngineConfig
    from .engine.engine import Engine
    from .entrypoints.llm import LLM
    from .lora_request import LoRARequest
    from .outputs import CompletionOutput, RequestOutput
    from .sampling_params import RequestOutputKind, SamplingParams
    from .serving.async_engine import AsyncEngine

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "LoRARequest",
    "MultiloraError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
    "errors",
]

_HOMES = {
    "LLM": ".entrypoints.llm",
    "AsyncEngine": ".serving.async_engine",
    "CompletionOutput": ".outputs",
    "Engine": ".engine.engine",
    "EngineConfig": ".config.engine",
    "LoRARequest": ".lora_request",
    "RequestOutput": ".outputs",
    "RequestOutputKind": ".sampling_params",
    "SamplingParams": ".sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
