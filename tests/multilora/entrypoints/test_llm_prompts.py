"""Prompts on their way to tokens: who may write control tokens, and what is refused unread."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from multilora.entrypoints.demo import load
from multilora.entrypoints.llm import LLM
from multilora.errors import CapacityError, RequestError
from multilora.lora_request import LoRARequest
from multilora.sampling_params import SamplingParams
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint

TOKENIZER = Path(__file__).resolve().parents[3] / "multilora" / "assets" / "uma" / "base"
GREEDY = SamplingParams(temperature=0, max_tokens=4)
CHAT = [{"role": "user", "content": "May I come in? <|eot_id|>"}]
WRITERS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}<|eot_id|>{% endif %}{% endfor %}"
    "{{ tools|length if tools }} {{ date_string }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the demo's vocabulary, and a template with tools and a variable."""
    root = tmp_path_factory.mktemp("prompts")
    vocab = load_tokenizer(TOKENIZER).vocab_size
    write_checkpoint(root, vocab_size=vocab)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, root)
    (root / "chat_template.jinja").write_text(WRITERS)
    return root


@pytest.fixture(scope="module")
def writer(folder: Path) -> LLM:
    return LLM(folder, max_model_len=256, max_num_seqs=2)


def prompt_of(llm: LLM, **ask: Any) -> str:
    (output,) = llm.chat(CHAT, GREEDY, **ask)
    assert llm.engine.tokenizer is not None
    return llm.engine.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def test_generate_takes_a_rendered_chat_as_vllm_does() -> None:
    """`generate(tokenizer.apply_chat_template(messages, tokenize=False))` answers as `chat`."""
    transformers = pytest.importorskip("transformers")
    llm = load()
    messages = [{"role": "user", "content": "Is the job still open?"}]
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    ask: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    text = oracle.apply_chat_template(messages, **ask)
    assert text.startswith("<|begin_of_text|>")
    (chatted,) = llm.chat(messages, GREEDY)
    (generated,) = llm.generate(text, GREEDY)
    assert generated.prompt_token_ids == chatted.prompt_token_ids
    assert generated.prompt_token_ids == oracle.encode(text, add_special_tokens=False)
    assert generated.outputs[0].token_ids == chatted.outputs[0].token_ids
    (bare,) = llm.generate(text.removeprefix("<|begin_of_text|>"), GREEDY)
    assert bare.prompt_token_ids == chatted.prompt_token_ids


def test_control_tokens_in_prompts_are_text_where_the_caller_is_not_trusted(folder: Path) -> None:
    llm = LLM(folder, max_model_len=256, max_num_seqs=2, split_special_tokens=True)
    reader = llm.engine.tokenizer
    assert reader is not None
    (output,) = llm.generate("<|begin_of_text|>hi<|eot_id|>", GREEDY)
    assert reader.special_ids.intersection(output.prompt_token_ids) == {reader.bos_token_id}
    text = reader.decode(output.prompt_token_ids[1:], skip_special_tokens=False)
    assert text == "<|begin_of_text|>hi<|eot_id|>"


# Arguments of `chat` ------------------------------------------------------------------------------


def test_chat_gives_tools_and_variables_to_the_template(writer: LLM) -> None:
    head = "<|start_header_id|>user<|end_header_id|>May I come in? <|eot_id|>"
    assert prompt_of(writer) == f"{head}<|eot_id|> "
    assert prompt_of(writer, tools=[{"name": "f"}]) == f"{head}<|eot_id|>1 "
    given = {"date_string": "1 May", "unknown": None}
    assert prompt_of(writer, chat_template_kwargs=given) == f"{head}<|eot_id|> 1 May"
    assert prompt_of(writer, add_generation_prompt=False) == f"{head} "
    ask = {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt_of(writer, **ask) == head


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        ({"continue_final_message": True}, "set add_generation_prompt=False"),
        ({"chat_template_kwargs": {"tools": []}}, "give tools as an argument"),
        ({"chat_template_kwargs": {"messages": []}}, "give messages as an argument"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a dict"),
        ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs must be a dict"),
        ({"chat_template_kwargs": {"x": b""}}, "only JSON's types"),
        ({"tools": "f"}, "tools must be a list"),
    ],
)
def test_what_chat_cannot_give_to_a_template_is_refused(
    writer: LLM, ask: dict[str, Any], why: str
) -> None:
    with pytest.raises(RequestError, match=why):
        writer.chat(CHAT, GREEDY, **ask)
    assert not writer.engine.has_work


# Too long -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["😀" * 1_000_000, "a" * 1_000_000, "ab " * 500_000])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    writer: LLM, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader: Any = writer.engine.tokenizer
    monkeypatch.setattr(reader, "_encode_plain", None)
    why = r"tokens or more, and may have 255; shorten the prompt or raise max_model_len"
    with pytest.raises(CapacityError, match=why):
        writer.generate(text, GREEDY)
    with pytest.raises(CapacityError, match=why):
        writer.chat([{"role": "user", "content": text[:1_000_000]}], GREEDY)


