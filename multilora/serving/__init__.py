"""The engine behind asyncio: a thread of its own, and streams."""
