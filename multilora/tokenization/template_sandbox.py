"""Renders chat templates in Jinja's immutable sandbox; the program of the template's own process.

A template is a program: it can loop, or fill the memory, in ways that no list of forbidden
functions names. So it runs in a process of its own, under the limits of the operating system, and
`template_process` speaks with it: each message is its length in 8 bytes and JSON.

Imports nothing but jinja2, `traced_text` and the standard library.
"""

from __future__ import annotations

import json
import resource
import signal
from datetime import datetime
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

from jinja2 import (
    Template,
    TemplateError,
    Undefined,
    UndefinedError,
    nodes,
    pass_context,
    pass_eval_context,
)
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from .traced_text import (
    TracedText,
    formatted,
    joined,
    objects,
    said,
    said_json,
    template_runs,
    written,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2.parser import Parser

# Words of the protocol, not of the messages: a template may build a control token around them.
ROLES = frozenset(["assistant", "developer", "function", "ipython", "system", "tool", "user"])
MAX_ERROR = 1000  # characters of a template's complaint


class RefusedError(TemplateError):
    """The template called `raise_exception`: it does not accept these messages."""


class LimitError(Exception):
    """The template made too large a text."""


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_eval_context
def _join(eval_ctx: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    separator = d if isinstance(d, TracedText) else TracedText(d)
    return str(do_join(eval_ctx, value, separator, attribute))


def _raise_exception(message: str) -> None:
    raise RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as the templates expect


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the model saw it in training: not escaped for HTML, as Jinja's own filter would."""
    return json.dumps(
        objects(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Trace(NodeTransformer):
    """Marks every text of a template as its own, and concatenates so that the marks stay."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return _filtered(node, "_written") if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return _filtered(nodes.Const(node.data, lineno=node.lineno), "_written")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")


class _Generation(Extension):
    """`{% generation %}`: trainers mark answers with it; here it is what is inside."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TracingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with what chat templates expect, and text that knows who wrote it."""

    concat = staticmethod(lambda parts: joined("", parts))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self.filters["_written"] = pass_context(lambda _, text: written(text))
        self.filters["_joined"] = lambda parts: joined("", map(str, parts))
        self.filters["join"] = _join
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuses at once; Jinja would print nothing and fail only at the next step."""
        raise SecurityError(f"access to attribute {attribute!r} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's guarded `str.format`, for traced text."""
        wrapped = super().wrap_str_format(value)
        text = getattr(value, "__self__", None)
        if wrapped is None or not isinstance(text, TracedText) or value.__name__ != "format":
            return wrapped
        formatter = SandboxedFormatter(self)
        return lambda *args, **kwargs: formatted(formatter, text, args, kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compiles the template with its text marked."""
        source = _Trace().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)


ENVIRONMENT = TracingEnvironment()


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    return ENVIRONMENT.from_string(source)


def render(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to {source, own, given, max_chars}: {text, runs}, or {error, what}.

    `own` are variables that count as the template's text. `runs` are where its text begins and
    ends, by turns.
    """
    try:
        template = _compiled(request["source"])
    except Exception as error:
        return _failed("compile", error)
    variables = {name: written(text) for name, text in request["own"].items()}
    try:
        pieces, size = [], 0
        for piece in template.generate(**{**variables, **_said_chat(request["given"])}):
            size += len(piece)
            if size > request["max_chars"]:
                raise LimitError(f"it wrote more than {request['max_chars']} characters")
            pieces.append(piece)
        text = joined("", pieces)
    except RefusedError as error:
        return _failed("refused", error)
    except UndefinedError as error:
        return _failed("undefined", error)
    # Whatever a template does wrong, Python's own errors included, is the template's fault.
    except Exception as error:
        return _failed("failed", error)
    return {"text": text, "runs": template_runs(text)}


def _said_chat(given: dict[str, Any]) -> dict[str, Any]:
    """The variables of a request: their text is not the template's, but for the roles' names."""
    made: dict[str, Any] = said(given)
    for message in made["messages"]:
        if message["role"] in ROLES:
            message["role"] = written(message["role"])
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function["arguments"] = said_json(function["arguments"])
    return made


def _failed(kind: str, error: BaseException) -> dict[str, Any]:
    what = str(error)[:MAX_ERROR] or type(error).__name__
    return {"error": kind, "what": "it filled its memory" if type(error) is MemoryError else what}


def serve(memory: int, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers requests until they end, with as many bytes of memory.

    A request that takes more `seconds` of the processor's time ends the process by SIGPROF.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    while size := int.from_bytes(requests.read(8), "little"):
        try:
            request = json.loads(requests.read(size))
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            reply = json.dumps(render(request)).encode()
        except MemoryError as error:
            reply = json.dumps(_failed("failed", error)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()
