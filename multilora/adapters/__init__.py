"""LoRA adapters: the files at rest, the rank pages in memory, and the store between them."""
