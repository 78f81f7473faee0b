"""The command line: `multilora generate`, `demo`, `adapters check`, `version`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path  # at run time too: typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import MultiloraError, RequestError
from ..version import __version__

with suppress(ImportError):  # main() says what to install
    import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..adapters.mix import AdapterSpec
    from ..sampling_params import SamplingParams
    from .llm import LLM

SPINS = "3000"
"""How often a waiting thread of libgomp looks for work before it sleeps; its default is 300,000.

Decoding 32 tokens for four rows of the demo's base on two cores took 0.08 s with this and 0.06 to
0.10 s by default when idle, but 0.3 to 0.4 s against 0.5 to 5.4 s beside two busy processes.
"""

MISSING = "the command line needs {}: pip install 'multilora[cli]'"


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; a mistake of the user is one line on stderr and exit status 1."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(MISSING.format(" and ".join(missing)), file=sys.stderr)
        raise SystemExit(1)
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch loads libgomp, which is yet to come
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        _app()(args=None if args is None else list(args), prog_name="multilora")
    except MultiloraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _app() -> typer.Typer:
    app = typer.Typer(
        help="Serves many LoRA adapters from one shared Llama, in one batch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # main() shows the typed ones
    )
    app.command()(generate)
    app.command()(demo)
    app.command()(version)
    adapters = typer.Typer(help="Looks at adapters.", no_args_is_help=True)
    adapters.command()(check)
    adapters.callback()(_adapters)
    app.add_typer(adapters, name="adapters")
    return app


def _adapters() -> None:
    """Looks at adapters."""


def generate(
    model: Annotated[str, typer.Argument(help="Folder of the base checkpoint.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt; repeat for more.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="name=folder to load; repeat for more.")
    ] = None,
    use: Annotated[
        list[str] | None,
        typer.Option(help="Adapter to answer with; name=weight, repeated, mixes several."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus to sample from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    chat: Annotated[bool, typer.Option(help="Prompts are user messages.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="int8 or int4, of the base when it is loaded.")
    ] = None,
    quantization_group_size: Annotated[
        int | None, typer.Option(help="Input columns that share a scale: 32, 64 or 128.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, int8 (CPU), fp8 (GPU).")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "cpu",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
) -> None:
    """Answers prompts; a single answer is streamed."""
    from ..sampling_params import SamplingParams
    from .llm import LLM

    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    spec = _parse_use(use or [])
    llm = LLM(
        model,
        adapters=_parse_adapters(adapter or []),
        dtype=dtype,
        device=device,
        load_format=load_format,
        quantization=quantization,
        quantization_group_size=quantization_group_size,
        kv_cache_dtype=kv_cache_dtype,
    )
    prompts: list[Any] = [_encode(llm, one) for one in prompt] if chat else list(prompt)
    if len(prompts) == 1:
        _stream(llm, prompts[0], params, spec)
        return
    for text, output in zip(prompt, llm.generate(prompts, params, adapter=spec), strict=True):
        print(f"== {text} ==\n{output.outputs[0].text}\n")


def demo(
    plain: Annotated[bool, typer.Option("--plain", help="Text without panels.")] = False,
    scene: Annotated[int, typer.Option(help="Which job post, from 1.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="New tokens of each expert at most.")] = 220,
) -> None:
    """Shows four experts at work in one batch on one small model."""
    from .demo import show

    show(sys.stdout, scene=scene, max_tokens=max_tokens, plain=plain)


def check(
    path: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    model: Annotated[Path, typer.Option(help="Folder of the base checkpoint.")],
) -> None:
    """Reads an adapter against its base and says what it holds."""
    from ..adapters.peft.reader import read_adapter
    from ..checkpoint.reader import read_config
    from ..config.lora_sites import sites_of

    config = read_config(model)
    found = read_adapter(path, config)
    weights = [w for module in found.modules.values() for w in (module.a, module.b)]
    ranks = {site: found.rank_at(site) for site in sites_of(config)}
    print(f"digest   {found.digest}")
    print(f"rank     {found.rank}")
    print(f"sites    {', '.join(f'{site} {rank}' for site, rank in ranks.items() if rank)}")
    print(f"modules  {len(found.modules)}")
    print(f"bytes    {sum(w.numel() * w.element_size() for w in weights)}")


def version() -> None:
    """Prints the version."""
    print(__version__)


def _stream(llm: LLM, prompt: Any, params: SamplingParams, spec: AdapterSpec) -> None:
    request_id = llm.engine.add_request(prompt, params, adapter=spec)
    shown = 0
    try:
        while llm.engine.has_work:
            for output in llm.engine.step():
                text = output.outputs[0].text
                print(text[shown:], end="", flush=True)
                shown = len(text)
    finally:
        llm.engine.abort(request_id)  # does nothing to a finished one
    print()


def _encode(llm: LLM, prompt: str) -> list[int]:
    assert llm.engine.tokenizer is not None  # skip_tokenizer_init is not offered here
    return llm.engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])


def _parse_adapters(pairs: Sequence[str]) -> dict[str, str]:
    """name -> folder, from "name=folder"."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder:
            raise RequestError(f"--adapter must be name=folder, not {pair!r}")
        if name in found:
            raise RequestError(f"--adapter gives {name!r} twice; use two names")
        found[name] = folder
    return found


def _parse_use(pairs: Sequence[str]) -> str | Mapping[str, float] | None:
    """A name, a mix from "name=weight" (weight 1 if absent), or the base."""
    if not pairs:
        return None
    if len(pairs) == 1 and "=" not in pairs[0]:
        return pairs[0]
    mix: dict[str, float] = {}
    for pair in pairs:
        name, equals, weight = pair.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            raise RequestError(f"--use must be name or name=weight, not {pair!r}") from None
        if name in mix:
            raise RequestError(f"--use gives {name!r} twice; add the weights")
        mix[name] = value
    return mix
