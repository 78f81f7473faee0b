"""The demo: what it prints on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from multilora.entrypoints import demo
from tests.harness.command_line import run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("rich")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module", autouse=True)
def _short_measurement() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "MEASURED_TOKENS", 4)
        patch.setattr(demo, "MEASURED_ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def plain() -> str:
    out = io.StringIO()
    demo.show(out, plain=True)
    return out.getvalue()


@pytest.mark.seconds
@pytest.mark.parametrize("expert", demo.EXPERTS)
def test_the_demo_prints_each_experts_expected_answer(plain: str, expert: str) -> None:
    expected = demo.load_scene(1).answers[expert]
    assert f"== {expert} ==\n{expected}\n" in plain


@pytest.mark.seconds
def test_the_demo_ends_with_what_happened(plain: str) -> None:
    end = plain[plain.index("What happened") :]
    assert "tokens/s over 4 experts" in end
    assert "job-analysis 8" in end
    assert "4 merged models: 45" in end  # four times 11.26 MiB


@pytest.mark.seconds
def test_the_analysis_is_json(plain: str) -> None:
    body = plain.partition("== job-analysis ==\n")[2].partition("\n\n==")[0]
    found: dict[str, Any] = json.loads(body.partition("\n\nWhat happened")[0])
    assert found["client"] == "Cedar Toys"


@pytest.mark.seconds
def test_the_demo_draws_four_panels_on_a_terminal() -> None:
    out = Terminal()
    demo.show(out, scene=2, max_tokens=5)
    drawn = out.getvalue()
    assert all(expert in drawn for expert in demo.EXPERTS)
    assert "╭" in drawn
    assert "What happened" in drawn


def test_there_are_only_so_many_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "demo", "--scene", "99")
    assert code == 1
    assert "no scene 99" in err
