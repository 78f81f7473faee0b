"""Jinja's immutable sandbox with what it lacks: a clock and a limit on the size of values.

Loops, calls, filters and operators of a template look at the clock, so no thread or signal is
needed and rendering works in any thread. What may grow a value faster than its inputs (`*`, `**`,
`%`, paddings, `replace`, `join`) is refused before it is computed; other results are measured
after. Imported only when a template is first rendered, so that `import multilora` stays light.
"""

from __future__ import annotations

import json
import re
import threading
import time
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, Undefined, UndefinedError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jinja2.runtime import Context

# A field width that could fill the memory: five digits, or one that an argument gives.
WIDE_FORMAT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\*|\d{5,})|\{[^{}]*:[^{}]*(?:\{|\d{5,})")
WIDENING = (  # they make as much as a number says
    *("batch", "center", "expandtabs", "indent", "ljust"),
    *("range", "rjust", "slice", "tojson", "zfill"),
)
MAX_POWER = 64  # largest exponent; chat templates do not compute


class LimitError(TemplateError):
    """The template took too long or made too large a value."""


class RefusedError(TemplateError):
    """The template called `raise_exception`: it does not accept these messages."""


def compile_template(
    source: str, *, origin: str, time_limit: float, max_chars: int
) -> Callable[..., str]:
    """A function from template variables to text.

    It raises RequestError when the template refuses its input and TokenizerError for everything
    else: a template that breaks off, runs longer than `time_limit` seconds, makes a text of more
    than `max_chars` characters, or reaches for what the sandbox forbids.
    """
    environment = MeteredEnvironment(time_limit, max_chars)
    try:
        template = environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise TokenizerError(f"the chat template of {origin} does not compile: {error}") from error

    def render(**variables: Any) -> str:
        environment.start_clock()
        pieces, size = [], 0
        try:
            for piece in template.generate(**variables):
                environment.check_clock()
                size += len(piece)
                environment.check_size(size)
                pieces.append(piece)
        except RefusedError as error:
            raise RequestError(f"the chat template of {origin} refuses: {error}") from error
        except UndefinedError as error:
            raise RequestError(
                f"the chat template of {origin} misses something in the messages or tools: {error}"
            ) from error
        # Whatever a template does wrong, Python's own errors included, is the template's fault.
        except Exception as error:
            what = str(error) or type(error).__name__
            raise TokenizerError(f"the chat template of {origin} failed: {what}") from error
        return "".join(pieces)

    return render


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox whose loops, calls, filters and operators are metered."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, time_limit: float, max_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self._time_limit = time_limit
        self._max_chars = max_chars
        self._clock = threading.local()  # one environment renders in several threads at once
        self.filters["tojson"] = _tojson
        self.filters = {name: self._metered(name, f) for name, f in self.filters.items()}
        self.filters["_each"] = self._each
        self.filters["_sized"] = self._sized
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals.pop("lipsum", None)

    def start_clock(self) -> None:
        """Gives the calling thread its processor time for one rendering.

        Not wall-clock time: a busy machine is no fault of the template.
        """
        self._clock.end = time.thread_time() + self._time_limit

    def check_clock(self) -> None:
        """Raises LimitError when the time is over."""
        if time.thread_time() > getattr(self._clock, "end", float("inf")):
            raise LimitError(f"it took longer than {self._time_limit:g} s")

    def check_size(self, size: int) -> None:
        """Raises LimitError for a value of `size` characters, items or spaces that is too large."""
        if size > self._max_chars:
            raise LimitError(f"it made a value of more than {self._max_chars} characters or items")

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuses at once; Jinja would print nothing and fail only at the next step."""
        raise SecurityError(f"access to attribute {attribute!r} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's guarded `str.format`, refused for fields that could fill the memory."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            self._check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, refused when the result could be too large."""
        self.check_clock()
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    self.check_size(len(value) * times)
        if operator == "**" and isinstance(right, (int, float)) and abs(right) > MAX_POWER:
            raise LimitError(f"it raised a number to a power of more than {MAX_POWER}")
        if operator == "%" and isinstance(left, str):
            self._check_format(left)
        return self._sized(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls `obj` for the template after looking at the clock and at the arguments."""
        name, owner = getattr(obj, "__name__", ""), getattr(obj, "__self__", None)
        self._check_arguments(name, owner, (*args, *kwargs.values()))
        return self._sized(super().call(context, obj, *args, **kwargs))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compiles the template with its loops and concatenations metered."""
        for loop in list(source.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_each")
        for concat in list(source.find_all(nodes.Concat)):
            concat.nodes = [_filtered(nodes.Concat(concat.nodes, lineno=concat.lineno), "_sized")]
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Some filters are first given the context or the environment: look at all but these.
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)  # keeps the mark by which Jinja knows what to pass
        def metered(*args: Any, **kwargs: Any) -> Any:
            value, *others = args[first:] or (None,)
            self._check_arguments(name, value, (*others, *kwargs.values()))
            return self._sized(function(*args, **kwargs))

        return metered

    def _check_arguments(self, name: str, value: Any, args: tuple[Any, ...]) -> None:
        """Looks at the clock and refuses calls whose result could dwarf what they are given."""
        self.check_clock()
        if name in WIDENING:
            for arg in args:
                if isinstance(arg, int):
                    self.check_size(abs(arg))
        if name == "format" and isinstance(value, str):
            self._check_format(value)
        elif name in ("replace", "join", "indent", "expandtabs"):
            self.check_size(_largest_result(name, value, args))

    def _check_format(self, text: str) -> None:
        if WIDE_FORMAT.search(text):
            raise LimitError("it formats with a width of its own making or of more than 4 digits")

    def _sized(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple, dict)):
            self.check_size(len(value))
        return value

    def _each(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.check_clock()
            yield item


def _largest_result(name: str, value: Any, args: tuple[Any, ...]) -> int:
    """Characters that `value.name(*args)`, or the filter, may return; 0 = no growth."""
    if name == "join":
        parts = [part for part in (value, *args) if isinstance(part, (str, list, tuple))]
        items = sum(
            len(i) for p in parts if not isinstance(p, str) for i in p if isinstance(i, str)
        )
        lengths = [len(part) for part in parts]
        return items + (lengths[0] * lengths[1] if len(lengths) > 1 else 0)
    if not isinstance(value, str):
        return 0
    if name == "replace":
        texts = [arg for arg in args if isinstance(arg, str)]
        return len(value) + value.count(texts[0]) * len(texts[1]) if len(texts) == 2 else 0
    spread = value.count("\n" if name == "indent" else "\t") + 1
    widths = [len(arg) if isinstance(arg, str) else abs(arg) for arg in args if arg is not None]
    return len(value) + spread * max(widths, default=8)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


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
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
