"""Serves many LoRA adapters from one shared Llama, in one batch.

The names below are loaded when they are first used, so that `import multilora` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import MultiloraError

if TYPE_CHECKING:
    from .config import EngineConfig
    from .engine import Engine
    from .llm import LLM
    from .request import CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "MultiloraError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
]

_HOMES = {
    "LLM": ".llm",
    "CompletionOutput": ".request",
    "Engine": ".engine",
    "EngineConfig": ".config",
    "RequestOutput": ".request",
    "SamplingParams": ".request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
