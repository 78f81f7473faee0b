"""Where things lie in the checkout, for tests at any depth."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UMA = ROOT / "multilora" / "assets" / "uma"  # the demo's model, adapters and tokenizer
