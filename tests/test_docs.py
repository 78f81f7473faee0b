"""What the pages show runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

import multilora
from multilora.scheduling.policies import POLICIES
from tests.harness.code_blocks import DOCS, code_blocks
from tests.harness.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDERS = ("", "docs", "bench", "examples/uma")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")


@pytest.fixture
def _no_new_policies() -> Iterator[None]:
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)


@pytest.mark.seconds
@pytest.mark.usefixtures("_no_new_policies")
@pytest.mark.parametrize("name", ["getting-started", "embedding", "adapters"])
def test_a_page_runs_from_top_to_bottom(name: str) -> None:
    page = DOCS / f"{name}.md"
    source = code_blocks(page, "python")
    assert source.count("from multilora import") >= 1
    exec(compile(source, str(page), "exec"), {"__name__": name})


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and mkdocs make them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = CODE.sub("code", FENCED.sub("", page.read_text(encoding="utf-8")))
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r"^ +- ([\w./-]+\.md)$", (DOCS / "site/mkdocs.yml").read_text(), re.MULTILINE)
    inside = {name for name in menu if not name.startswith("project/")}
    assert inside == {page.name for page in DOCS.glob("*.md")}


def test_the_reference_has_every_public_class() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    names = set(multilora.__all__) - {"MultiloraError", "__version__", "errors"}
    assert not {name for name in names if f"::: multilora.{name}\n" not in text}
