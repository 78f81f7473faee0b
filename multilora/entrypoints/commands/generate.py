"""`multilora generate`: answers prompts."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import MultiloraError, RequestError
from . import options
from .prompt_source import Asked, read_prompts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ...outputs import CompletionOutput, RequestOutput
    from ...sampling_params import SamplingParams
    from ..llm import LLM

OUTPUTS = ("text", "jsonl")
SAMPLING = ("n", "max_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed")
SETTINGS = (
    *("dtype", "quantization", "quantization_group_size", "kv_cache_dtype", "device"),
    *("load_format", "max_model_len", "max_num_seqs", "max_loras", "max_lora_rank", "lora_pages"),
    *("num_kv_blocks", "gpu_memory_utilization"),
)
Prompts = Annotated[list[str] | None, typer.Option(help="A prompt; repeat for more.")]
PromptFile = Annotated[
    str | None, typer.Option(help="One prompt a line, or .jsonl; - or nothing: stdin.")
]
Output = Annotated[str, typer.Option(help="text, or jsonl: an object a line.")]
Adapters = Annotated[list[str] | None, typer.Option(help="name=folder to load; repeat for more.")]
Use = Annotated[
    list[str] | None,
    typer.Option(help="Adapter to answer with; name=weight, repeated, mixes several."),
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; repeat for more.")]


def generate(
    model: Annotated[str, typer.Argument(help="Folder of the base checkpoint.")],
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    output: Output = "text",
    adapter: Adapters = None,
    use: Use = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Answers to each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens to sample from; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Nucleus to sample from.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least share of the likeliest token's.")] = 0.0,
    stop: Stop = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    chat: Annotated[bool, typer.Option(help="Prompts are user messages.")] = True,
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    quantization_group_size: options.GroupSize = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    device: options.Device = "cpu",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    num_kv_blocks: options.NumKVBlocks = None,
    max_loras: options.MaxLoras = None,
    max_lora_rank: options.MaxLoraRank = None,
    lora_pages: options.LoraPages = None,
    gpu_memory_utilization: options.MemoryShare = None,
) -> None:
    """Answers prompts; a single answer is streamed."""
    given = {name: value for name, value in locals().items() if value is not None}
    if output not in OUTPUTS:
        raise RequestError(f"--output must be {' or '.join(OUTPUTS)}, not {output!r}")
    folders = _parse_adapters(adapter or [])
    asked = read_prompts(prompt or [], prompt_file, _parse_use(use or []), folders)
    _run(asked, folders, given)


def _run(asked: Sequence[Asked], folders: Mapping[str, str], given: Mapping[str, Any]) -> None:
    from ...sampling_params import SamplingParams
    from ..llm import LLM

    params = SamplingParams(**{name: given[name] for name in SAMPLING if name in given})
    settings = {name: given[name] for name in SETTINGS if name in given}
    llm = LLM(given["model"], adapters=folders, **settings)
    prompts = [_prompt(llm, one, given["chat"]) for one in asked]
    if given["output"] == "text" and len(prompts) == params.n == 1:
        failed = _stream(llm, asked[0], prompts[0], params)
    else:
        failed = _show(llm, asked, prompts, params, given["output"] == "jsonl")
    if failed:
        raise SystemExit(1)


def _prompt(llm: LLM, asked: Asked, chat: bool) -> str | list[int]:
    """What the engine takes: a conversation's tokens, or text."""
    if isinstance(asked.content, str) and not chat:
        return asked.content
    messages = asked.content
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    with _told(asked):
        longest = llm.engine.max_model_len - 1  # and one new token
        return llm.get_tokenizer().apply_chat_template(messages, max_length=longest)


@contextmanager
def _told(asked: Asked) -> Iterator[None]:
    """Errors within say which line of a file they are about."""
    try:
        yield
    except MultiloraError as error:
        if not asked.place:
            raise
        raise RequestError(f"{asked.place}: {error}") from error


def _stream(llm: LLM, asked: Asked, prompt: str | list[int], params: SamplingParams) -> bool:
    """Prints the one answer as it grows; whether it failed."""
    with _told(asked):
        request_id = llm.engine.add_request(prompt, params, adapter=asked.adapter)
    shown, error = 0, None
    try:
        while llm.engine.has_work:
            for output in llm.engine.step():
                text, error = output.outputs[0].text, output.error
                print(text[shown:], end="", flush=True)
                shown = len(text)
    finally:
        llm.engine.abort(request_id)  # does nothing to a finished one
    print()
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
    return error is not None


def _show(
    llm: LLM,
    asked: Sequence[Asked],
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    as_json: bool,
) -> bool:
    """Prints the answers in the order of the prompts, as soon as can be; whether one failed."""
    failed = False
    for one, output in zip(asked, _answers(llm, asked, prompts, params), strict=True):
        failed |= output.error is not None
        for answer in output.outputs:
            if as_json:
                print(json.dumps(_record(one, output, answer), ensure_ascii=False), flush=True)
                continue
            which = f" ({answer.index + 1} of {params.n})" if params.n > 1 else ""
            print(f"== {one.title}{which} ==\n{answer.text}\n", flush=True)
        if output.error is not None and not as_json:
            print(f"error: {one.title}: {output.error}", file=sys.stderr)
    return failed


def _answers(
    llm: LLM, asked: Sequence[Asked], prompts: Sequence[str | list[int]], params: SamplingParams
) -> Iterator[RequestOutput]:
    """In the order of the prompts; what cannot be accepted is an error before the first."""
    from ...sampling_params import RequestOutputKind
    from ..progress import Progress

    last = params.clone(output_kind=RequestOutputKind.FINAL_ONLY)
    places = dict[str, int]()
    for one, prompt in zip(asked, prompts, strict=True):
        with _told(one):
            request_id = llm.engine.add_request(prompt, last, adapter=one.adapter)
        places[request_id] = len(places)
    done: dict[int, RequestOutput] = {}
    next_ = 0
    try:
        with Progress(len(places), not sys.stdout.isatty()) as progress:  # not amid the answers
            while llm.engine.has_work:
                for output in llm.engine.step():
                    progress.update(output)
                    done[places[output.request_id]] = output
                while next_ in done:
                    yield done.pop(next_)
                    next_ += 1
    finally:
        for request_id in places:
            llm.engine.abort(request_id)  # does nothing to a finished one


def _record(asked: Asked, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any]:
    """A line of `--output jsonl`."""
    return {
        "prompt" if isinstance(asked.content, str) else "messages": asked.content,
        "adapter": asked.adapter,
        "index": answer.index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "completion_tokens": len(answer.token_ids),
        "error": output.error,
    }


def _parse_adapters(pairs: Sequence[str]) -> dict[str, str]:
    """name -> folder, from "name=folder"."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder:
            raise RequestError(f"--adapter must be name=folder, not {pair!r}")
        if name in found:
            raise RequestError(f"--adapter gives {name!r} twice; use two names")
        found[name] = folder
    return found


def _parse_use(pairs: Sequence[str]) -> str | Mapping[str, float] | None:
    """A name, a mix from "name=weight" (weight 1 if absent), or the base."""
    if not pairs:
        return None
    if len(pairs) == 1 and "=" not in pairs[0]:
        return pairs[0]
    mix: dict[str, float] = {}
    for pair in pairs:
        name, equals, weight = pair.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            raise RequestError(f"--use must be name or name=weight, not {pair!r}") from None
        if name in mix:
            raise RequestError(f"--use gives {name!r} twice; add the weights")
        mix[name] = value
    return mix
