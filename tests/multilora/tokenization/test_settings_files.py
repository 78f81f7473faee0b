"""One fact in several files: the order in which they are read is transformers'."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from multilora.errors import TokenizerError
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.tokenizer_folders import BASE

CHATML = "<|im_start|>user\nthe cat<|im_end|>\n"
WORDS = [f"the cat {i} sat on the mat and {i * i} hats" for i in range(300)]


def write(folder: Path, **files: Any) -> Path:
    """JSON files by name."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def oracle_of(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, "special": True, **plain, **flags}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A folder with a byte-level tokenizer.json, and nothing beside it."""
    shutil.copy(BASE / "tokenizer.json", tmp_path)
    return tmp_path


def train(folder: Path, corpus: list[str], size: int = 330, **more: Any) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,  # as in Llama 2
        remove_extra_whitespaces=False,
        minloglevel=2,
        **more,
    )
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), WORDS)


@pytest.fixture
def pieces(trained: Path, tmp_path: Path) -> Path:
    """A folder with a sentencepiece tokenizer.model of 330 pieces, and nothing beside it."""
    shutil.copy(trained / "tokenizer.model", tmp_path)
    return tmp_path


# Added tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["added_tokens", "added_tokens_decoder"])
@pytest.mark.parametrize("special", [True, False])
def test_chatml_beside_a_sentencepiece_model(pieces: Path, where: str, special: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    config: dict[str, Any] = {"eos_token": "<|im_end|>"}
    names = {"<|im_start|>": 330, "<|im_end|>": 331}
    if where == "added_tokens":
        named = {"pad_token": "<|im_end|>", **({"cls_token": "<|im_start|>"} if special else {})}
        write(pieces, added_tokens=names, special_tokens_map=named)
    else:
        config[where] = {str(i): token(name, special=special) for name, i in names.items()}
    write(pieces, tokenizer_config=config)
    reader = load_tokenizer(pieces)
    want = [330, *oracle.encode("user\nthe cat"), 331, *oracle.encode("\n")]
    assert reader.encode_with_special(CHATML) == want
    assert reader.eos_token_ids == (2, 331)
    assert reader.vocab_size == 332
    assert reader.special_ids == ({0, 1, 2, 330, 331} if special else {0, 1, 2, 331})
    assert "<|im_end|>" in reader.decode(want, skip_special_tokens=False)
    assert "<|im_end|>" not in reader.decode(want)


def test_a_declared_token_renames_a_placeholder_of_the_model(pieces: Path) -> None:
    """As fine-tunes do with pieces that were kept free: the id stays, the name is new."""
    write(pieces, tokenizer_config={"added_tokens_decoder": {"329": token("<|im_end|>")}})
    reader = load_tokenizer(pieces)
    assert reader.encode_with_special("<|im_end|>") == [329]
    assert reader.vocab_size == 330


def test_an_end_token_that_is_not_marked_special(hf: Path) -> None:
    """What `add_tokens` and `eos_token=` write: named tokens are special."""
    raw = read(hf, "tokenizer")
    raw["added_tokens"].append({"id": 3072, **token("<|im_end|>", special=False)})
    write(hf, tokenizer=raw, tokenizer_config={"eos_token": "<|im_end|>"})
    reader, oracle = load_tokenizer(hf), oracle_of(hf)
    assert oracle.eos_token_id == 3072
    assert 3072 in reader.eos_token_ids
    ids = reader.encode_with_special("hi<|im_end|>")
    assert ids == oracle.encode("hi<|im_end|>", add_special_tokens=False)
    assert reader.decode(ids) == oracle.decode(ids, skip_special_tokens=True) == "hi"


def test_special_tokens_that_stand_in_the_config_alone(hf: Path) -> None:
    raw = read(hf, "tokenizer")
    added = raw.pop("added_tokens")
    decoder = {str(t.pop("id")): t for t in added}
    write(hf, tokenizer=raw | {"added_tokens": []})
    write(hf, tokenizer_config={"added_tokens_decoder": decoder, "eos_token": "<|eot_id|>"})
    reader, oracle = load_tokenizer(hf), oracle_of(hf)
    text = "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    assert reader.encode_with_special(text) == oracle.encode(text, add_special_tokens=False)
    assert reader.special_ids == load_tokenizer(BASE).special_ids


def test_the_config_tells_flags_that_the_vocabulary_tells_otherwise(hf: Path) -> None:
    raw = read(hf, "tokenizer")
    end = raw["added_tokens"][9]
    assert end["content"] == "<|eot_id|>"
    write(
        hf,
        tokenizer_config={
            "added_tokens_decoder": {str(end["id"]): token("<|eot_id|>", lstrip=True, rstrip=True)}
        },
    )
    text = "a  <|eot_id|> \n b"
    want = oracle_of(hf).encode(text, add_special_tokens=False)
    assert load_tokenizer(hf).encode_with_special(text) == want


def test_a_declared_token_keeps_the_id_that_the_vocabulary_gives_it(hf: Path) -> None:
    write(hf, tokenizer_config={"added_tokens_decoder": {"5": token("<|eot_id|>")}})
    ids = load_tokenizer(hf).encode_with_special("a<|eot_id|>")
    assert ids == oracle_of(hf).encode("a<|eot_id|>", add_special_tokens=False)
    assert 5 not in ids


def test_ordinary_added_words_are_found_in_any_text(hf: Path) -> None:
    """A domain's word that no template writes is a token wherever it stands."""
    raw = read(hf, "tokenizer")
    raw["added_tokens"].append({"id": 3072, **token("hemoglobin", special=False)})
    write(hf, tokenizer=raw)
    text = "the hemoglobin<|eot_id|>"
    want = oracle_of(hf).encode(text, split_special_tokens=True)
    assert 3072 in want
    assert load_tokenizer(hf).encode(text) == want


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"x": token("<a>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {"-1": token("<a>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {str(10**9): token("<a>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": 7}}}},
        {"tokenizer_config": {"added_tokens_decoder": ["<a>"]}},
        {"added_tokens": {"<a>": "7"}},
        {"added_tokens": {"<a>": 10**9}},
        {"added_tokens": {"<a>": -1}},
    ],
)
def test_malformed_added_tokens_are_named(hf: Path, files: dict[str, Any]) -> None:
    write(hf, **files)
    with pytest.raises(TokenizerError, match=r"added_tokens(_decoder|\.json).*correct"):
        load_tokenizer(hf)


