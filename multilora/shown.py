"""Values in the texts of errors."""

from __future__ import annotations

import reprlib


class _Short(reprlib.Repr):
    """A short text for any value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to print long ones."""
        return super().repr_int(x, level) if x.bit_length() < 1000 else "a very long integer"


shown = _Short().repr
"""A value for an error's text: short, however large it is, whatever it is."""
