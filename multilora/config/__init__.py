"""Settings of the engine and shapes of models."""
