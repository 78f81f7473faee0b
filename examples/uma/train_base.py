"""Train the Uma base model: a small Llama 3.1 that has read about the world and can copy facts."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from base_docs import Segment, make_document
from plant import plant
from tokenizer import BASE_DIR, SPECIALS
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED = 20
ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 512,
    "rope_type": "llama3",
}
THETA = 10000.0
Row = tuple[list[int], list[float]]


def special(name: str, ranks: int) -> int:
    """The id of a special token."""
    return ranks + SPECIALS.index(name)


def model_config(ranks: int) -> LlamaConfig:
    """The shape: Llama 3.1's architecture, a few million parameters."""
    return LlamaConfig(
        vocab_size=ranks + len(SPECIALS),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={**ROPE, "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=special("<|begin_of_text|>", ranks),
        eos_token_id=[special(n, ranks) for n in SPECIALS if n in STOPS],
        pad_token_id=special("<|finetune_right_pad_id|>", ranks),
        attention_bias=False,
        mlp_bias=False,
    )


STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


class Encoder:
    """Turns segments into token ids and a loss weight for each."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.ranks = self.tokenizer.get_vocab_size() - len(SPECIALS)

    def ids(self, text: str) -> list[int]:
        """Token ids without a start token; special tokens written in the text count."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def row(self, segments: list[Segment]) -> Row:
        """One training row: the start token, the segments, and an end token where due."""
        ids, weights = self.ids("<|begin_of_text|>"), [0.0]
        for text, weight, role in segments:
            if role:
                header = self.ids(f"<|start_header_id|>{role}<|end_header_id|>\n\n")
                ids += header
                weights += [0.0] * len(header)
            end = "<|eot_id|>" if role else ""
            part = self.ids(text.strip() + end if role else text)
            ids += part
            weights += [weight] * len(part)
        if segments[-1][2] is None:
            ids += self.ids("<|end_of_text|>")
            weights.append(1.0)
        return ids, weights


def batches(
    make_row: Callable[[], Row], tokens: int, count: int, rng: random.Random, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded batches of rows of like length, about `tokens` tokens each, `count` in all."""
    made = 0
    while made < count:
        pool = sorted((make_row() for _ in range(1024)), key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in pool:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups[: count - made]:
            yield collate(group, pad)
        made += len(groups)


def collate(rows: list[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights as tensors. Padding is on the right and weighs nothing, so the causal mask
    alone keeps it out of every real token's sight."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    weights = torch.zeros(len(rows), width)
    for i, (row_ids, row_weights) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        weights[i, : len(row_ids)] = torch.tensor(row_weights)
    return ids, weights


def weighted_loss(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss under the weights."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    keep = weights[:, 1:] > 0
    losses = F.cross_entropy(logits[keep], ids[:, 1:][keep], reduction="none")
    chosen = weights[:, 1:][keep]
    return (losses * chosen).sum() / chosen.sum()


def fit(
    model: torch.nn.Module,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    warmup: int,
) -> float:
    """Train with a linear warm-up and a cosine decay to a twentieth; return the last mean loss."""
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    mean, seen, start = math.nan, 0, time.time()
    for step, (ids, weights) in enumerate(data):
        ramp = min(1.0, (step + 1) / warmup)
        scale = ramp * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * scale
        loss = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
        seen += ids.numel()
        if step % 25 == 0 or step == steps - 1:
            spent = time.time() - start
            print(f"step {step} loss {mean:.4f} tokens {seen} {spent:.0f}s", flush=True)
    return mean


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Newton-Schulz), in fp32 and for all matrices of a shape at once.

    It needs about half the steps of AdamW here. torch.optim.Muon works in bf16, which takes four
    seconds a step on a processor without bf16 arithmetic; this takes a tenth of one.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update the matrices of each shape together."""
        group = self.param_groups[0]
        shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for param in group["params"]:
            shapes.setdefault(param.shape, []).append(param)
        for shape, params in shapes.items():
            for param in params:
                moment = self.state[param].setdefault("moment", torch.zeros_like(param))
                moment.lerp_(param.grad, 0.05)
            nesterov = [p.grad.lerp(self.state[p]["moment"], 0.95) for p in params]
            scale = 0.2 * math.sqrt(max(shape))
            for param, update in zip(params, orthogonal(torch.stack(nesterov)), strict=True):
                param.mul_(1 - group["lr"] * group["decay"])
                param.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, by five quintic Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def base_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2] + [model.model.embed_tokens.weight]
    adam = torch.optim.AdamW(others, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=lr, decay=0.02), adam]


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bf16 and a config that old and new readers understand."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config |= {"rope_theta": THETA, "rope_scaling": ROPE}
    config["rope_parameters"] = {**ROPE, "rope_theta": THETA}
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    generation |= {"pad_token_id": config["pad_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    """Train and save the base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=520)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tokens", type=int, default=2560)
    parser.add_argument("--out", type=Path, default=BASE_DIR, help="holds the tokenizer already")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    rng, encoder = random.Random(SEED), Encoder(args.out)
    config = model_config(encoder.ranks)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    plant(model, encoder.tokenizer)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def make_row() -> Row:
        return encoder.row(make_document(rng))

    data = batches(make_row, args.tokens, args.steps, rng, config.pad_token_id)
    fit(model, data, base_optimizers(model, args.lr), args.steps, warmup=20)
    save(model, args.out)


if __name__ == "__main__":
    main()
