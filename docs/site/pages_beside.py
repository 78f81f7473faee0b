"""Hook of mkdocs: pages that lie beside docs/ are pages of the site, and links to them lead there.

A link to another file of the repository becomes its text: the site has only pages. What a code
block says to our tests beside its language (`python triton`) is not for readers.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
BESIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s]+)\)")
INFO = re.compile(r"^```(\w+) .*$", re.MULTILINE)
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, under project/."""
    for name in BESIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"project/{name}", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads the links of one page to where the site has what they mean."""
    here = page.file.src_uri
    # Where the page lies in the repository.
    source = here.removeprefix("project/") if here.startswith("project/") else f"docs/{here}"

    def led(link: re.Match[str]) -> str:
        path, mark, anchor = link[2].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():
            return link[0]  # mkdocs says so
        if target.startswith("docs/") and target.endswith(".md"):
            found = target.removeprefix("docs/")
        elif target in BESIDE:
            found = f"project/{target}"
        else:
            return link[1]
        return f"[{link[1]}]({posixpath.relpath(found, posixpath.dirname(here))}{mark}{anchor})"

    parts = FENCE.split(markdown)  # every second one is code
    parts[::2] = [LINK.sub(led, part) for part in parts[::2]]
    return "".join(INFO.sub(r"```\1", part) for part in parts)
