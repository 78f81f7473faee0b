"""docs/vllm.md: every field, argument and method of vLLM's, and what becomes of it here.

The tables are made from the code and a list of vLLM's fields, `tests/data/vllm_fields.json`; write
them anew with `MULTILORA_UPDATE_DOCS=1 pytest tests/test_vllm_page.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from typing import Any

import pytest

from multilora import LLM, CompletionOutput, RequestOutput
from multilora.config import vllm_settings
from multilora.config.engine import EngineConfig
from multilora.errors import ConfigError
from multilora.sampling_params import REFUSED, RequestOutputKind, SamplingParams
from tests.harness.paths import ROOT

PAGE = ROOT / "docs" / "vllm.md"
VLLM: dict[str, Any] = json.loads((ROOT / "tests/data/vllm_fields.json").read_text())
SAMPLING: dict[str, Any] = VLLM["SamplingParams"]
DIFFERS = {
    "n": "at most 128; the i-th answer samples with seed + i",
    "logit_bias": "refused outside of -100 to 100, not cut to it; at most 1,024 tokens",
    "stop": "at most 16 texts of at most 1,024 characters",
    "bad_words": "after a space, too, where that takes another number of tokens",
    "temperature": "at most 100",
    "repetition_penalty": "at most 100",
    "logits_processors": "vLLM took them away; callables as before, on a CPU",
}
"""Fields that both have, and what is not the same."""

SETTINGS = {
    "model": "a folder; nothing is downloaded",
    "tokenizer": "a folder",
    "load_format": "auto or dummy: the files say what they are",
    "dtype": "float32 stays float32 (vLLM: becomes float16): a CPU is exact in it",
    "quantization": "int8 and int4 are made when the base is loaded; checkpoints that are "
    "quantised already are refused by name",
    "max_num_seqs": "default 64 (vLLM: 256 or more, by the GPU): what a CPU serves well",
    "max_num_batched_tokens": "default 512 (vLLM: 2,048 or more, by the GPU): running answers wait "
    "for a chunk of prompt, on a CPU four times as long",
    "max_loras": "default 16 (vLLM: 1): a slot costs pages of the ranks in it, not of the largest",
    "max_lora_rank": "default 512 (vLLM: 16): a bound, which costs nothing; any multiple of 8",
    "lora_dtype": "auto, float32, bfloat16 or float16",
    "kv_cache_dtype": "auto, fp8 or fp8_e4m3 on a GPU, int8 on a CPU",
    "async_scheduling": "default None: on a GPU",
    "enable_prefix_caching": "default True, as in vLLM's V1; keyed by the adapters' content",
    "seed": "of requests without one; each then has a seed of its own that follows from it",
}


GENERATE = {
    "priority": "0 for each; others are refused, since requests have none to order by",
    "tokenization_kwargs": "no argument: give token ids to say how text is cut; text that is too "
    "long is refused, not truncated",
    "adapter": "ours alone: a loaded adapter's name, or names with weights, for all or for each",
}
CHAT = {
    "chat_template": "a template's text, or the name of one of the tokenizer's own; by name",
    "chat_template_content_format": "no argument: parts stay parts where the template goes through "
    "them, and are joined where it does not",
    "tokenization_kwargs": "no argument: the template alone says which special tokens there are",
    "mm_processor_kwargs": "no argument: messages are text",
    "adapter": GENERATE["adapter"],
}
POOLING = "none: this engine generates"
METHODS = {
    "get_tokenizer": "our own tokenizer: apply_chat_template as in transformers; encode takes "
    "control tokens in a text for plain text (encode_with_special does not), decode leaves them "
    "out unless skip_special_tokens=False",
    "get_metrics": "a dict of the engine's counters, no list of Prometheus' metrics",
    "reset_prefix_cache": "takes no arguments; False while requests hold some of it",
    "beam_search": "none: ask for n answers and compare cumulative_logprob",
    **dict.fromkeys(("encode", "embed", "classify", "reward", "score"), POOLING),
    "collective_rpc": "none: there are no workers",
    "apply_model": "none: `llm.engine.model` is the model, in this process",
    "get_world_size": "none: one device serves the model",
    "reset_mm_cache": "none: prompts are text",
    **dict.fromkeys(
        ("start_profile", "stop_profile"), "none: use torch.profiler around `generate`"
    ),
    **dict.fromkeys(("sleep", "wake_up"), "none: make another engine when it is needed"),
    "adapters": "ours alone: the loaded adapters by name",
    "load_adapter": "ours alone: loads a folder under a name before a request asks for it",
    "register_adapter": "ours alone: names a folder that is read when a prompt asks for it",
    "unload_adapter": "ours alone: forgets a name",
}
NO_TRANSFER = "none: KV stays in its engine"
REQUEST_OUTPUT = {
    "metrics": "vLLM's names for when it came, was scheduled, had its first and its last token",
    "prompt_logprobs": "with DELTA in the first output only",
    **dict.fromkeys(("encoder_prompt", "encoder_prompt_token_ids"), "none: a Llama has no encoder"),
    "kv_transfer_params": NO_TRANSFER,
    "add": "none: outputs are immutable; join deltas by `token_offset`",
    "adapter": "ours alone: the adapter as the request named it",
    "adapter_start": "ours alone: the prompt token from which on the adapter is active; None = the "
    "base",
    "error": 'ours alone: why an answer ended with finish_reason "error"',
}
COMPLETION_OUTPUT = {
    "finish_reason": 'stop, length and abort as in vLLM; "error" with the reason in '
    "`RequestOutput.error`",
    "routed_experts": "none: a Llama has no experts",
    "lora_request": "none: it is in the RequestOutput",
    "kv_transfer_params": NO_TRANSFER,
    "token_offset": "ours alone: tokens of the answer before these, with DELTA",
}


def rows_of(name: str, ours: list[str], told: dict[str, str]) -> list[tuple[str, str]]:
    """vLLM's names in its order, then those that are ours alone."""
    rows = []
    for one in VLLM[name]:
        assert one in ours or told[one].startswith(("none: ", "no argument: ")), one
        rows.append((one, told.get(one, "same")))
    alone = [one for one in ours if one not in VLLM[name]]
    assert all(told[one].startswith("ours alone: ") for one in alone)
    assert told.keys() <= {*VLLM[name], *ours}
    return rows + [(one, told[one]) for one in alone]


