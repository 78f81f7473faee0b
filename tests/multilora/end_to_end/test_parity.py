"""The numbers are those of transformers and PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from multilora.config.rope import RopeScaling
from tests.harness.adapter_folders import LINEARS, write_adapter
from tests.harness.model_folders import TINY, write_checkpoint
from tests.harness.reference_models import JOB_FIELDS, TOLERANCE, check
from tests.harness.tiny_engines import Job, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from multilora.outputs import RequestOutput

LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
SHAPES: dict[str, dict[str, Any]] = {
    "gqa1": {"num_heads": 4, "num_kv_heads": 4},
    "gqa2": {"num_heads": 4, "num_kv_heads": 2, "mlp_bias": True},
    "gqa4": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 8},
    "gqa8": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 8, "rope_theta": 500_000.0},
    "tied head": {"tie_word_embeddings": True, "rope_scaling": None},
    "past the original length": {"rope_scaling": LLAMA3},
    "odd sizes": {
        "hidden_size": 72,
        "intermediate_size": 100,
        "vocab_size": 131,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 12,
        "rope_scaling": None,
    },
    "attention bias": {"attention_bias": True, "num_layers": 3},
    "wide heads": {"head_dim": 32, "num_heads": 4, "num_kv_heads": 1, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_base_is_transformers_llama(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = write_checkpoint(tmp_path, seed=len(shape), **SHAPES[shape])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    job = Job(prompt_of(90, seed=1, vocab=config.vocab_size), greedy(64, **JOB_FIELDS))
    output = run(make_engine(tmp_path), [job])[0]
    assert len(output.outputs[0].token_ids) == 64
    check(output, model)
    generated = model.generate(
        torch.tensor([job.prompt]),
        attention_mask=torch.ones(1, 90, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=[],
        pad_token_id=0,
    )
    assert generated[0, 90:].tolist() == output.outputs[0].token_ids


# In half precision the yardstick is transformers' own error against itself in float64: ours may be
# half as large again in the root mean square over all positions, and twice as large at the worst.
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALF
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_as_near_to_float64_as_transformers(
    shape: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = write_checkpoint(tmp_path, seed=len(shape), dtype=dtype, **SHAPES[shape])
    job = Job(prompt_of(90, seed=1, vocab=config.vocab_size), greedy(24, **JOB_FIELDS))

    def load(dtype: torch.dtype) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()

    check_half(run(make_engine(tmp_path), [job])[0], load, dtype)


@HALF
def test_an_adapter_in_half_precision_is_as_near_to_float64_as_peft(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = tmp_path / "base"
    write_checkpoint(base, num_layers=3, dtype=dtype)
    folder = adapter_in(tmp_path / "a", rank=16, alpha=16, dtype=dtype)

    def load(dtype: torch.dtype) -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=dtype)
        return peft.PeftModel.from_pretrained(model, folder).to(dtype).eval()

    check_half(outputs_of(base, {"a": folder}, ["a"])[0], load, dtype)


def check_half(
    output: RequestOutput, load: Callable[[torch.dtype], Any], dtype: torch.dtype
) -> None:
    """The error of the log-probabilities next to that of the model that `load` gives."""
    answer = output.outputs[0]
    assert output.prompt_logprobs is not None
    assert answer.logprobs is not None
    found = [row for row in (*output.prompt_logprobs[1:], *answer.logprobs) if row is not None]
    ids = torch.tensor([output.prompt_token_ids + answer.token_ids])
    at = [(i, token) for i, row in enumerate(found) for token in row]
    where = tuple(torch.tensor(at).T)

    def logprobs(dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            logits: Tensor = load(dtype)(input_ids=ids).logits[0, :-1]
        return logits.double().log_softmax(-1)[where]

    exact = logprobs(torch.float64)
    theirs = (logprobs(dtype) - exact).abs()
    ours = (torch.tensor([found[i][token].logprob for i, token in at]).double() - exact).abs()
    assert theirs.max() > TOLERANCE, "the yardstick is not in half precision"
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()
    assert ours.max() <= 2 * theirs.max()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    write_checkpoint(root, num_layers=3)
    return root


@pytest.fixture(scope="module")
def peft_model(base: Path) -> Callable[[Path], Any]:
    """`peft_model(folder)`: PEFT's own model of one adapter."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

    def load(folder: Path) -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(model, folder).eval()

    return load


