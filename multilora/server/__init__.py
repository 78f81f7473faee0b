"""The OpenAI-compatible HTTP server over `AsyncEngine`."""