def arguments_of(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


def members_of(kind: type) -> list[str]:
    """Fields first, then methods and properties."""
    own = [name for name in vars(kind) if not name.startswith("_")]
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    named = [field.name for field in fields]
    return [*named, *(name for name in own if name not in named)]


def sampling_rows() -> list[tuple[str, str]]:
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    rows = []
    for name in (*SAMPLING, *sorted(ours - SAMPLING.keys())):
        if name in ours:
            rows.append((name, DIFFERS.get(name, "same")))
        else:
            rows.append((name, "refused" + told(*REFUSED[name])))
    return rows


def setting_rows() -> list[tuple[str, str]]:
    ours = {field.name for field in dataclasses.fields(EngineConfig)}
    rows = []
    for name in VLLM["LLM"]:
        if name in ours:
            rows.append((name, SETTINGS.get(name, "same")))
        else:
            rows.append((name, "refused" + told(*vllm_settings.REFUSED[name])))
    rows += [(name, f"ours alone: {meaning(name)}") for name in sorted(ours - set(VLLM["LLM"]))]
    return rows


def told(inert: tuple[Any, ...], why: str) -> str:
    values = [f"`{value!r}`" for value in inert if value is not None or len(inert) == 1]
    return f" unless {', '.join(values[:4])}: {why}"


def meaning(name: str) -> str:
    """The first sentence of a setting in EngineConfig's docstring."""
    text = re.sub(r"\s+", " ", EngineConfig.__doc__ or "")
    found = re.search(rf" {name}: (.*?)(?:\. |\.?$| \w+: )", text)
    assert found, name
    return found[1][0].lower() + found[1][1:]


def table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| vLLM | here |", "|---|---|", *(f"| `{n}` | {what} |" for n, what in rows)])


TABLES = {
    "sampling": sampling_rows,
    "settings": setting_rows,
    "generate": lambda: rows_of("LLM.generate", arguments_of(LLM.generate), GENERATE),
    "chat": lambda: rows_of("LLM.chat", arguments_of(LLM.chat), CHAT),
    "methods": lambda: rows_of("methods", members_of(LLM), METHODS),
    "request output": lambda: rows_of("RequestOutput", members_of(RequestOutput), REQUEST_OUTPUT),
    "completion output": lambda: rows_of(
        "CompletionOutput", members_of(CompletionOutput), COMPLETION_OUTPUT
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_those_of_the_code(name: str) -> None:
    page, new = PAGE.read_text(encoding="utf-8"), table(TABLES[name]())
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, after = page.index(begin) + len(begin), page.index(end)
    if os.environ.get("MULTILORA_UPDATE_DOCS"):
        PAGE.write_text(page[:before] + new + page[after:], encoding="utf-8")
    else:
        assert page[before:after] == new


def test_every_field_is_taken_at_vllms_default() -> None:
    kinds = {"CUMULATIVE": RequestOutputKind.CUMULATIVE}
    for name, default in SAMPLING.items():
        value = kinds.get(default, default) if isinstance(default, str) else default
        assert SamplingParams(**{name: value}) == SamplingParams(), name


def test_every_other_setting_is_refused_by_name() -> None:
    asks_for_more = object()
    for name, (inert, why) in vllm_settings.REFUSED.items():
        for value in inert:
            assert EngineConfig.from_kwargs(model="x", **{name: value}) == EngineConfig(model="x")
        with pytest.raises(ConfigError, match=re.escape(why)):
            EngineConfig.from_kwargs(model="x", **{name: asks_for_more})


def test_every_field_of_ours_has_its_meaning_in_the_docstring() -> None:
    for owner in (EngineConfig, SamplingParams):
        documented = re.findall(r"^        (\w+): ", owner.__doc__ or "", re.MULTILINE)
        assert documented == [field.name for field in dataclasses.fields(owner)]
