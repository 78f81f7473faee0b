"""Expressions of strangers: what PEFT's `re` and `regex` read alike, and small."""

from __future__ import annotations

import resource
import sys
import time

import pytest

from multilora.adapters.peft.patterns import check_pattern
from multilora.errors import AdapterInvalid

REAL = (
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(?:[0-9]|1[0-5])\.self_attn\..*",
    r"(?!.*lm_head)(?:.*\.)?(?:q|k|v|o)_proj$",
    r"^(?:base_model\.)?model\.layers\.\d+\.(?P<part>mlp|self_attn)\.\w+$",
    r"(?i).*Q_PROJ",
    r".*[qkvo]_proj",
    r"model\.layers\.\d{1,2}\..*",
    "q_proj",
)
HOSTILE = {
    "repeats hidden by comments": "(?x)((x{1 000}){1 000}){1 00}",
    "a flag inside": "(?x:a{1 000})",
    "repeats of repeats": "((x{100}){100}){100}",
    "a repeat of a long group": "(?:" + "(a)" * 325 + "){1000}",
    "recursion": "(?R)",
    "a fuzzy match": "(?b)(?:model){e}",
    "a fuzzy match that re reads as text": "(?:model){e<=3}",
    "a set of regex's own": r"\p{L}+",
    "a set that re warns of": "[[a-z]--[aeiou]]",
    "a POSIX class": "[[:alpha:]]+",
    "a named list": r"\L<words>",
    "nested": "(" * 400 + ")" * 400,
    "no expression": "(",
    "long": "a" * 1001,
    "a repeat of no number": "a{99999999999999999999}",
}


@pytest.mark.parametrize("pattern", REAL)
def test_what_people_write_is_taken(pattern: str) -> None:
    check_pattern("target_modules", pattern)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_could_cost_or_mean_something_else_is_refused(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(AdapterInvalid, match=r"target_modules: .* is refused: .*by name") as error:
        check_pattern("target_modules", HOSTILE[name])
    assert time.thread_time() - start < 1  # it took up to 14 s before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
    assert len(str(error.value)) < 400


def test_nesting_is_refused_however_deep_python_may_go() -> None:
    """torch's compiler raises the limit for good."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        with pytest.raises(AdapterInvalid, match="more than 100 groups"):
            check_pattern("target_modules", HOSTILE["nested"])
    finally:
        sys.setrecursionlimit(before)
