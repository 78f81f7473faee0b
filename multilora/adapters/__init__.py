"""LoRA adapters: their files, their rank pages, and the store that serves them."""