def adapter_in(folder: Path, **fields: Any) -> Path:
    return write_adapter(folder, replace(TINY, num_layers=3), **{"scale": 0.2, **fields})


def outputs_of(
    base: Path, adapters: Mapping[str, Path], specs: list[Any], length: int = 40, count: int = 24
) -> list[RequestOutput]:
    engine = make_engine(base, adapters, max_num_seqs=16, max_loras=8, num_kv_blocks=128)
    params = greedy(count, **JOB_FIELDS)
    jobs = [Job(prompt_of(length + i, seed=i), params, spec) for i, spec in enumerate(specs)]
    return run(engine, jobs)


def test_a_batch_of_eight_adapters_and_the_base_is_peft_one_by_one(
    base: Path, tmp_path: Path, peft_model: Callable[[Path], Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    ranks = (4, 8, 12, 16, 24, 32, 48, 64)
    adapters = {
        f"r{rank}": adapter_in(
            tmp_path / f"r{rank}", rank=rank, alpha=rank * 1.5, seed=rank, scale=0.12
        )
        for rank in ranks
    }
    specs = [None, *adapters, None]
    outputs = outputs_of(base, adapters, specs, length=10, count=20)
    plain = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    for spec, output in zip(specs, outputs, strict=True):
        check(output, plain if spec is None else peft_model(adapters[spec]))


FEATURES: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "rank": 16, "alpha": 8},
    "patterns": {
        "rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 24},
        "alpha_pattern": {"q_proj": 7.0, "layers.2.self_attn.v_proj": 40.0},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 3, "up_proj": 32}},
    "embedding and head": {"targets": (*LINEARS, "embed_tokens", "lm_head"), "scale": 0.15},
    "embedding alone": {"targets": ("embed_tokens",), "scale": 0.5},
    "some layers": {"layers": (0, 2)},
    "one slice": {"targets": ("k_proj", "up_proj"), "rank": 5},
    "dora": {"use_dora": True, "rank": 6},
    "dora on embedding and head": {
        "use_dora": True,
        "targets": (*LINEARS, "embed_tokens", "lm_head"),
    },
    "dora on one slice, rslora": {"use_dora": True, "use_rslora": True, "targets": ("v_proj",)},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_of_peft_is_honoured(
    feature: str, base: Path, tmp_path: Path, peft_model: Callable[[Path], Any]
) -> None:
    folder = adapter_in(tmp_path / "a", **{"seed": 5, **FEATURES[feature]})
    with_it, without = outputs_of(base, {"a": folder}, ["a", None], count=12)
    check(with_it, peft_model(folder))
    (plain,) = outputs_of(base, {}, [None], count=12)
    assert plain.prompt_logprobs != with_it.prompt_logprobs, "the adapter changes nothing"
    assert without.outputs[0].token_ids


