"""Every error a user can meet. Our own bugs are `assert`, never one of these.

    MultiloraError
    ├── ConfigError            a setting is wrong: unknown name, bad value, impossible combination
    ├── CheckpointError        the base model's files are wrong: missing, extra or misshapen tensor
    ├── TokenizerError         the tokenizer's files or a chat template are wrong
    ├── AdapterError           something about an adapter
    │   ├── AdapterNotFound    no adapter of that name is loaded
    │   ├── AdapterInvalid     its files are malformed, or use a feature that we refuse
    │   ├── AdapterTooLarge    it needs more rank pages, or cache, than the engine was started with
    │   └── AdapterUnavailable its source cannot be reached or read now, and may be later
    ├── RequestError           the request is wrong: a bad parameter, no prompt, an unknown field
    ├── CapacityError          the request is right but could never fit this engine
    ├── EngineBusyError        a call from within a call of the same engine, or in a fork
    ├── EngineFullError        as many requests wait as may; send it again later
    ├── EngineClosedError      it is drained or shut down, and takes nothing more
    └── EngineDeadError        nothing runs any more; make a new engine

The text of an error says what is wrong, which object, and how to cure it.
"""

from __future__ import annotations

import reprlib


class MultiloraError(Exception):
    """Base of all errors that multilora raises for its users."""


class ConfigError(MultiloraError, ValueError):
    """A setting is wrong."""


class CheckpointError(MultiloraError):
    """The base model's files cannot be read as a model."""


class TokenizerError(MultiloraError):
    """The tokenizer's files, or a chat template, cannot be used."""


class AdapterError(MultiloraError):
    """Something about an adapter is wrong."""


class AdapterNotFound(AdapterError, KeyError):
    """No adapter of that name is loaded."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class AdapterInvalid(AdapterError, ValueError):
    """The adapter's files are malformed, or use a feature that multilora refuses."""


class AdapterTooLarge(AdapterError):
    """The adapter needs more rank pages, or cache, than the engine was started with."""


class AdapterUnavailable(AdapterError):
    """The adapter's source cannot be reached or read now, and may be later."""


class RequestError(MultiloraError, ValueError):
    """The request is wrong."""


class CapacityError(MultiloraError):
    """The request could never fit this engine."""


class EngineBusyError(MultiloraError, RuntimeError):
    """The engine was called from within one of its own calls, or in a fork of its process."""


class EngineFullError(MultiloraError, RuntimeError):
    """As many requests wait as may."""


class EngineClosedError(MultiloraError, RuntimeError):
    """The engine is being drained or was shut down."""


class EngineDeadError(MultiloraError, RuntimeError):
    """Nothing runs any more."""


_short = reprlib.Repr()  # looks at no more than it shows
_short.maxstring = _short.maxother = 100


def shown(value: object) -> str:
    """A caller's value for the text of an error: short, whatever it is."""
    try:
        return _short.repr(value)
    except Exception:  # an integer of more digits than Python prints, or a class of the caller's
        return f"a value of type {type(value).__name__} that cannot be printed"
