"""Any template ends within its limits, typed, and the next one renders."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import pytest

from multilora.errors import MultiloraError, RequestError, TokenizerError
from multilora.tokenization import template_process
from multilora.tokenization.chat_template import ChatTemplate
from multilora.tokenization.template_process import PROCESS, TemplateLimitError, TemplateProcess

CHAT = [{"role": "user", "content": "hi"}]
DOUBLED = (
    "{% set ns = namespace(s=['abcdefgh'] * 64) %}"
    "{% for i in range(28) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
)
BOMBS = {
    "printed": DOUBLED + "{{ ns.s }}",
    "compared": DOUBLED + "{% set a = namespace(s=['abcdefgh'] * 64) %}"
    "{% for i in range(28) %}{% set a.s = [a.s, a.s] %}{% endfor %}{{ a.s == ns.s }}",
    "tojson": DOUBLED + "{{ ns.s|tojson }}",
    "pprint": DOUBLED + "{{ ns.s|pprint }}",
    "joined": DOUBLED + "{{ ns.s|join }}",
    "flattened": DOUBLED + "{{ ns.s|map('string')|list|length }}",
    "deep": "{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}"
    "{% endfor %}{{ ns.s }}",
    "division": "{% set ns = namespace(n=7) %}{% for i in range(28) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}{{ ns.n // 3 // 7 }}",
    "power": "{{ 10 ** (10 ** 9) // 3 }}",
    "collected": "{% set ns = namespace(s='abcdefghijklmnop') %}{% for i in range(40) %}"
    "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}{{ ns.s|length }}",
    "translated": "{{ ('a' * 99999).translate({97: 'b' * 99999})|length }}",
    "format width": "{{ '%*d' % (10 ** 9, 1) }}",
    "format field": "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "list": "{{ ([0] * 10 ** 9)|length }}",
    "looped": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "called": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "groups": "{{ range(99999)|batch(1)|map('list')|sort|unique|list|length * 1 }}"
    + "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "written": "{% for i in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}",
    "centered": "{{ 'a'|center(10 ** 10) }}",
    "complaint": "{{ raise_exception('a' * 10 ** 7) }}",
    "nested source": "{{ " + "[" * 10_000 + "]" * 10_000 + " }}",
    "long source": "{% if x %}" * 3_000 + "{% endif %}" * 3_000,
}  # fmt: skip


def template_of(source: str, **limits: Any) -> ChatTemplate:
    return ChatTemplate({"default": source}, origin="the test", variables={}, **limits)


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(60)
def test_any_template_ends_typed_and_the_next_one_renders(name: str) -> None:
    with pytest.raises(MultiloraError, match="the chat template of the test") as caught:
        template_of(BOMBS[name], time_limit=0.3).render(CHAT)
    assert len(str(caught.value)) < 1200
    assert isinstance(caught.value, RequestError if name == "complaint" else TokenizerError)
    assert template_of("{{ messages[0].content }}").render(CHAT).text == "hi"


def test_time_is_the_processors_and_counts_for_each_rendering_anew() -> None:
    template = template_of(
        "{% for i in range(messages[0].n) %}{% for j in range(2000) %}{% endfor %}{% endfor %}ok",
        time_limit=0.4,
    )
    with pytest.raises(TokenizerError, match=r"the test took longer than 0\.4 s"):
        template.render([{**CHAT[0], "n": 99999}])
    for _ in range(100):
        assert template.render([{**CHAT[0], "n": 10}]).text == "ok"


def test_memory_is_the_processs_own() -> None:
    with pytest.raises(TokenizerError, match=r"filled its memory|lack of memory"):
        template_of("{{ ('a' * 10 ** 9)|length }}").render(CHAT)


def test_one_process_serves_all_renderings_and_threads() -> None:
    template_of("x").render(CHAT)
    child = PROCESS._child
    errors: list[BaseException] = []

    def render(i: int) -> None:
        try:
            for n in range(20):
                content = f"{i} {n} " + "y" * 5000 * i
                rendered = template_of("{{ messages[0].content }}").render(
                    [{"role": "user", "content": content}]
                )
                assert rendered.text == content
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=render, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert PROCESS._child is child


def test_a_process_that_was_killed_is_started_again() -> None:
    process = TemplateProcess()
    request = {"source": "x", "own": {}, "given": {"messages": []}, "max_chars": 9}
    try:
        assert process.ask(request, 1)["text"] == "x"
        assert process._child is not None
        os.kill(process._child.pid, signal.SIGKILL)
        process._child.wait()
        assert process.ask(request, 1)["text"] == "x"
    finally:
        process.close()
    assert process.ask(request, 1)["text"] == "x"
    process.close()


def test_a_reply_that_was_not_waited_for_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess()
    request = {"source": "x", "own": {}, "given": {"messages": []}, "max_chars": 9}
    try:
        with monkeypatch.context() as patch:

            def interrupted(*_: Any) -> bytes:
                raise KeyboardInterrupt

            patch.setattr(template_process, "_read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                process.ask(request, 1)
        assert process.ask({**request, "source": "y"}, 1)["text"] == "y"
    finally:
        process.close()


def test_a_fork_starts_a_process_of_its_own() -> None:
    process = TemplateProcess()
    request = {"source": "x", "own": {}, "given": {"messages": []}, "max_chars": 9}
    process.ask(request, 1)
    mine = process._child
    process.forget()  # what the fork does
    try:
        assert process.ask(request, 1)["text"] == "x"
        assert process._child is not mine
        assert mine is not None
        assert mine.poll() is None
    finally:
        process.close()
        process._child = mine
        process.close()


def test_no_reply_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "WAIT", 0.2)
    monkeypatch.setattr(template_process, "PROGRAM", "import time; time.sleep(99)")
    process = TemplateProcess()
    with pytest.raises(TemplateLimitError, match="took longer than 1 s"):
        process.ask({}, 1)
    assert process._child is None


def test_a_python_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "PROGRAM", "import nothing_of_this_name")
    with pytest.raises(TemplateLimitError, match="-I -c 'import jinja2'` must work"):
        TemplateProcess().ask({}, 1)
    monkeypatch.setattr(template_process.sys, "executable", "/no/such/python")
    with pytest.raises(TokenizerError, match=r"/no/such/python.*cannot be started"):
        TemplateProcess().ask({}, 1)


def test_the_process_sees_neither_the_environment_nor_the_project(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "1")
    seen: dict[str, Any] = {}

    def popen(command: list[str], **how: Any) -> Any:
        seen.update(how)
        raise OSError("seen")

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(TokenizerError, match="seen"):
        TemplateProcess().ask({}, 1)
    assert set(seen["env"]) <= {"LD_LIBRARY_PATH", "TZ"}
    assert seen["cwd"] == "/"
