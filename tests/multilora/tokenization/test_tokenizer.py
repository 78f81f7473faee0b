"""The readers against their oracles: transformers, tiktoken and sentencepiece themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.errors import RequestError, TokenizerError
from multilora.tokenization.hf_tokenizer import HFTokenizer
from multilora.tokenization.sentencepiece_tokenizer import SentencePieceTokenizer
from multilora.tokenization.tiktoken_tokenizer import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIALS,
    MAX_CHUNK,
    MAX_RUN,
    TiktokenTokenizer,
)
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.tokenizer_folders import BASE, copy_files

TEXTS = (
    "",
    " ",
    "Hello world",
    "  two spaces,\n\n\tand tabs \r\n",
    "\0NUL",
    "Grüße 你好 日本 👩‍👩‍👧‍👦 e\u0301",
    "<|eot_id|> <s>[INST]</s> <|begin_of_text|><unk>",
    "12345 don't WE'LL",
)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CORPUS = [f"the cat {i} sat on <the> mat, ein Hund und {i * i} Vögel.\n" for i in range(300)]


EOS = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "special": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per kind of file: hf, tiktoken, sentencepiece, hf_bytes (byte fallback)."""
    root = tmp_path_factory.mktemp("tokenizers")
    copy_files(root / "hf", "tokenizer.json", "tokenizer_config.json")
    copy_files(root / "tiktoken", "tokenizer.model")
    train_sentencepiece(root / "sentencepiece")
    build_byte_fallback(root / "hf_bytes", prepend_scheme="first")
    return root


@pytest.fixture(scope="module")
def readers(folders):
    return {path.name: load_tokenizer(path) for path in sorted(folders.iterdir())}