# Named tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [None, {}, {"2825": token("<|eot_id|>")}])
def test_the_map_contradicts_the_config(hf: Path, decoder: dict[str, Any] | None) -> None:
    """The map wins, unless the config has `added_tokens_decoder`: then nobody reads the map."""
    config = {"eos_token": "<|reserved_special_token_0|>"}
    more = {} if decoder is None else {"added_tokens_decoder": decoder}
    write(hf, tokenizer_config=config | more, special_tokens_map={"eos_token": "<|eom_id|>"})
    want = oracle_of(hf).eos_token
    assert want == ("<|eom_id|>" if decoder is None else "<|reserved_special_token_0|>")
    reader = load_tokenizer(hf)
    reserved = reader.encode_with_special("<|reserved_special_token_0|>")
    assert (reserved[0] in reader.eos_token_ids) == (decoder is not None)


@pytest.mark.parametrize("bos", ["", None])
def test_an_empty_name_names_none(hf: Path, bos: str | None) -> None:
    template = "{{ bos_token }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {"bos_token": bos, "eos_token": bos, "chat_template": template}
    write(hf, tokenizer_config=config)
    reader, oracle = load_tokenizer(hf), oracle_of(hf)
    chat = [{"role": "user", "content": "hi"}]
    assert reader.bos_token_id is None
    assert reader.render_chat_template(chat) == oracle.apply_chat_template(chat, tokenize=False)
    assert reader.encode("hi") == oracle.encode("hi")


def test_a_sentencepiece_models_bos_is_known_to_its_template(pieces: Path) -> None:
    (pieces / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    reader = load_tokenizer(pieces)
    assert reader.render_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert reader.apply_chat_template([{"role": "user", "content": "hi"}])[0] == 1


# Chat templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("default", ["chat_template", "additional_chat_templates/default", "both"])
def test_additional_chat_templates(hf: Path, default: str) -> None:
    (hf / "additional_chat_templates").mkdir()
    write(hf, tokenizer_config={"chat_template": "from the config"})
    names = ["chat_template", "additional_chat_templates/default"]
    for name in names if default == "both" else [default]:
        (hf / f"{name}.jinja").write_text(f"{name}: {{{{ messages[0].content }}}}")
    (hf / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools|length }} tools")
    reader, oracle = load_tokenizer(hf), oracle_of(hf)
    chat = [{"role": "user", "content": "hi"}]
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        want = oracle.apply_chat_template(chat, tools=tools, tokenize=False)
        assert reader.render_chat_template(chat, tools=tools) == want
        assert (want == "1 tools") == (tools is not None)


