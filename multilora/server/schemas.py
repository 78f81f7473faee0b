"""What clients send. A field that nobody reads is an error that names it, never ignored.

Long lists and objects are looked at by ourselves and give one error: pydantic's own would be one
for each item and each member of a union, seconds of the event loop for a body of a megabyte.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from ..errors import shown

# Fields of OpenAI's and vLLM's that we do not have: the values that ask for nothing, and why no
# more. `docs/serving.md` lists them.
NOTHING: tuple[Any, ...] = (None,)
TEXT_ONLY = "prompts and answers are text"
LATER = "it is not there yet"
MAX_PROMPTS = 2**16  # whatever the settings say: more are not even looked at
INERT: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((None, 1), "ask for n answers and compare their logprobs"),
    "suffix": ((None, ""), "no Llama fills in"),
    "tools": ((None, []), LATER),
    "tool_choice": ((None, "none"), LATER),
    "parallel_tool_calls": ((None, True, False), LATER),
    "functions": ((None, []), LATER),
    "function_call": ((None, "none"), LATER),
    "response_format": ((None, {"type": "text"}), LATER),
    "structured_outputs": (NOTHING, LATER),
    "guided_json": (NOTHING, LATER),
    "guided_regex": (NOTHING, LATER),
    "guided_choice": (NOTHING, LATER),
    "guided_grammar": (NOTHING, LATER),
    "modalities": ((None, ["text"]), TEXT_ONLY),
    "audio": (NOTHING, TEXT_ONLY),
    "prompt_embeds": (NOTHING, TEXT_ONLY),
    "prediction": (NOTHING, "there is no speculation"),
    "web_search_options": (NOTHING, "the server asks nobody else"),
    "reasoning_effort": (NOTHING, "there is no model here whose thinking is marked"),
    "verbosity": (NOTHING, "say it in a message"),
    "store": ((None, False), "nothing is kept"),
    "metadata": ((None, {}), "nothing is kept"),
    "service_tier": ((None, "auto", "default"), "all requests are served alike"),
    "priority": ((None, 0), "all requests are served alike"),
    "cache_salt": (NOTHING, LATER),
    "prompt_cache_key": (NOTHING, "prefixes are found by content"),
    "truncate_prompt_tokens": (NOTHING, "cut the prompt before you send it"),
    "chat_template": (NOTHING, "a template comes with the model"),
    "documents": (NOTHING, "give them in chat_template_kwargs"),
    "use_beam_search": ((None, False), "there is no beam search"),
    "length_penalty": ((None, 1.0), "there is no beam search"),
    "spaces_between_special_tokens": (
        (None, True, False),
        "no tokenizer of a Llama makes a difference of it",
    ),
    "return_tokens_as_token_ids": ((None, False), "use return_token_ids"),
    "logits_processors": ((None, []), "no code comes over HTTP"),
    "vllm_xargs": ((None, {}), "there is nothing that reads them"),
    "kv_transfer_params": ((None, {}), "KV stays in its engine"),
}


def _is(value: object, inert: object) -> bool:
    return type(value) is type(inert) and value == inert


def _wrong(what: str) -> PydanticCustomError:
    return PydanticCustomError("wrong_type", "it should be {what}", {"what": what})


def _is_list(value: object, kind: type) -> bool:
    return type(value) is list and set(map(type, value)) <= {kind}


def _prompt(value: Any) -> Any:
    if isinstance(value, str) or _is_list(value, int) or _is_list(value, str):
        return value
    is_short = _is_list(value, list) and len(value) <= MAX_PROMPTS
    if is_short and all(_is_list(one, int) for one in value):
        return value
    raise _wrong("a text, a list of token ids, or a list of either")


def _stop(value: Any) -> Any:
    if isinstance(value, str) or _is_list(value, str):
        return value
    raise _wrong("a text or a list of texts")


def _ids(value: Any) -> Any:
    if _is_list(value, int):
        return value
    raise _wrong("a list of token ids")


def _texts(value: Any) -> Any:
    if _is_list(value, str):
        return value
    raise _wrong("a list of texts")


def _messages(value: Any) -> Any:
    if value and _is_list(value, dict):
        return value
    raise _wrong("a list of one message or more")


def _numbers(value: Any) -> Any:
    if type(value) is dict and set(map(type, value.values())) <= {int, float}:
        return value
    raise _wrong("an object of numbers")


PromptField = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
Stop = Annotated[str | list[str], PlainValidator(_stop)]
TokenIds = Annotated[list[int], PlainValidator(_ids)]
Texts = Annotated[list[str], PlainValidator(_texts)]
Messages = Annotated[list[dict[str, Any]], PlainValidator(_messages)]
Numbers = Annotated[dict[str, float], PlainValidator(_numbers)]


class Body(BaseModel):
    """A request's JSON object: exact types, known fields, and null for what is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_inert(cls, given: Any) -> Any:
        """Takes out fields of others that ask for nothing; an error for those that ask for more."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields:
                kept[name] = value
                continue
            values, why = INERT.get(name, ((), ""))
            if not any(_is(value, one) for one in values):
                text = f"{name}={shown(value)} is not supported: {why}"
                if name not in INERT:
                    text = f"{shown(name)} is no field that is known here; leave it out"
                raise PydanticCustomError(
                    "unsupported_field", "{message}", {"message": text, "field": name[:100]}
                )
        return kept


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # random letters against who counts bytes: none here


class GenerationBody(Body):
    """What a completion and a chat have in common. Ranges are checked by `SamplingParams`."""

    model: str | None = None
    adapter_weights: Numbers | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # an identifier that asks for nothing
    safety_identifier: str | None = None  # another

    n: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Numbers | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Texts | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    stream_interval: int | None = None
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody):
    """Of `/v1/completions`."""

    prompt: PromptField
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None


class ChatBody(GenerationBody):
    """Of `/v1/chat/completions`."""

    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(Body):
    """Of `/tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Of `/detokenize`."""

    model: str | None = None
    tokens: TokenIds


class LoadAdapterBody(Body):
    """Of `/v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadAdapterBody(Body):
    """Of `/v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None  # vLLM's number of an adapter: names are unique here
