"""The command line: `multilora generate`, `serve`, `info`, `demo`, `version`, `adapters ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path  # at run time too: typer reads the annotations
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

from ..errors import MultiloraError
from ..version import __version__

with suppress(ImportError):  # main() says what to install
    import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

P = ParamSpec("P")
R = TypeVar("R")
INTERRUPTED, PIPE_CLOSED = 130, 141
"""Exit statuses that shells give to what SIGINT and SIGPIPE end: 128 and the signal's number."""

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
    except KeyboardInterrupt:  # while commands are imported
        raise SystemExit(INTERRUPTED) from None


def _app() -> typer.Typer:
    from .commands.adapters import gc, list_, pull, show
    from .commands.generate import generate
    from .commands.info import info
    from .commands.serve import serve
    from .commands.verify import verify

    app = typer.Typer(
        help="Serves many LoRA adapters from one shared Llama, in one batch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # main() shows the typed ones
    )
    app.callback()(_global)
    for command in (generate, serve, info, demo, version):
        app.command()(_quietly_ended(command))
    adapters = typer.Typer(help="Looks at adapters, and fetches them.", no_args_is_help=True)
    adapters.command()(_quietly_ended(check))
    adapters.command()(_quietly_ended(convert))
    adapters.command()(_quietly_ended(verify))
    adapters.command()(_quietly_ended(pull))
    adapters.command("list")(_quietly_ended(list_))
    adapters.command()(_quietly_ended(show))
    adapters.command()(_quietly_ended(gc))
    adapters.callback()(_adapters)
    app.add_typer(adapters, name="adapters")
    return app


def _quietly_ended(command: Callable[P, R]) -> Callable[P, R]:
    """The command, of whose end by Ctrl-C or a closed pipe the exit status alone tells."""

    @wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> R:
        try:
            result = command(*args, **options)
            sys.stdout.flush()  # the end of Python would be too late for what this may raise
            return result
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:
            with suppress(OSError, ValueError):  # what Python flushes at its end goes nowhere
                stdout = sys.stdout.fileno()
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
            raise SystemExit(PIPE_CLOSED) from None

    return run


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise SystemExit(0)


def _global(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Prints it."),
    ] = False,
) -> None:
    """Serves many LoRA adapters from one shared Llama, in one batch."""


def _adapters() -> None:
    """Looks at adapters, and fetches them."""


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
    max_rows: Annotated[
        int, typer.Option("--max-lora-token-rows", help="Rows of the embedding or head at most.")
    ] = 256,
) -> None:
    """Reads an adapter against its base, as loading does, and says what it holds."""
    from ..adapters.base_weights import changed_rows
    from ..adapters.peft.reader import read_adapter
    from ..checkpoint.reader import read_base_weight, read_config
    from ..config.lora_sites import sites_of

    config = read_config(model)
    found = read_adapter(path, config)
    base = {site: read_base_weight(model, site, config) for site in found.weights}
    rows = changed_rows(path.name, found, base, max_rows)
    of_modules = (
        (module.a, module.b, module.magnitude, module.bias) for module in found.modules.values()
    )
    others = found.biases.values(), found.norms.values(), (r.values for r in rows.values())
    weights = [w for ws in (*of_modules, *others) for w in ws if w is not None]
    ranks = {site: found.rank_at(site) for site in sites_of(config)}
    print(f"digest   {found.digest}")
    print(f"rank     {found.rank}")
    print(f"sites    {', '.join(f'{site} {rank}' for site, rank in ranks.items() if rank)}")
    print(f"modules  {len(found.modules)}")
    if found.norms:
        print(f"norms    {len(found.norms)}")
    for site, changed in sorted(rows.items()):
        print(f"rows     {len(changed.ids)} of {site}")
    print(f"bytes    {sum(w.numel() * w.element_size() for w in weights)}")


def convert(
    path: Annotated[Path, typer.Argument(help="Folder of an adapter of MLX-LM, or with a .bin.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, which must not exist.")],
    scale: Annotated[
        float | None, typer.Option(help="Factor of an MLX-LM adapter, instead of its config's.")
    ] = None,
) -> None:
    """Writes an adapter of another form as the PEFT folder that it means."""
    from ..adapters.conversion import convert as write

    print(f"{path} is {write(path, out, scale=scale)}; written as {out}")


def version() -> None:
    """Prints the version."""
    print(__version__)
