"""Train the Uma tokenizer and write it twice: tokenizer.json (HF) and tokenizer.model (Meta).

Both files hold the same byte-level BPE with Llama 3's pre-tokenisation, 256 special tokens after
the ranks in the order of Meta's Llama 3.1 code, and must encode every text to the same ids.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken
from base_docs import make_document
from corpus import EXPERTS, answer, make_review_scene, make_scene, prompt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE_DIR = Path(__file__).resolve().parents[2] / "multilora" / "assets" / "uma" / "base"
RANKS = 2816
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
SPECIALS += [f"<|reserved_special_token_{i + 2}|>" for i in range(256 - len(SPECIALS))]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def training_texts(seed: int = 7, count: int = 6000) -> Iterator[str]:
    """Texts of every kind, from the training side of the world only."""
    rng = random.Random(seed)
    for _ in range(count):
        for text, _weight, _role in make_document(rng):
            yield text
        expert = rng.choice(EXPERTS)
        scene = make_review_scene(rng) if expert == "profile-review" else make_scene(rng)
        yield prompt(expert, scene)
        yield answer(expert, scene)
        yield "\n".join(str(rng.randrange(1, 1000)) for _ in range(8))


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, in the order Llama 3 ranks the bytes."""
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {code: chr(code) for code in codes}
    for code in range(256):
        if code not in letters:
            letters[code] = chr(256 + len(letters) - len(codes))
    return letters


def learn_ranks() -> list[bytes]:
    """The byte strings of the vocabulary in the order of their ranks."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=RANKS, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(training_texts(), trainer)
    letters = byte_letters()
    codes = {letter: code for code, letter in letters.items()}
    merged = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    words = [bytes(codes[c] for c in word) for word, _ in merged if len(word) > 1]
    return [bytes([code]) for code in letters] + words


def splitter() -> pre_tokenizers.PreTokenizer:
    """Llama 3's pre-tokeniser: the regex, then bytes as letters."""
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


def build_hf(ranks: list[bytes]) -> Tokenizer:
    """The HF tokenizer with the merges that these ranks imply (as for Llama 3 itself)."""
    letters = byte_letters()
    order = {word: rank for rank, word in enumerate(ranks)}
    merges = []
    for word in ranks[256:]:
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        cuts = [cut for cut in cuts if cut[0] in order and cut[1] in order]
        merges += sorted(cuts, key=lambda cut: (order[cut[0]], order[cut[1]]))
    spell = {word: "".join(letters[b] for b in word) for word in ranks}
    model = models.BPE(
        vocab={spell[word]: rank for word, rank in order.items()},
        merges=[(spell[left], spell[right]) for left, right in merges],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    bos = SPECIALS[0]
    start = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), start]
    )
    return tokenizer


def meta_encoding(path: Path) -> tiktoken.Encoding:
    """Read a tokenizer.model the way Meta's code does."""
    lines = path.read_bytes().splitlines()
    ranks = {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, lines)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("uma", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def write(folder: Path, ranks: list[bytes]) -> None:
    """Write the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    build_hf(ranks).save(str(folder / "tokenizer.json"))
    lines = [b"%s %d\n" % (base64.b64encode(word), rank) for rank, word in enumerate(ranks)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    named = {"bos_token": SPECIALS[0], "eos_token": "<|eot_id|>", "pad_token": SPECIALS[4]}
    settings = {
        **named,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", named)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def random_text(rng: random.Random) -> str:
    """A text of any characters, to compare the two encoders where the corpus never goes."""
    blocks = [(32, 127), (160, 592), (0x400, 0x460), (0x4E00, 0x4E80), (0x1F300, 0x1F500), (9, 14)]
    picks = [blocks[min(int(rng.expovariate(1.0)), 5)] for _ in range(60)]
    return "".join(chr(rng.randrange(*block)) for block in picks)


def check(folder: Path) -> int:
    """Fail unless both files encode alike; return how many texts were compared."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = meta_encoding(folder / "tokenizer.model")
    rng = random.Random(11)
    texts = [*training_texts(seed=12, count=500), *(random_text(rng) for _ in range(3000))]
    texts += [f"{SPECIALS[0]}x{name}y" for name in SPECIALS]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == meta.encode(text, allowed_special="all"), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, text
    return len(texts)


def main() -> None:
    """Train, write and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BASE_DIR)
    args = parser.parse_args()
    ranks = learn_ranks()
    write(args.out, ranks)
    texts = check(args.out)
    print(f"tokenizer: {len(ranks)} ranks + {len(SPECIALS)} specials; {texts} texts encode alike")


if __name__ == "__main__":
    main()
