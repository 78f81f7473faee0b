"""Model families by their architecture's name in a checkpoint."""

from __future__ import annotations

from .llama import Llama

MODELS = {"LlamaForCausalLM": Llama}
