"""An adapter as vLLM's users name it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .arguments import flag, is_int, plain
from .errors import RequestError, shown


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A name, a number and a folder, as in vLLM. Here an adapter's identity is its content.

    `LLM.generate` loads the folder under the name if the name is not loaded from it yet. The number
    is kept and never looked at: two requests of one number may be two adapters.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False  # read the folder again though the name is loaded

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise RequestError(f"lora_name must be a name, not {shown(self.lora_name)}")
        if not isinstance(self.lora_path, str | Path) or not str(self.lora_path):
            raise RequestError(
                f"lora_path must be an adapter's folder, not {shown(self.lora_path)}"
            )
        if not is_int(plain(self.lora_int_id)):
            raise RequestError(f"lora_int_id must be an integer, not {shown(self.lora_int_id)}")
        object.__setattr__(self, "lora_path", str(self.lora_path))
        object.__setattr__(self, "load_inplace", flag(self.load_inplace, "load_inplace"))

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora_name

    @property
    def path(self) -> str:
        """The adapter's folder."""
        return self.lora_path
