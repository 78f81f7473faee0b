"""What PEFT trains beside LoRA, served as PEFT has it: norms, embeddings, heads, rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.harness.model_folders import write_checkpoint
from tests.harness.reference_models import JOB_FIELDS, check
from tests.harness.tiny_engines import Job, greedy, make_engine, prompt_of, run

# PEFT says that it saves an embedding, and what it does about tied ones.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from multilora.outputs import RequestOutput

BASES = {"untied": {}, "tied": {"tie_word_embeddings": True, "rope_scaling": None}}
TARGETS = ["q_proj", "down_proj"]

# Name -> base, fields of PEFT's LoraConfig.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "norms": ("untied", {"modules_to_save": ["norm"]}),
    "some norms": ("untied", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "embedding and head": ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both as targets, too": (
        "untied",
        {
            "target_modules": [*TARGETS, "embed_tokens", "lm_head"],
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
    ),
    "a class's head": ("untied", {"modules_to_save": ["classifier", "score"]}),
    "head and dora": ("untied", {"modules_to_save": ["lm_head"], "use_dora": True}),
    "embedding of a tied base": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "head of a tied base": ("tied", {"modules_to_save": ["lm_head"]}),
    "both of a tied base": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embedding": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied head": ("tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tying of an untied base": (
        "untied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied lora of the embedding": (
        "tied",
        {"target_modules": [*TARGETS, "embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied lora of the head": (
        "tied",
        {"target_modules": [*TARGETS, "lm_head"], "ensure_weight_tying": True},
    ),
    "rows": ("untied", {"trainable_token_indices": [5, 3, 40]}),
    "rows of both": (
        "untied",
        {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7, 5]}},
    ),
    "rows of the head": ("untied", {"trainable_token_indices": {"lm_head": [7, 5]}}),
    "rows of a tied base": ("tied", {"trainable_token_indices": [5, 3, 40]}),
    "rows of a tied base, apart": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7, 5]}},
    ),
    "rows of a tied base, one list": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 3]}},
    ),
    "rows and a head": (
        "untied",
        {"trainable_token_indices": [5, 3], "modules_to_save": ["lm_head", "norm"]},
    ),
    "rows of a tied base under lora": (
        "tied",
        {"target_modules": [*TARGETS, "lm_head"], "trainable_token_indices": [5, 3, 40]},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name, fields in BASES.items():
        write_checkpoint(root / name, num_layers=2, **fields)
    return {name: root / name for name in BASES}


@pytest.fixture(scope="module")
def adapter_of(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`adapter_of(case)`: what PEFT saves after all that it would train has changed."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapters")

    def write(case: str) -> Path:
        folder = root / case.replace(" ", "-")
        if not folder.exists():
            base, fields = CASES[case]
            model = transformers.LlamaForCausalLM.from_pretrained(bases[base])
            config = peft.LoraConfig(r=4, **{"target_modules": TARGETS, **fields})
            model = peft.get_peft_model(model, config)
            generator = torch.Generator().manual_seed(len(case))
            with torch.no_grad():
                for values in model.parameters():
                    if values.requires_grad:
                        values += 0.1 * torch.randn(values.shape, generator=generator)
            model.save_pretrained(folder)
        return folder

    return write


def outputs_of(base: Path, adapters: dict[str, Path], specs: list[Any]) -> list[RequestOutput]:
    engine = make_engine(base, adapters, max_num_seqs=16, max_loras=8, num_kv_blocks=128)
    params = greedy(16, **JOB_FIELDS)
    # The prompts have the trained tokens in them.
    jobs = [
        Job([5, 3, 40, 7, *prompt_of(20 + i, seed=i)], params, spec) for i, spec in enumerate(specs)
    ]
    return run(engine, jobs)


@pytest.mark.parametrize("case", CASES)
def test_it_is_peft(case: str, bases: dict[str, Path], adapter_of: Callable[[str], Path]) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder, base = adapter_of(case), bases[CASES[case][0]]
    plain, own = outputs_of(base, {"a": folder}, [None, "a"])
    check(plain, transformers.LlamaForCausalLM.from_pretrained(base).eval())
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    check(own, peft.PeftModel.from_pretrained(model, folder).eval())


@pytest.mark.parametrize("base", BASES)
def test_all_of_them_share_a_batch_and_keep_their_bits(
    base: str, bases: dict[str, Path], adapter_of: Callable[[str], Path]
) -> None:
    cases = [case for case, (of, _) in CASES.items() if of == base]
    for some in (cases[:7], cases[7:]):
        adapters = {f"a{i}": adapter_of(case) for i, case in enumerate(some)}
        specs = [None, *adapters, {"a1": 0.5, "a3": -0.25}, None]
        together = outputs_of(bases[base], adapters, specs)
        for i, spec in enumerate(specs):
            alone = outputs_of(bases[base], adapters, [None] * i + [spec])[i]
            assert alone.outputs == together[i].outputs
            assert alone.prompt_logprobs == together[i].prompt_logprobs


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("norms", "some norms"),
        ("embedding and head", "rows of both"),
        ("rows and a head", "rows"),
        ("rows of a tied base", "both of a tied base"),
    ],
)
def test_a_mix_is_the_weighted_sum_of_the_changes(
    one: str, other: str, bases: dict[str, Path], adapter_of: Callable[[str], Path]
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = bases[CASES[one][0]]
    adapters, weights = {"a": adapter_of(one), "b": adapter_of(other)}, {"a": 0.5, "b": -0.25}
    model = transformers.LlamaForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    if CASES[one][0] == "tied":
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
    own = {name: values.double() for name, values in model.state_dict().items()}
    wanted = dict(own)
    for name, folder in adapters.items():
        plain = transformers.LlamaForCausalLM.from_pretrained(base)
        merged = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
        for key, values in own.items():
            wanted[key] = wanted[key] + weights[name] * (merged[key].double() - values)
    model.load_state_dict(wanted)
    check(outputs_of(base, adapters, [None, weights])[1], model.eval())
