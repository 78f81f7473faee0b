"""Whether Triton is the pinned one: what code it writes, to the register, is that version's."""

from __future__ import annotations

import re

import triton

from tests.harness.paths import ROOT

PINS = re.findall(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
IS_PINNED = triton.__version__ in PINS

FEW_SPILLS = 0 if IS_PINNED else 8
"""Spilled registers that code may have: of 3.6.0 three variants of hundreds have 2 to 6."""
