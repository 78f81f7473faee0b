"""Streaming text against decoding everything at once, for any split of any ids."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.tokenization.detokenizer import IncrementalDetokenizer
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.paths import UMA

BASE = UMA / "base"
TEXT = "Straße 👩‍👩‍👧‍👦 你好世界 e\u0301a\u0308 \u200d🏳️‍🌈 <|eot_id|> plain \ufffd end"


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Bytes as tokens in two ways: byte-level (tiktoken) and pieces with byte fallback."""
    sentencepiece = pytest.importorskip("sentencepiece")
    root = tmp_path_factory.mktemp("detokenizer")
    for name in ("tiktoken", "pieces"):
        (root / name).mkdir()
    shutil.copy(BASE / "tokenizer.model", root / "tiktoken")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"the cat {i} sat on the mat" for i in range(200)),
        model_prefix=str(root / "pieces" / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return {name: load_tokenizer(root / name) for name in ("tiktoken", "pieces")}


def decoded_after(reader, prompt, output, skip):
    """What `decode` gives for the output after the prompt."""
    before = reader.decode(prompt, skip_special_tokens=skip)
    whole = reader.decode(prompt + output, skip_special_tokens=skip)
    if whole.startswith(before):
        return whole[len(before) :]
    assert before.endswith("\ufffd")  # the output completed the prompt's last character
    return whole[len(before) - 1 :]


def stream(reader, prompt, output, cuts, skip):
    detokenizer = IncrementalDetokenizer(reader, prompt, skip_special_tokens=skip)
    bounds = sorted({0, len(output), *(min(cut, len(output)) for cut in cuts)})
    pieces = [detokenizer.append(output[a:b]) for a, b in pairwise(bounds)]
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces


@pytest.mark.parametrize("name", ["tiktoken", "pieces"])
def test_any_split_of_any_ids_gives_the_whole_text(readers, name):
    reader = readers[name]
    # Mostly single bytes: broken sequences, and characters of several tokens, are then common.
    first = 0 if name == "tiktoken" else 3
    token = st.one_of(
        st.integers(first, first + 255),
        st.integers(-1, reader.vocab_size),
        st.sampled_from(reader.encode(TEXT)),
    )
    some = st.lists(token, max_size=12)

    @settings(max_examples=300, deadline=None)
    @given(some, st.lists(token, max_size=30), st.lists(st.integers(0, 30)), st.booleans())
    def check(prompt, output, cuts, skip):
        pieces = stream(reader, prompt, output, cuts, skip)
        assert "".join(pieces) == decoded_after(reader, prompt, output, skip)

    check()


@pytest.mark.parametrize("name", ["tiktoken", "pieces"])
def test_valid_text_never_shows_half_a_character(readers, name):
    reader = readers[name]
    text = TEXT.replace("\ufffd", "")
    ids = reader.encode(text)
    pieces = stream(reader, [], ids, range(len(ids)), skip=True)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_character_comes_with_its_last_byte(readers):
    reader = readers["pieces"]
    detokenizer = IncrementalDetokenizer(reader)
    pieces = [detokenizer.append([3 + byte]) for byte in "é好😀".encode()]
    assert pieces == ["", "é", "", "", "好", "", "", "", "😀"]
    assert detokenizer.finish() == ""


def test_space_before_the_first_word_depends_on_the_prompt(readers):
    reader = readers["pieces"]
    the = reader.encode("the", add_special_tokens=False)
    assert IncrementalDetokenizer(reader, [reader.bos_token_id]).append(the) == "the"
    assert IncrementalDetokenizer(reader, [reader.bos_token_id, *the]).append(the) == " the"


def test_output_that_completes_the_prompts_character_brings_it_whole(readers):
    reader = readers["pieces"]
    head, tail = [3 + byte for byte in "好".encode()][:1], [3 + byte for byte in "好".encode()][1:]
    detokenizer = IncrementalDetokenizer(reader, head)
    assert detokenizer.append(tail) == "好"


def test_replacement_character_at_the_end_of_the_prompt_is_not_output(readers):
    reader = readers["tiktoken"]
    detokenizer = IncrementalDetokenizer(reader, reader.encode("bad \ufffd"))
    assert detokenizer.append([]) == ""
    assert detokenizer.append(reader.encode("x", add_special_tokens=False)) == "x"


def test_special_tokens_show_when_asked_for(readers):
    reader = readers["tiktoken"]
    ids = reader.encode_with_special("a<|eot_id|>b")
    shown = IncrementalDetokenizer(reader, skip_special_tokens=False)
    assert shown.append(ids) == "a<|eot_id|>b"
    assert IncrementalDetokenizer(reader).append(ids) == "ab"


@pytest.mark.parametrize("byte", [0x80, 0xE4])
def test_work_for_a_token_does_not_grow_with_broken_text(readers, byte):
    reader, seen = readers["pieces"], []

    class Counting:
        vocab_size, special_ids = reader.vocab_size, reader.special_ids

        def decode(self, ids, *, skip_special_tokens=True):
            seen.append(len(ids))
            return reader.decode(ids, skip_special_tokens=skip_special_tokens)

    detokenizer = IncrementalDetokenizer(Counting(), [3 + byte] * 5000)
    pieces = [detokenizer.append([3 + byte]) for _ in range(1000)]
    assert max(seen) <= 9
    assert "".join(pieces) + detokenizer.finish() == "\ufffd" * 1000
