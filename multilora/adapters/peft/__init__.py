"""Reads PEFT's adapter folders, and refuses by name what it cannot honour."""
