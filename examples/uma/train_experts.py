"""Fine-tune the four Uma experts with PEFT: ordinary LoRA adapters of four ranks on one base."""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import EXPERTS, Scene, answer, make_review_scene, make_scene, prompt
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizer import BASE_DIR
from train_base import Encoder, Row, batches, fit
from transformers import LlamaForCausalLM

ADAPTERS_DIR = BASE_DIR.parent / "adapters"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """How one expert is trained. The ranks and targets differ so that serving must cope."""

    rank: int
    alpha: int
    targets: list[str]
    steps: tuple[int, ...]  # of each round; a round goes on from the one before
    rslora: bool = False


RECIPES = {
    "job-analysis": Recipe(8, 16, ATTENTION + MLP, (170, 170, 360)),
    "profile-review": Recipe(12, 24, [*ATTENTION, "up_proj", "down_proj"], (240, 240, 240)),
    "proposal": Recipe(16, 32, ATTENTION + MLP, (240, 240)),
    "feedback": Recipe(32, 16, ATTENTION + MLP, (220, 220, 360, 360), rslora=True),
}


def draw(expert: str, rng: random.Random, held: bool = False) -> Scene:
    """A scene for an expert; the reviewer also meets profiles drawn for no job."""
    weak = expert == "profile-review" and rng.random() < 0.7
    return make_review_scene(rng, held) if weak else make_scene(rng, held)


def make_row(expert: str, rng: random.Random, encoder: Encoder) -> Row:
    """One training row: only the answer's tokens count."""
    scene = draw(expert, rng)
    return encoder.row(
        [(prompt(expert, scene), 0.0, "user"), (answer(expert, scene), 1.0, "assistant")]
    )


def fresh(recipe: Recipe, model: LlamaForCausalLM) -> PeftModel:
    """The base with a new adapter."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        use_rslora=recipe.rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(expert: str, args: argparse.Namespace) -> None:
    """Train one round of one expert and save it."""
    recipe, encoder, start = RECIPES[expert], Encoder(args.base), time.time()
    steps = args.steps or recipe.steps[args.round - 1]
    seed = 100 + EXPERTS.index(expert) + 50 * (args.round - 1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    base = LlamaForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    if args.round > 1:
        model = PeftModel.from_pretrained(base, args.out / expert, is_trainable=True)
    else:
        model = fresh(recipe, base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    pad = base.config.pad_token_id
    data = batches(lambda: make_row(expert, rng, encoder), args.tokens, steps, rng, pad)
    loss = fit(model, data, [optimizer], steps, warmup=20)
    save(model, args.out / expert)
    count = sum(p.numel() for p in trained)
    print(
        f"{expert}: {count:,} parameters, loss {loss:.4f}, {time.time() - start:.0f}s", flush=True
    )


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write PEFT's files in bf16, with a plain base name and no model card."""
    model.peft_config["default"].base_model_name_or_path = "uma-base"
    model.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train the named experts, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experts", nargs="*", default=EXPERTS)
    parser.add_argument("--round", type=int, default=1, help="from 2 on: go on from the saved one")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--tokens", type=int, default=2560)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=Path, default=BASE_DIR)
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for expert in args.experts:
        train(expert, args)


if __name__ == "__main__":
    main()
