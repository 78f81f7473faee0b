"""A Hugging Face hub: which files lie in a commit, and that they are the ones it says."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import pytest

from multilora.adapters.sources.address import Address, parse
from multilora.adapters.sources.hub import Hub
from multilora.adapters.sources.remote import Interrupted, TooLong
from multilora.errors import AdapterInvalid
from tests.harness.adapter_servers import COMMIT, Server, redirect, serving, status

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.adapter_servers import Answer, Handler

constants = pytest.importorskip("huggingface_hub.constants")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def endpoint(server: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(server, monkeypatch)
    server.put_on_hub("me/a", adapter)


def use_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does for a new process."""
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)


def hub(source: str) -> Hub:
    address = parse(source)
    assert isinstance(address, Address)
    return Hub(address)


def fetch(end: Hub, name: str, max_bytes: int = 1 << 20) -> bytes | None:
    file = io.BytesIO()
    is_there = end.fetch(name, file, max_bytes, time.monotonic() + 60)
    return file.getvalue() if is_there else None


def test_the_files_of_a_commit_come_as_they_are(adapter: Path) -> None:
    for source in ("hf://me/a", "hf://me/a@main", f"hf://me/a@{COMMIT}"):
        end = hub(source)
        assert end.version() == COMMIT
        for name in (WEIGHTS, "chat_template.jinja"):
            assert fetch(end, name) == (adapter / name).read_bytes()
        assert fetch(end, "tokenizer_config.json") is None


def test_a_folder_within_it(server: Server, adapter: Path) -> None:
    server.put_on_hub("me/many", adapter.parent)
    end = hub("hf://me/many/a")
    end.version()
    assert fetch(end, WEIGHTS) == (adapter / WEIGHTS).read_bytes()


def test_what_there_is_not_is_said(server: Server) -> None:
    def no(kind: str) -> Answer:
        def answer(handler: Handler) -> None:
            handler.send_response(404)
            handler.send_header("X-Error-Code", kind)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        return answer

    server.answers["/api/models/me/b"] = [no("RepoNotFound")]
    with pytest.raises(AdapterInvalid, match="the hub shows no me/b; if it is private, set HF_TOK"):
        hub("hf://me/b").version()
    server.answers["/api/models/me/a/revision/v9"] = [no("RevisionNotFound")]
    with pytest.raises(AdapterInvalid, match="me/a has no revision 'v9'"):
        hub("hf://me/a@v9").version()


def test_a_hub_that_does_not_answer_may_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/api/models/me/a"] = [lambda handler: handler.server.ended.wait(5)]
    with pytest.raises(Interrupted, match="the hub: "):
        hub("hf://me/a").version()
    with serving() as gone:
        pass
    use_hub(gone, monkeypatch)
    with pytest.raises(Interrupted, match="the hub: "):
        hub("hf://me/a").version()


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_what_is_not_what_the_commit_says_is_not_taken(
    server: Server, adapter: Path, name: str
) -> None:
    end = hub("hf://me/a")
    end.version()
    data = bytearray((adapter / name).read_bytes())
    data[-1] ^= 1
    server.files[f"/me/a/resolve/{COMMIT}/{name}"] = bytes(data)
    with pytest.raises(Interrupted, match="and the commit says"):
        fetch(end, name)
    del server.files[f"/me/a/resolve/{COMMIT}/{name}"]
    with pytest.raises(Interrupted, match=r"lists .* and does not have it"):
        fetch(end, name)
    server.answers[f"/me/a/resolve/{COMMIT}/{name}"] = [status(500)]
    with pytest.raises(Interrupted, match="500"):
        fetch(end, name)
    with pytest.raises(TooLong, match="more than 9"):
        fetch(end, name, 9)


def test_it_leads_on_to_its_own_and_to_https_alone(
    server: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["/store/1"] = (adapter / WEIGHTS).read_bytes()
    server.answers[f"/me/a/resolve/{COMMIT}/{WEIGHTS}"] = [redirect("/store/1")]
    end = hub("hf://me/a")
    end.version()
    assert fetch(end, WEIGHTS) == (adapter / WEIGHTS).read_bytes()
    assert server.tokens[-1] == "Bearer hf_secret"
    with serving() as other:
        server.answers[f"/me/a/resolve/{COMMIT}/{WEIGHTS}"] = [redirect(other.url)]
        with pytest.raises(AdapterInvalid, match="leads on to"):
            fetch(end, WEIGHTS)
        assert other.asked == []
