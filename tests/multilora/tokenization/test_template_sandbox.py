"""Hostile templates: ended within the limits, kept from Python."""

from __future__ import annotations

import threading

import pytest

from multilora.errors import RequestError, TokenizerError
from multilora.tokenization.chat_template import ChatTemplate

CHAT = [{"role": "user", "content": "hi"}]


def render(template, messages, **ask):
    return template.render(messages, **ask).text


def template_of(source: str, **limits: float) -> ChatTemplate:
    return ChatTemplate({"default": source}, origin="the test", variables={}, **limits)


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}y{% endfor %}"
        "{% endfor %}{% endset %}",
        "{{ 'a' * 10**8 }}",
        "{{ ([0] * 10**8)|length }}",
        "{{ range(10**12)|list }}",
        "{{ 10**(10**10) }}",
        "{{ 'a'.ljust(10**9) }}{{ 'a'|center(width=10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%0999999999d'|format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**9) }}",
        "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).join(['b'] * 9999) }}",
        "{{ ('\\n' * 9999)|indent('b' * 9999, blank=true) }}",
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}",
        "{% for i in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=99999) }}",
    ],
)
def test_bomb_ends_within_the_limits(bomb):
    template = template_of(bomb, time_limit=0.3)
    with pytest.raises((TokenizerError, RequestError)) as caught:
        render(template, CHAT)
    assert "lipsum" in bomb or isinstance(caught.value, TokenizerError)


def test_limits_hold_in_other_threads_and_for_each_rendering_anew():
    template = template_of(
        "{% for m in messages %}{% if m.content == 'loop' %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}fine",
        time_limit=0.3,
    )
    errors = []

    def loop():
        try:
            render(template, [{"role": "user", "content": "loop"}])
        except TokenizerError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert all("longer than 0.3 s" in error for error in errors)
    assert render(template, CHAT) == "fine"


def test_large_numbers_in_messages_are_no_bomb():
    template = template_of(
        "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(messages[0].n)|default(9**9) }}"
    )
    assert render(template, [{"role": "user", "content": "", "n": 10**12}]) == str(10**12)


@pytest.mark.parametrize(
    "payload",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ strftime_now.__closure__ }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_injection_is_blocked(payload):
    with pytest.raises(TokenizerError, match="the test"):
        render(template_of(payload), CHAT)
