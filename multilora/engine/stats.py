"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made; those of adapters are of registered ones."""

    steps: int
    prompt_tokens: int  # computed, so without those taken from the prefix cache
    generated_tokens: int
    preemptions: int
    running: int
    waiting: int
    late_compilations: int  # kernel variants that requests waited for; there should be none
    adapter_hits: int  # registered adapters that were loaded when a request named them
    adapter_misses: int  # those that it had to wait for
    adapter_loads: int  # of registered adapters, on demand
    adapter_load_failures: int
    adapter_evictions: int  # from host memory, to stay within its bound
