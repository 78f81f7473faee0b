"""The Llama, its layers and its KV cache."""