def test_additional_chat_templates_without_a_default_are_refused(hf: Path) -> None:
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "rag.jinja").write_text("x")
    with pytest.raises(TokenizerError, match=r"no chat template is named 'default' \(found: rag\)"):
        load_tokenizer(hf)


# Vocabularies -------------------------------------------------------------------------------------


def test_text_has_no_leading_space_where_two_spaces_are_a_piece_before_one(tmp_path: Path) -> None:
    """As in every real Llama 2 or Mistral vocabulary."""
    sentencepiece = pytest.importorskip("sentencepiece")
    train(tmp_path, [f"    the  cat {i * i}    sat  on a mat" for i in range(300)], 290)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    names = [oracle.id_to_piece(i) for i in range(oracle.vocab_size())]
    assert names.index("▁▁") < min(i for i, n in enumerate(names) if n[:1] == "▁" != n[1:2] != "")
    reader = load_tokenizer(tmp_path)
    for text in ("a", "the cat", " a", "  two", "", " "):
        assert reader.decode(reader.encode(text)) == text
        assert reader.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text)) == text


def test_a_tokenizer_of_llama_4_is_refused(tmp_path: Path) -> None:
    """It has 200,000 ranks and cuts words otherwise; its file looks like Llama 3's."""
    ranks = [bytes([i]) for i in range(256)] + [f"{i:06d}".encode() for i in range(128_000 - 255)]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(TokenizerError, match=r"128001 ranks.*Llama 4.*add the model's tokenizer"):
        load_tokenizer(tmp_path)


def test_reserved_names_are_those_since_llama_3_2(tmp_path: Path) -> None:
    shutil.copy(BASE / "tokenizer.model", tmp_path)
    reader = load_tokenizer(tmp_path)
    first = reader.vocab_size - 256  # 128000 in Llama 3
    assert reader.encode_with_special("<|image|>") == [first + 11]
    assert reader.encode_with_special("<|reserved_special_token_2|>") == [first + 12]
    assert reader.decode([first + 255], skip_special_tokens=False) == (
        "<|reserved_special_token_245|>"
    )


def test_user_defined_pieces_in_brackets_are_found_in_prompts_alone(tmp_path: Path) -> None:
    """As in Yi's vocabulary; sentencepiece itself finds them in any text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    names = ["<|im_start|>", "<|im_end|>", "foo"]
    train(tmp_path, WORDS, user_defined_symbols=names)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    reader = load_tokenizer(tmp_path)
    start, end, foo = map(oracle.piece_to_id, names)
    text = "the foo<|im_end|>"
    assert {end, foo} <= set(oracle.encode(text))
    ids = reader.encode(text)
    assert end not in ids
    assert foo in ids
    assert reader.decode(ids) == text
    want = [start, *oracle.encode("the foo"), end]
    assert reader.encode_with_special("<|im_start|>the foo<|im_end|>") == want
    for plain in ("the cat foo", "", "a  b"):
        assert reader.encode(plain) == [1, *oracle.encode(plain)]


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*Git LFS pointer"):
        load_tokenizer(tmp_path)


def test_settings_that_are_nested_too_deep_are_named(hf: Path) -> None:
    (hf / "tokenizer_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is nested too deep"):
        load_tokenizer(hf)


# Prompts that a caller wrote ----------------------------------------------------------------------


def test_a_prompt_gets_bos_once(hf: Path) -> None:
    reader = load_tokenizer(hf)
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    ids = reader.encode_with_special(text, add_special_tokens=True)
    assert ids == reader.encode_with_special(text)
    assert ids.count(reader.bos_token_id) == 1
    bare = text.removeprefix("<|begin_of_text|>")
    assert reader.encode_with_special(bare, add_special_tokens=True) == ids


def test_white_space_before_tokens_that_take_it_costs_linear_time(hf: Path) -> None:
    raw = read(hf, "tokenizer")
    for each in raw["added_tokens"]:
        each |= {"lstrip": True, "rstrip": True}
    write(hf, tokenizer=raw)
    reader = load_tokenizer(hf)
    spaces = " " * 10_000
    ids = reader.encode_with_special(f"a{spaces}<|eot_id|>{spaces}b{spaces}")
    assert reader.decode(ids, skip_special_tokens=False) == f"a<|eot_id|>b{spaces}"
