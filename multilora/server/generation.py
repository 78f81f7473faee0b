"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..errors import RequestError
from ..sampling_params import SamplingParams
from .errors import HttpError, http_error, internal, logger
from .forms import AnswerForm, ChatForm, CompletionForm, Usage
from .parameters import chat_params, completion_params
from .schemas import ChatBody, CompletionBody, GenerationBody
from .state import ServerState, state_of
from .streaming import DONE, ClientGoneError, EventStream, event, merged, unless_gone

if TYPE_CHECKING:
    from ..adapters.mix import AdapterSpec
    from ..outputs import RequestOutput

routes = APIRouter()
Prompt = str | Sequence[int] | Mapping[str, Any]
GONE = Response(status_code=499)  # which nobody reads


@routes.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Goes on with prompts: texts or token ids."""
    state = state_of(request)
    spec = await state.adapter(body.model, body.adapter_weights)
    params = completion_params(body, state.engine.get_default_sampling_params())
    prompts = _prompts(body.prompt)
    if len(prompts) > state.settings.max_prompts:
        raise RequestError(
            f"{len(prompts)} prompts in one request, and {state.settings.max_prompts} may be; "
            "send several requests"
        )
    texts, firsts = await _echoed(state, prompts) if body.echo else ([], [])
    form = CompletionForm(body.model or state.served[0], params, body, texts, firsts)
    return await _answer(Generation(state, form, prompts, params, spec), body, request)


@routes.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answers a conversation."""
    state = state_of(request)
    spec = await state.adapter(body.model, body.adapter_weights)
    params = chat_params(body, state.engine.get_default_sampling_params())
    text, ids = await state.chat_prompt(
        body.messages, body.chat_template_kwargs, spec, **template_options(body)
    )
    prompts: list[Prompt] = [{"prompt": text, "prompt_token_ids": ids}]
    form = ChatForm(body.model or state.served[0], params, body)
    return await _answer(Generation(state, form, prompts, params, spec), body, request)


def template_options(body: Any) -> dict[str, bool]:
    """How a conversation is rendered, of a body that says so."""
    options = ("add_generation_prompt", "continue_final_message")
    return {name: value for name in options if (value := getattr(body, name)) is not None}


class Generation:
    """The prompts of one HTTP request on their way through the engine."""

    def __init__(
        self,
        state: ServerState,
        form: AnswerForm,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        spec: AdapterSpec,
    ) -> None:
        self._state, self.form, self._num_prompts = state, form, len(prompts)
        self.usage = Usage(len(prompts))
        self._reasons: list[list[str]] = [[] for _ in prompts]
        self._times = [0.0] * len(prompts)  # of the newest token of each
        generate = state.engine.generate
        self._source = merged(
            [
                generate(prompt, params, f"{form.id}-{i}", adapter=spec)
                for i, prompt in enumerate(prompts)
            ]
        )

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """All outputs, counted. A request that failed in the engine is an HttpError."""
        async with aclosing(self._source) as source:
            async for place, output in source:
                self._count(place, output)
                if output.error is not None:
                    logger.error("request %s failed: %s", output.request_id, output.error)
                    raise internal(f"request {output.request_id} failed")
                yield place, output

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        found: dict[int, RequestOutput] = {}
        async with aclosing(self.outputs()) as outputs:
            async for place, output in outputs:
                found[place] = output
        ordered = [found[place] for place in range(self._num_prompts)]
        return self.form.whole(ordered, self.usage)

    def _count(self, place: int, output: RequestOutput) -> None:
        metrics, before = self._state.metrics, self.usage.num_tokens(place)
        self.usage.see(place, output)
        ended = [answer.finish_reason for answer in output.outputs]
        self._reasons[place] += [reason for reason in ended if reason is not None]
        new = self.usage.num_tokens(place)
        if output.metrics is not None:
            last, now = self._times[place], output.metrics.last_token_ts
            if last and new > before:
                metrics.gap(output.adapter, now - last)
            self._times[place] = now
        if output.finished:
            metrics.ended(output, self._reasons[place], new)


async def _answer(generation: Generation, body: GenerationBody, request: Request) -> Response:
    """What is wrong with a request is known at its first output: streams begin with that."""
    receive = request.receive
    try:
        if not body.stream:
            return JSONResponse(await unless_gone(receive, generation.whole()))
        outputs = generation.outputs()
        first = await unless_gone(receive, anext(outputs))
    except ClientGoneError:
        return GONE
    options = body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    return EventStream(_events(generation, first, outputs, with_usage))


async def _events(
    generation: Generation,
    first: tuple[int, RequestOutput],
    others: AsyncGenerator[tuple[int, RequestOutput], None],
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """A chunk for all that is new; an error that comes late is the last but one event."""
    head = generation.form.head(is_chunk=True)
    empty: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        async with aclosing(others):
            yield _chunks(generation.form, head, empty, *first)
            async for place, output in others:
                if chunks := _chunks(generation.form, head, empty, place, output):
                    yield chunks
        if with_usage:
            usage = generation.usage.body(is_unseen=generation.form.is_unseen)
            yield event({**head, "choices": [], "usage": usage})
    except Exception as error:
        yield event(http_error(error).body())
    yield DONE


def _chunks(
    form: AnswerForm, head: dict[str, Any], empty: dict[str, Any], place: int, output: RequestOutput
) -> bytes:
    """The events of one output, as one piece for the socket."""
    choices = [
        form.choice(place, output, answer, is_chunk=True)
        for answer in output.outputs
        if form.tells(answer)
    ]
    return b"".join(event({**head, "choices": [choice], **empty}) for choice in choices)


def _prompts(given: str | list[Any]) -> list[Prompt]:
    """One prompt or many; a list of numbers is one."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise HttpError(400, "prompt is empty; give a text or token ids", param="prompt")
    return [given] if isinstance(given[0], int) else given


async def _echoed(state: ServerState, prompts: Sequence[Prompt]) -> tuple[list[str], list[str]]:
    """The texts of prompts, and of their first tokens."""
    if state.engine.tokenizer is None:
        raise RequestError("echo needs a tokenizer, and this server has none")
    decode, texts, firsts = state.tokenizer.decode, [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            texts.append(prompt)
            ids = await state.beside(encode_prompt, state, prompt)
        else:
            ids = [token for token in prompt if isinstance(token, int) and 0 <= token < 2**31]
            texts.append(await state.beside(decode, ids, skip_special_tokens=False))
        firsts.append(decode(ids[:1], skip_special_tokens=False))
    return texts, firsts


def encode_prompt(state: ServerState, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The ids that the engine makes of a text."""
    if state.engine.config.split_special_tokens:
        return state.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return state.tokenizer.encode_with_special(text, add_special_tokens=add_special_tokens)
