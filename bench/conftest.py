"""pytest collects bench_*.py here: what they share is imported by name, as when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