def train_sentencepiece(folder: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def build_byte_fallback(folder: Path, prepend_scheme: str) -> None:
    """A sentencepiece-like BPE as the converters write it, with TinyLlama's settings."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    folder.mkdir()
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    built = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    built.add_special_tokens([AddedToken(t, normalized=False) for t in pieces[:3]])
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    built.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": EOS, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def oracle_of(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_picks_the_reader_by_content(readers):
    kinds = {name: type(reader) for name, reader in readers.items()}
    assert kinds == {
        "hf": HFTokenizer,
        "hf_bytes": HFTokenizer,
        "tiktoken": TiktokenTokenizer,
        "sentencepiece": SentencePieceTokenizer,
    }


@pytest.mark.parametrize("name", ["hf", "hf_bytes"])
@pytest.mark.parametrize("add", [True, False])
def test_hf_encodes_as_transformers_with_special_tokens_split(folders, readers, name, add):
    oracle = oracle_of(folders / name)
    for text in TEXTS:
        want = oracle.encode(text, add_special_tokens=add, split_special_tokens=True)
        assert readers[name].encode(text, add_special_tokens=add) == want, text


@pytest.mark.parametrize("name", ["hf", "hf_bytes"])
def test_trusted_text_encodes_as_transformers_does(folders, readers, name):
    oracle, reader = oracle_of(folders / name), readers[name]
    bos = reader.decode([reader.bos_token_id], skip_special_tokens=False)
    for text in (*TEXTS, f"{bos}the cat{bos} sat{bos}{bos}\n on the mat"):
        assert reader.encode_with_special(text) == oracle.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["hf", "hf_bytes"])
@pytest.mark.parametrize("skip", [True, False])
def test_hf_decodes_as_transformers(folders, readers, name, skip):
    oracle, reader = oracle_of(folders / name), readers[name]
    for text in TEXTS:
        ids = reader.encode(text) + list(reader.eos_token_ids)
        want = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert reader.decode(ids, skip_special_tokens=skip) == want


def test_tokenizer_json_and_tiktoken_file_of_one_vocabulary_agree(readers):
    for text in TEXTS:
        assert readers["tiktoken"].encode(text) == readers["hf"].encode(text)
        trusted = readers["tiktoken"].encode_with_special(text)
        assert trusted == readers["hf"].encode_with_special(text)


def test_tiktoken_specials_follow_metas_order(readers):
    reader = readers["tiktoken"]
    first = reader.vocab_size - 256
    assert len(LLAMA3_SPECIALS) == len(set(LLAMA3_SPECIALS)) == 256
    assert LLAMA3_SPECIALS[11:13] == ("<|image|>", "<|reserved_special_token_2|>")
    assert LLAMA3_SPECIALS[-1] == "<|reserved_special_token_245|>"
    assert reader.encode_with_special("<|eot_id|><|python_tag|>") == [first + 9, first + 10]
    assert reader.special_ids == set(range(first, first + 256))
    assert reader.bos_token_id == first
    assert reader.eos_token_ids == (first + 1, first + 8, first + 9)


def test_sentencepiece_encodes_as_the_library(folders, readers):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = folders / "sentencepiece" / "tokenizer.model"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    reader = readers["sentencepiece"]
    for text in TEXTS:
        assert reader.encode(text) == [oracle.bos_id(), *oracle.encode(text)]
        assert reader.decode(reader.encode(text)) == oracle.decode(oracle.encode(text))
    assert reader.eos_token_ids == (oracle.eos_id(),)
    assert reader.vocab_size == oracle.vocab_size()


@pytest.mark.parametrize("name", ["hf", "hf_bytes", "tiktoken", "sentencepiece"])
def test_special_tokens_in_user_text_stay_text(readers, name):
    reader = readers[name]
    specials = reader.decode(sorted(reader.special_ids), skip_special_tokens=False)
    ids = reader.encode(specials, add_special_tokens=False)
    assert not reader.special_ids.intersection(ids)
    assert reader.decode(ids) == specials


@pytest.mark.parametrize("name", ["hf", "hf_bytes", "tiktoken", "sentencepiece"])
def test_decoding_undoes_encoding(readers, name):
    reader = readers[name]

    @settings(max_examples=60, deadline=None)
    @given(anything)
    def check(text: str) -> None:
        # sentencepiece writes spaces as U+2581 and cannot tell the two apart afterwards.
        text = text if name in ("hf", "tiktoken") else text.replace("\u2581", "")
        # Metaspace's "first" adds no space before a text that begins with one; decoding takes one.
        text = text.lstrip(" ") if name == "hf_bytes" else text
        assert reader.decode(reader.encode(text)) == text

    check()


@pytest.mark.parametrize("name", ["hf", "hf_bytes", "tiktoken", "sentencepiece"])
def test_lone_surrogates_and_other_types_are_refused(readers, name):
    for encode in (readers[name].encode, readers[name].encode_with_special):
        with pytest.raises(RequestError, match="surrogate at character 2"):
            encode("ab\ud800")
    with pytest.raises(RequestError, match="bytes"):
        readers[name].encode(b"ab")


def test_ids_outside_the_vocabulary_have_no_text(readers):
    for reader in readers.values():
        word = reader.encode("the", add_special_tokens=False)
        assert reader.decode([-1, *word, reader.vocab_size, 10**9]) == "the"


@pytest.mark.parametrize("unit", ["a", " ", "ab ", "😀"])
def test_tiktoken_meets_no_long_run_since_its_time_is_quadratic_in_one(readers, unit, monkeypatch):
    reader, text = readers["tiktoken"], unit * (900_000 // len(unit))
    plain, chunks = reader._encoding, []

    class Spy:
        def encode_ordinary(self, chunk):
            chunks.append(chunk)
            return plain.encode_ordinary(chunk)

    monkeypatch.setattr(reader, "_encoding", Spy())
    assert reader.decode(reader.encode(text)) == text
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= MAX_CHUNK
    runs = (run for chunk in chunks for run in re.findall(r"\s+|\S+", chunk))
    assert max(map(len, runs)) <= MAX_RUN


def test_tiktoken_cuts_only_long_runs(readers):
    reader = readers["tiktoken"]
    plain = reader._encoding
    assert plain._pat_str == LLAMA3_PATTERN
    text = "some words " * 5000 + "x" * 25_000 + " " * 25_000
    assert reader.encode(text, add_special_tokens=False) == plain.encode_ordinary(text)
    long = "x" * 25_001
    cut = plain.encode_ordinary("x" * 25_000) + plain.encode_ordinary("x")
    assert reader.encode(long, add_special_tokens=False) == cut


def test_folder_without_tokenizer_says_what_to_add(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


GOOD_RANKS = (BASE / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tokenizer.json", b"", "cannot be read"),
        ("tokenizer.json", b"{", "cannot be read"),
        ("tokenizer.json", (BASE / "tokenizer.json").read_bytes()[:5000], "cannot be read"),
        ("tokenizer.model", b"", "cannot be read"),
        ("tokenizer.model", b"\x0a\x0e\x0a\x05<unk>", "cannot be read"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("tokenizer.model", b"".join(GOOD_RANKS.splitlines(True)[:100]), "256 single bytes"),
        ("tokenizer.model", GOOD_RANKS[:-4], "gaps|not a base64"),
        ("tokenizer.model", b"IQ== 0\n!!! 1\n", "line 2"),
        ("tokenizer.model", b"IQ== 0\nIg== 5\n", "gaps"),
    ],
)
def test_broken_file_is_named(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=f"{name}.*({why})"):
        load_tokenizer(tmp_path)


def test_truncated_sentencepiece_model_is_named(tmp_path, folders):
    whole = (folders / "sentencepiece" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_too_large_is_not_read(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TokenizerError, match="above the limit of"):
        load_tokenizer(tmp_path)
