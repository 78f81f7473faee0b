"""What the list of models tells."""

from __future__ import annotations

from multilora.server.run import Server

from .conftest import ADAPTERS, NAMES, SETTINGS, Ask


def test_the_list_has_the_base_and_its_adapters(ask: Ask) -> None:
    cards = {card["id"]: card for card in ask("GET", "/v1/models").json()["data"]}
    assert set(cards) == {*NAMES.served_model_name, *ADAPTERS}
    base, adapter = cards["uma"], cards["proposal"]
    assert (base["parent"], base["root"]) == (None, SETTINGS["model"])
    assert (adapter["parent"], base["max_model_len"]) == ("uma", 256)
    assert adapter["root"].endswith("adapters/proposal")
    assert all(card["object"] == "model" for card in cards.values())


def test_one_can_be_asked_for(ask: Ask) -> None:
    assert ask("GET", "/v1/models/feedback").json()["id"] == "feedback"
    found = ask("GET", "/v1/models/team/nobody")
    assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")


def test_openais_client_reads_it(server: Server) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert {"uma", *ADAPTERS} <= {model.id for model in client.models.list()}
        assert client.models.retrieve("feedback").parent == "uma"  # type: ignore[attr-defined]