INVOCATION = (7, 9, 7)
PLACES: dict[str, list[int]] = {  # of the invocation in a prompt of 150 tokens
    "in the middle": [90],
    "at the start": [0],
    "at the end": [147],
    "several times": [3, 64, 100],
    "overlapping itself": [20, 22],
    "nowhere": [],
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("kind", [{}, {"lora_bias": True}, {"targets": ("v_proj", "lm_head")}])
def test_an_activated_lora_is_pefts(
    kind: dict[str, Any], base: Path, tmp_path: Path, peft_model: Callable[[Path], Any]
) -> None:
    """All places in one batch with a plain LoRA; prompts are of several chunks."""
    folder = adapter_in(
        tmp_path / "a", seed=5, rank=12, alora_invocation_tokens=list(INVOCATION), **kind
    )
    plain = adapter_in(tmp_path / "b", seed=6)
    adapters = {"a": folder, "b": plain}
    engine = make_engine(base, adapters, max_num_seqs=16, num_kv_blocks=128)
    params, jobs = greedy(8, **JOB_FIELDS), []
    for seed, places in enumerate(PLACES.values()):
        prompt = list(prompt_of(150, seed=seed))
        for place in places:
            prompt[place : place + 3] = INVOCATION
        jobs.append(Job(tuple(prompt), params, "a"))
    outputs = run(engine, [*jobs, Job(prompt_of(150, seed=99), params, "b")])
    starts = [max(places, default=None) for places in PLACES.values()]
    assert [output.adapter_start for output in outputs] == [*starts, 0]
    check(outputs.pop(), peft_model(plain))
    model = peft_model(folder)
    for output in outputs:
        check(output, model)


BIASES: dict[str, dict[str, Any]] = {
    "on lora_B": {"lora_bias": True, "rank": 12, "use_rslora": True},
    "all of the base": {"bias": "all", "targets": ("q_proj", "down_proj")},
    "of the base with LoRA": {"bias": "lora_only", "targets": ("v_proj", "o_proj", "up_proj")},
    "all, with dora": {"bias": "all", "use_dora": True},
    "untouched by dora": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore:.*does not account for bias:UserWarning")
@pytest.mark.parametrize("kind", BIASES)
def test_biases_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    """On a base that has biases; its own and an adapter's, which a batch must not share."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = tmp_path / "base"
    config = write_checkpoint(base, attention_bias=True, mlp_bias=True)
    fields = {"scale": 0.2, "seed": 3, **BIASES[kind]}
    folder = write_adapter(tmp_path / "a", config, **fields)
    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    with_it, without = outputs_of(base, {"a": folder}, ["a", None], count=12)
    check(without, model)
    check(with_it, peft.PeftModel.from_pretrained(model, folder).eval())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_head_with_embedding_and_head_lora_is_peft(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = tmp_path / "base"
    config = write_checkpoint(base, tie_word_embeddings=True)
    for target in ("embed_tokens", "lm_head"):
        folder = write_adapter(tmp_path / target, config, targets=(target, "q_proj"), scale=0.3)
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        wanted = peft.PeftModel.from_pretrained(model, folder).eval()
        check(outputs_of(base, {"a": folder}, ["a"], count=12)[0], wanted)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (0.25, 2.0)])
def test_a_mix_is_pefts_concatenation_of_its_adapters(
    weights: tuple[float, float],
    base: Path,
    tmp_path: Path,
    peft_model: Callable[[Path], Any],
) -> None:
    adapters = {
        "a": adapter_in(tmp_path / "a", rank=8, alpha=12, seed=1),
        "b": adapter_in(tmp_path / "b", rank=16, alpha=16, seed=2),
    }
    model = peft_model(adapters["a"])
    model.load_adapter(adapters["b"], "b")
    # `cat` scales each A by its weight times the adapter's own scaling.
    model.base_model.add_weighted_adapter(
        ["default", "b"], list(weights), "both", combination_type="cat"
    )
    model.set_adapter("both")
    mix = dict(zip("ab", weights, strict=True))
    check(outputs_of(base, adapters, [mix], count=12)[0], model)


def test_a_mix_with_dora_is_the_weighted_sum_of_the_changes_to_the_base(tmp_path: Path) -> None:
    """PEFT has no such mix: the oracle is W + sum of w (merged - W), and the same of biases."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = tmp_path / "base"
    config = write_checkpoint(base, attention_bias=True)
    adapters = {
        "dora": write_adapter(tmp_path / "a", config, seed=1, use_dora=True, bias="all"),
        "plain": write_adapter(tmp_path / "b", config, seed=2, rank=16),
        "other-dora": write_adapter(tmp_path / "c", config, seed=3, rank=4, use_dora=True),
    }
    mix = dict(zip(adapters, (0.6, 0.5, -0.3), strict=True))
    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    mixed = {name: value.clone() for name, value in own.items()}
    for name, weight in mix.items():
        fresh = transformers.LlamaForCausalLM.from_pretrained(base)
        merged = peft.PeftModel.from_pretrained(fresh, adapters[name]).merge_and_unload()
        for key, value in merged.state_dict().items():
            mixed[key] += weight * (value - own[key])
    model.load_state_dict(mixed)
    check(outputs_of(base, adapters, [mix], count=12)[0], model)
