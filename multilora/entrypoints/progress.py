"""The progress bar of `LLM`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from ..arguments import flag, read
from ..outputs import RequestOutput


class Progress:
    """A tqdm bar of finished requests with output tokens per second, or nothing."""

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any]) -> None:
        """`use_tqdm` may be what makes the bar, called as `tqdm` is."""
        self._bar: Any = None
        self._tokens = 0
        self._start = time.perf_counter()
        own = None if callable(use_tqdm) else flag(use_tqdm, "use_tqdm")
        make = _tqdm() if own else use_tqdm if own is None else None
        if make is not None:
            ask = {"total": total, "desc": "Answered", "unit": "prompt", "dynamic_ncols": True}
            self._bar = read(lambda made: made(**ask), make, "use_tqdm")

    def update(self, output: RequestOutput) -> None:
        """Counts a finished request and its tokens."""
        if self._bar is None:
            return
        self._tokens += sum(len(o.token_ids) for o in output.outputs)
        rate = self._tokens / (time.perf_counter() - self._start)
        read(lambda bar: _advance(bar, rate), self._bar, "use_tqdm")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            read(lambda bar: bar.close(), self._bar, "use_tqdm")


def _advance(bar: Any, rate: float) -> None:
    bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
    bar.update(1)


def _tqdm() -> Callable[..., Any] | None:
    """The bar for where we are: a terminal, a notebook, or neither."""
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:  # the bar is part of the extra `cli`
        return None
    made: Callable[..., Any] = tqdm
    return made