def test_no_text_has_fewer_tokens_than_its_bound() -> None:
    reader = load_tokenizer(TOKENIZER)
    for text in ("", "a", " ", "😀" * 99, "the cat sat. " * 50, "<|eot_id|>" * 20, "\n" * 300):
        assert reader.fewest_tokens(text) <= len(reader.encode_with_special(text))
    assert reader.fewest_tokens("😀" * 10_000) > 100


def test_pieces_with_byte_fallback_have_a_bound(tmp_path: Path) -> None:
    """Llama 2's kind of tokenizer.json; without the bytes, unknown text may be one token."""
    for fallback in (True, False):
        model = {
            "type": "BPE", "byte_fallback": fallback, "unk_token": "<unk>", "fuse_unk": True,
            "vocab": {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "▁": 257},
            "merges": [],
        }  # fmt: skip
        steps = [{"type": "Prepend", "prepend": "▁"},
                 {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]  # fmt: skip
        decoder = {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}  # fmt: skip
        raw = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
               "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
               "post_processor": None, "decoder": decoder, "model": model}  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        reader = load_tokenizer(tmp_path)
        tokens = len(reader.encode("é" * 100))
        assert tokens == (201 if fallback else 2)
        assert reader.fewest_tokens("é" * 100) == (-(-200 // 5) if fallback else 0)


@pytest.mark.parametrize(
    "normalizer",
    [{"type": "NFKC"}, {"type": "Replace", "pattern": {"String": "aa"}, "content": ""}],
)
def test_there_is_no_bound_where_text_may_be_normalized_away(
    tmp_path: Path, normalizer: dict[str, Any]
) -> None:
    raw = json.loads((TOKENIZER / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": normalizer}))
    assert load_tokenizer(tmp_path).fewest_tokens("a" * 10_000) == 0


# Adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("chat_template.jinja", "other", True),
        ("chat_template.jinja", WRITERS + "\n", False),
        ("additional_chat_templates/tool_use.jinja", "other", True),
        ("tokenizer_config.json", json.dumps({"chat_template": "other"}), True),
        ("tokenizer_config.json", json.dumps({"chat_template": 7}), False),
        ("tokenizer_config.json", "[" * 100_000, False),
        ("tokenizer_config.json", "{}", False),
    ],
)
def test_an_adapters_own_chat_template_is_spoken_of(
    writer: LLM,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    content: str,
    said: bool,
) -> None:
    write_adapter(tmp_path, TINY, seed=1)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with caplog.at_level(logging.WARNING):
        writer.load_adapter("a", tmp_path)
    writer.unload_adapter("a")
    assert ("has a chat template of its own" in caplog.text) == said
    assert not said or "start with adapter_chat_template='use'" in caplog.text


def test_a_template_for_tools_alone_is_not_that_of_every_chat(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(tmp_path, TINY, seed=1)
    (tmp_path / "chat_template.jinja").write_text(WRITERS)  # the base's
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools }}")
    llm = LLM(folder, max_model_len=256, adapter_chat_template="use")
    with caplog.at_level(logging.WARNING):
        llm.load_adapter("a", tmp_path)
    plain, own = (llm.chat(CHAT, GREEDY, adapter=name)[0].prompt for name in (None, "a"))
    assert own == plain
    assert "has the chat templates tool_use" in caplog.text


OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}own"
HI = [{"role": "user", "content": "hi"}]


def test_an_adapters_own_chat_template_is_used_when_asked(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "plain"):
        write_adapter(tmp_path / name, TINY, seed=len(name))
    (tmp_path / "a" / "chat_template.jinja").write_text(OWN)
    (tmp_path / "b" / "chat_template.jinja").write_text(OWN.replace("own", "b's"))
    llm = LLM(folder, max_model_len=256, adapter_chat_template="use")
    llm.register_adapter("a", tmp_path / "a")  # its template is there before the adapter is
    llm.load_adapter("b", tmp_path / "b")
    llm.load_adapter("plain", tmp_path / "plain")
    params = SamplingParams(max_tokens=1)

    def prompts(*adapters: Any, **options: Any) -> list[str | None]:
        found = llm.chat([HI] * len(adapters), params, adapter=list(adapters), **options)
        return [output.prompt for output in found]

    (base,) = prompts(None)
    assert base not in (None, "<user>hiown")
    specs = "a", "b", "plain", None, {"a": 0.5, "b": 0.5}, {"a": 1.0}
    wanted = ["<user>hiown", "<user>hib's", base, base, base, "<user>hiown"]
    assert prompts(*specs) == wanted
    assert prompts("a", chat_template="given") == ["given"]
    assert llm.generate("hi", params, adapter="a")[0].prompt == "hi"
    llm.load_adapter("a", tmp_path / "plain")  # another adapter of that name
    assert prompts("a") == [base]
    request = LoRARequest("c", 3, str(tmp_path / "b"))
    (found,) = llm.chat(HI, params, lora_request=request)
    assert (found.prompt, found.lora_request) == ("<user>hib's", request)
    assert "chat template" not in caplog.text
