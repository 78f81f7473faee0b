"""The public names, and that importing them is cheap."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import multilora
import multilora.errors
from multilora.errors import MultiloraError

if TYPE_CHECKING:
    from collections.abc import Callable

PUBLIC = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "LoRARequest",
    "MultiloraError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
    "errors",
]


def test_the_public_names_are_exactly_these() -> None:
    assert multilora.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(multilora))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_to_itself_each_time(name: str) -> None:
    value = getattr(multilora, name)
    assert getattr(multilora, name) is value
    assert getattr(value, "__name__", name) in (name, f"multilora.{name}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lora'"):
        multilora.Lora  # noqa: B018 - the look-up is the test


def test_every_error_descends_from_multilora_error() -> None:
    defined = [e for e in vars(multilora.errors).values() if isinstance(e, type)]
    assert len(defined) > 5
    assert all(issubclass(error, MultiloraError) for error in defined)


# Imports the package five times, after torch, and prints the processor seconds of each: the least
# of them is what the import itself costs, whatever else the machine does.
TIMED_IMPORT = """
import json, sys, time, torch
seconds = []
for _ in range(5):
    for name in [n for n in sys.modules if n.partition(".")[0] == "multilora"]:
        del sys.modules[name]
    start = time.process_time()
    import multilora
    seconds.append(time.process_time() - start)
print(json.dumps(seconds))
"""


def test_importing_multilora_adds_less_than_300_ms_to_importing_torch(
    run_python: Callable[..., str],
) -> None:
    seconds = json.loads(run_python(TIMED_IMPORT))
    assert min(seconds) < 0.3, seconds


def test_importing_multilora_loads_nothing_heavy(run_python: Callable[..., str]) -> None:
    loaded = run_python("import sys, multilora; print(*sys.modules)").split()
    heavy = {"torch", "numpy", "huggingface_hub", "transformers", "tokenizers", "typer"}
    assert not heavy & set(loaded)


def test_using_every_public_name_loads_no_hub_client_and_no_command_line(
    run_python: Callable[..., str],
) -> None:
    """`tokenizers` brings huggingface_hub along as a dependency; nothing of ours may import it."""
    loaded = set(
        run_python(
            "import sys, multilora\n"
            "for name in multilora.__all__: getattr(multilora, name)\n"
            "print(*sys.modules)"
        ).split()
    )
    assert "multilora.entrypoints.llm" in loaded
    assert not {"huggingface_hub", "transformers", "peft", "typer", "rich"} & loaded
