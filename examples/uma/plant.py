"""Start the base with copying circuits in place, because a small budget is too short to find them.

Left to itself, this model needs far more than a few million tokens before attention learns "find
where this word stood before and read on" (an induction head). So two layers start as one:

- layer 0 notes at each position the word one back and the word two back;
- layer 1 looks up its own word, or one of those two, among the notes of all earlier positions, and
  copies the word it finds there.

All of it is ordinary weights, trained on from there like the rest.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

CODE = 16  # size of a word's code: the rotary pairs too slow to blur a match fill 16 of 32 places
SIZE = 0.16  # of a code's entries in the embedding
OWN, BACK = 1, (128, 144)  # where the codes stand: the own word, one back, two back


def word_codes(tokenizer: Tokenizer) -> torch.Tensor:
    """A code of signs for each token; spellings that differ by case and a leading space share it,
    so that a word is found again in quotes or at the start of a line."""
    rows = []
    for token in range(tokenizer.get_vocab_size()):
        word = tokenizer.decode([token], skip_special_tokens=False).strip().lower()
        signs = random.Random(word or str(token))
        rows.append([signs.choice((-1.0, 1.0)) for _ in range(CODE)])
    return torch.tensor(rows)


@torch.no_grad()
def plant(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Write the circuits into a fresh model of 192 features, 6 heads of 32 and 2 KV heads."""
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, SIZE / 2)
    embedding[:, BACK[0] :] *= 0.05
    embedding[:, 0] = 1.5 * SIZE  # the same for all: gives the layer 0 heads a fixed query
    embedding[:, OWN : OWN + CODE] = SIZE * word_codes(tokenizer)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    speeds = model.model.rotary_emb.inv_freq
    for head in (0, 1):
        _look_back(model.model.layers[0].self_attn, head, speeds, BACK[head])
    for head, back in enumerate(BACK):
        _look_up(model.model.layers[1].self_attn, head, back)


def _look_back(attention: torch.nn.Module, head: int, speeds: torch.Tensor, to: int) -> None:
    """KV head `head` of layer 0 attends `head + 1` positions back and notes that word's code."""
    half = len(speeds)
    query = attention.q_proj.weight[96 * head : 96 * head + 32]
    key, value = (
        p.weight[32 * head : 32 * head + 32] for p in (attention.k_proj, attention.v_proj)
    )
    for part in (query, key, value):
        part.zero_()
    angle = (head + 1) * speeds
    query[:half, 0], query[half:, 0] = 2.2 * angle.cos(), -2.2 * angle.sin()
    key[:half, 0] = 2.2
    places = torch.arange(CODE)
    value[places, OWN + places] = 1.0
    attention.o_proj.weight[to + places, 96 * head + places] = SIZE / 2


def _look_up(attention: torch.nn.Module, head: int, back: int) -> None:
    """KV head `head` of layer 1 offers its notes; its three query heads ask for three words."""
    key, value = (
        p.weight[32 * head : 32 * head + 32] for p in (attention.k_proj, attention.v_proj)
    )
    key.zero_()
    value.zero_()
    codes, places = torch.arange(CODE), torch.tensor([*range(8, 16), *range(24, 32)])
    key[places, back + codes] = 1.6
    both = torch.arange(2 * CODE)
    value[both, OWN + both] = 1.0
    for number, wanted in enumerate((OWN, *BACK)):
        start = 96 * head + 32 * number
        query = attention.q_proj.weight[start : start + 32]
        query.zero_()
        query[places, wanted + codes] = 1.6
        attention.o_proj.weight[OWN + both, start + both] = SIZE / 2
