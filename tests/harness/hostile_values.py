"""Values that no caller should give, spelled as Python: a failure can be read and repeated."""

from __future__ import annotations

import itertools
from collections import UserList
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import strategies as st

from multilora import LoRARequest, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping


class Trap(Exception):
    """What the hostile objects raise: none of ours, and no built-in that anybody catches."""


def _raise(*_: object, **__: object) -> Any:
    raise Trap("sprung")


def _trap(name: str, *bases: type, methods: tuple[str, ...]) -> type:
    return type(name, bases, dict.fromkeys(methods, _raise))


LOOKS = ("__eq__", "__bool__", "__str__", "__repr__", "__len__", "__iter__", "__getitem__")
Raises = _trap("Raises", methods=(*LOOKS, "__hash__", "__format__", "__index__", "__float__"))
RaisesOnShape = _trap("RaisesOnShape", methods=("shape", "item"))
RaisingList = _trap("RaisingList", UserList, methods=LOOKS)
TrappedList = _trap("TrappedList", list, methods=("__len__", "__iter__", "__eq__", "__getitem__"))
RaisingDict = _trap("RaisingDict", dict, methods=(*LOOKS, "get", "keys", "items", "values"))

NAMES: dict[str, Any] = {
    "np": np,
    "torch": torch,
    "Path": Path,
    "count": itertools.count,
    "SamplingParams": SamplingParams,
    "LoRARequest": LoRARequest,
    **{
        made.__name__: made
        for made in (Raises, RaisesOnShape, RaisingList, TrappedList, RaisingDict)
    },
}

ATOMS = (
    *("None", "True", "False", "...", "NotImplemented"),
    *("0", "1", "-1", "7", "2**20", "2**31 - 1", "2**31", "2**40", "2**63", "-2**63 - 1", "10**30"),
    *("10**5000", "-(10**400)"),
    *("0.0", "-0.5", "1.5", "1e308", "float('nan')", "float('inf')", "float('-inf')", "1j"),
    *(
        "''",
        "'x'",
        "'0'",
        "'\\x00'",
        "'\\ud800'",
        "'../..'",
        "'x' * 200_000",
        "' '",
        "'/proc/self/mem'",
    ),
    *("b''", "b'abc'", "bytearray(b'x')", "memoryview(b'x')"),
    *(
        "[]",
        "[[]]",
        "()",
        "{}",
        "set()",
        "{1, 2}",
        "range(3)",
        "range(2**40)",
        "{'a': {}}",
        "{1: 2}",
    ),
    *(
        "[1, 2]",
        "[None]",
        "['x', 1]",
        "[5] * 300",
        "[True]",
        "[10**30]",
        "{'': ''}",
        "{None: None}",
    ),
    *("np.int64(3)", "np.float32('nan')", "np.bool_(True)", "np.str_('x')", "np.array(3)"),
    *("np.array([1, 2])", "np.zeros((2, 2))", "np.array(['a'])", "np.array(None)"),
    *("torch.tensor(3)", "torch.tensor([1, 2])", "torch.tensor(True)", "torch.float32"),
    *(
        "torch.empty(0)",
        "torch.tensor(1.5)",
        "torch.device('cpu')",
        "torch.empty(2, device='meta')",
    ),
    *(
        "Path('.')",
        "Path('/nonexistent')",
        "Path('/dev/zero')",
        "object()",
        "object",
        "int",
        "type",
    ),
    *("print", "len", "lambda: 0", "lambda *a, **k: 0", "lambda a, b: b", "lambda a, b: None"),
    *("(i for i in [1])", "iter([1])", "count()", "Raises()", "RaisesOnShape()"),
    *(
        "RaisingList([1])",
        "TrappedList([1])",
        "[TrappedList()]",
        "{'a': TrappedList()}",
        "RaisingDict(a=1)",
        "Raises",
        "[Raises()]",
        "{'a': Raises()}",
        "(Raises(),)",
    ),
    *("SamplingParams()", "SamplingParams", "LoRARequest('x', 1, '/nonexistent')", "LoRARequest"),
    *("[SamplingParams()]", "[LoRARequest('x', 1, '/nonexistent')]", "[{'role': 'user'}]"),
    *("[{'role': 'user', 'content': 'hi'}]", "[{'role': Raises(), 'content': [None]}]"),
    *(
        "[[{'role': 'user', 'content': 'hi'}]]",
        "{'prompt': Raises()}",
        "{'prompt_token_ids': count()}",
    ),
)
"""Every kind; some of them are right for some argument."""


def made(spelled: str) -> Any:
    """The value that is spelled so, a new one each time."""
    return eval(spelled, dict(NAMES))


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(inner, max_size=3)
    return st.one_of(
        items.map(lambda found: f"[{', '.join(found)}]"),
        items.map(lambda found: f"({''.join(f'{one}, ' for one in found)})"),
        st.tuples(st.sampled_from(["'a'", "'prompt'", "1", "'x' * 200"]), inner).map(
            lambda pair: f"{{{pair[0]}: {pair[1]}}}"
        ),
    )


def spellings() -> st.SearchStrategy[str]:
    """Any of `ATOMS`, and lists, tuples and dicts of them."""
    return st.recursive(st.sampled_from(ATOMS), _nested, max_leaves=4)


def arguments(known: Mapping[str, str]) -> st.SearchStrategy[dict[str, str]]:
    """Right arguments, one or two of which are hostile."""
    names = st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=2, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({name: spellings() for name in chosen})
    ).map(lambda bad: {**known, **bad})
