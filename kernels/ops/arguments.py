"""How a wrapper refuses arguments."""

from __future__ import annotations


def check(condition: bool, text: str) -> None:
    """ValueError with `text` unless the condition holds."""
    if not condition:
        raise ValueError(text)
