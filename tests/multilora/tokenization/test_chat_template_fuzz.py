"""Random templates render as in transformers, though their text is traced."""

from __future__ import annotations

import random
import re
import warnings
from typing import Any

import pytest

from multilora.tokenization.template_sandbox import render

TEXTS = (
    "'A B'",
    "'<C>'",
    "'%s'",
    "'{}'",
    "''",
    "'\\n'",
    "'x%d'",
    "7",
    "none",
    "[1,'F']",
    "{'k':'G'}",
)
GIVEN = ("m.content", "m.role", "m.missing", "m.tool", "messages|length", "loop.index")
OPERATORS = ("+", "~", "~", "%", "==", "in", "and", "or", "*")
SUBSCRIPTS = ("[0]", "[-1]", "[1:]", "[::-1]", "[:3]", ".k")
FILTERS = (
    "trim", "upper", "title", "capitalize", "join", "join('+')", "replace('A','zz')", "tojson",
    "replace('','-')", "replace('a',m.role)", "string", "list", "first", "last", "reverse", "e",
    "default('q')", "safe", "indent(2,true)", "center(9)", "truncate(5)", "wordwrap(4)", "pprint",
    "sort|join", "unique|list", "map('upper')|list", "format(m.role,3)", "items|list", "trim('A')",
)  # fmt: skip
METHODS = (
    "split()", "split('a')", "split(None,1)", "rsplit(' ',1)", "strip()", "lstrip('A')", "title()",
    "rstrip('b')", "replace('A','Q',1)", "startswith('A')", "find('a')", "format(m.content)",
    "format(1,2,3)", "splitlines(true)", "partition(' ')", "rpartition('a')", "ljust(9)",
    "join([m.role,m.content])", "join(m.content)", "center(11,'*')", "zfill(9)", "expandtabs(4)",
    "removeprefix('A')", "removesuffix('b')", "swapcase()", "encode()", "translate({65:'y'})",
    "format_map({'a':m.role})", "items()|list", "get('k')",
)  # fmt: skip
STATEMENTS = (
    "{{ @ }}",
    "{% set v = @ %}{{ v }}{{ v|trim }}",
    "{% set v %}x{{ @ }}\n y{% endset %}{{ v|upper }}{{ v }}",
    "{% for c in @ %}{{ c }}{{ loop.index0 }},{% else %}none{% endfor %}",
    "{% macro f(a, b='B') %}<{{ a }}{{ b ~ a }}{{ caller() if caller }}>{% endmacro %}{{ f(@) }}"
    "{% call f(@) %}in{% endcall %}",
    "{% if @ %}T\n{% elif @ %}E{% else %}F{% endif %}\n",
    "{% filter trim %} ab {{ @ }} {% endfilter %}{% filter upper %}ab {{ @ }}{% endfilter %}",
    "{% set ns = namespace(z='') %}{% for i in [1,2] %}{% set ns.z = ns.z ~ @ %}{% endfor %}"
    "{{ ns.z }}",
    "{% generation %}a{{ @ }}{% endgeneration %}",
)
ADDRESS = re.compile(r"0x[0-9a-f]+", re.IGNORECASE)  # of an iterator that is printed
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "aAb b\tA a<C>\n x"},
    {"role": "tool", "content": " ", "tool": {"k": "vA", "l": [1, "a"]}},
    {"role": "assistant", "content": ""},
]


def expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(TEXTS + GIVEN * 2)
    one, two = expression(rng, depth - 1), expression(rng, depth - 1)
    return rng.choice(
        [
            f"({one} {rng.choice(OPERATORS)} {two})",
            f"({one} % ({two}, {one}))",
            f"({rng.choice(GIVEN)}){rng.choice(SUBSCRIPTS)}",
            f"({one})|{rng.choice(FILTERS)}",
            f"({one}).{rng.choice(METHODS)}",
            f"({one} if {two} else {one})",
            f"[{one}, {two}]",
            f"({one} * {rng.randrange(-1, 4)})",
        ]
    )


@pytest.mark.parametrize("seed", range(2))
def test_random_templates_render_as_in_transformers(seed: int) -> None:
    chat_template = pytest.importorskip("transformers.utils.chat_template_utils")
    rng, rendered = random.Random(seed), 0
    warnings.simplefilter("ignore", SyntaxWarning)
    for _ in range(200):
        body = "".join(rng.choices(STATEMENTS, k=2))
        body = re.sub("@", lambda _: expression(rng, 2), body)
        source = "{% for m in messages %}" + body + "{% endfor %}"
        request = {"source": source, "own": {}, "max_chars": 1 << 21}
        made = render(request | {"given": {"messages": CHAT, "tools": None}})
        try:
            (want,), _ = chat_template.render_jinja_template([CHAT], chat_template=source)
        except Exception:
            assert "error" in made, source
            continue
        rendered += 1
        assert "text" in made, (source, made)
        assert ADDRESS.sub("", made["text"]) == ADDRESS.sub("", want), source
    assert rendered > 30
