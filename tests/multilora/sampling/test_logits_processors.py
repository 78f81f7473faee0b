"""What a request does to its logits. Oracle of the penalties: transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora.errors import RequestError
from multilora.sampling.logits_processors import BadWords
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.model_folders import write_checkpoint
from tests.harness.paths import UMA
from tests.harness.sampler_calls import make_logits, make_row, reachable, sample
from tests.harness.tiny_engines import Job, facts, greedy, make_engine, prompt_of, run

if TYPE_CHECKING:
    from torch import Tensor

    from multilora.engine.engine import Engine

TOKENIZER = UMA / "base"
PROMPT = prompt_of(20)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["host", "device"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("writer")
    write_checkpoint(root, vocab_size=load_tokenizer(TOKENIZER).vocab_size, eos_token_ids=())
    settings: dict[str, Any] = {"skip_tokenizer_init": False, "tokenizer": str(TOKENIZER)}
    return make_engine(root, async_scheduling=request.param, **settings)


def answer(engine: Engine, **fields: Any) -> Any:
    return run(engine, [Job(PROMPT, greedy(**{"max_tokens": 12, **fields}))])[0].outputs[0]


# Bad words


def test_only_a_token_that_completes_a_word_is_impossible() -> None:
    words = [[5], [1, 6], [2, 1, 6], [9, 9, 7], [1, 8]]
    processor = BadWords(words, [4, 2], 10, CPU)

    def forbidden() -> list[int]:
        logits = torch.zeros(10)
        processor.apply_(logits)
        return (logits == -torch.inf).nonzero()[:, 0].tolist()

    assert forbidden() == [5]
    processor.update(torch.tensor([1]))
    assert forbidden() == [5, 6, 8]
    processor.update(torch.tensor([9]))
    assert forbidden() == [5]
    processor.update(torch.tensor([9]))
    assert forbidden() == [5, 7]


def test_a_word_of_one_token_needs_no_history() -> None:
    logits = torch.arange(4.0)
    BadWords([[2]], [], 4, CPU).apply_(logits)
    assert logits.tolist() == [0, 1, -torch.inf, 3]


@pytest.mark.parametrize("temperature", [0, 1])
def test_bad_words_are_never_generated(engine: Engine, temperature: float) -> None:
    """One after the other, what the model wants to say is forbidden."""
    tokenizer = load_tokenizer(TOKENIZER)
    forbidden: dict[int, str] = {}
    for _ in range(4):
        words = list(forbidden.values())
        found = answer(engine, bad_words=words, temperature=temperature, seed=1).token_ids
        assert not forbidden.keys() & set(found)
        for token in found:
            word = tokenizer.decode([token]).strip()
            if word and tokenizer.encode(f" {word}", add_special_tokens=False) == [token]:
                forbidden[token] = word
                break
    assert len(forbidden) > 1


def test_a_preempted_answer_remembers_its_tokens(engine: Engine) -> None:
    text = answer(engine).text
    word = next(word for word in text.split() if len(word) > 2)
    alone = answer(engine, bad_words=[word])
    tight = make_engine(
        engine.config.model,  # type: ignore[arg-type]
        skip_tokenizer_init=False,
        tokenizer=str(TOKENIZER),
        num_kv_blocks=5,
        max_model_len=64,
        block_size=8,
        async_scheduling=engine.config.async_scheduling,
    )
    jobs = [Job(PROMPT, greedy(12, bad_words=[word])), Job(prompt_of(12, seed=3), greedy(20))]
    found = run(tight, jobs)
    assert tight.stats.preemptions > 0
    assert found[0].outputs[0].token_ids == alone.token_ids


# Callers' own


def only(wanted: int) -> Any:
    def processor(output_ids: list[int], logits: Tensor) -> Tensor:
        return torch.where(
            torch.arange(len(logits)) == wanted + len(output_ids), logits, -torch.inf
        )

    return processor


def test_a_callers_function_decides(engine: Engine) -> None:
    assert answer(engine, logits_processors=[only(50)]).token_ids == list(range(50, 62))


def test_it_may_see_the_prompt_and_change_in_place(engine: Engine) -> None:
    seen = []

    def processor(prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
        seen.append((tuple(prompt_ids), len(output_ids)))
        logits[:] = -torch.inf
        logits[prompt_ids[len(output_ids)]] = 0
        return logits

    assert answer(engine, logits_processors=[processor]).token_ids == list(PROMPT[:12])
    assert seen == [(PROMPT, i) for i in range(12)]


def test_several_apply_in_order(engine: Engine) -> None:
    def keep(_: list[int], logits: Tensor) -> Tensor:
        return logits.clamp(min=-1)

    def shift(_: list[int], logits: Tensor) -> Tensor:
        return logits.roll(1)

    plain = answer(engine, max_tokens=1).token_ids[0]
    found = answer(engine, max_tokens=1, logits_processors=[keep, shift]).token_ids[0]
    assert found == plain + 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda ids, logits: None, "a logits processor must return logits"),
        (lambda ids, logits: logits[:3], "a logits processor must return logits"),
        (lambda ids, logits: 1 / 0, "ZeroDivisionError"),
        (lambda ids, logits: logits * float("nan"), "logits"),
        (lambda ids, logits: logits.fill_(-torch.inf), "no token is possible"),
    ],
)
def test_a_bad_function_ends_its_request_alone(engine: Engine, function: Any, reason: str) -> None:
    neighbour = Job(prompt_of(9), greedy(8))
    alone = facts(run(engine, [neighbour])[0])
    found = run(engine, [Job(PROMPT, greedy(8, logits_processors=[function])), neighbour])
    assert found[0].outputs[0].finish_reason == "error"
    assert found[0].error is not None
    assert reason in found[0].error
    assert facts(found[1]) == alone


def test_a_function_of_other_arguments_is_refused(engine: Engine) -> None:
    for wrong in (lambda logits: logits, lambda a, b, c, d: d, dict):
        with pytest.raises(RequestError, match="output ids, logits"):
            engine.add_request(PROMPT, greedy(2, logits_processors=[wrong]))


# -- masks, bias, penalties --
def test_only_allowed_tokens_are_chosen() -> None:
    logits = make_logits(1, 30)[0]
    allowed = [3, 17, 17, 29]
    assert reachable(logits, draws=600, temperature=5.0, allowed_token_ids=allowed) == {3, 17, 29}
    best = max(allowed, key=lambda i: float(logits[i]))
    assert reachable(logits, draws=1, temperature=0, allowed_token_ids=allowed) == {best}


def test_logit_bias_moves_the_greedy_choice() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    row = make_row(temperature=0, logit_bias={0: -1.5, 2: 0.75, 3: 1.0})
    assert sample(logits, [row])[0].token == 1
    assert sample(logits, [make_row(temperature=0, logit_bias={3: 100})])[0].token == 3


def test_stop_ids_wait_for_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0]])
    for outputs, expected in ((0, 2), (1, 2), (2, 0)):
        row = make_row(
            output=[2] * outputs, stop=frozenset({0, 1}), temperature=0, min_tokens=2, max_tokens=9
        )
        assert sample(logits, [row])[0].token == expected


def test_repetition_penalty_agrees_with_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    prompt, output = [1, 5, 5, 9], [9, 12]
    oracle = processors.RepetitionPenaltyLogitsProcessor(penalty=1.8)
    for seed in range(30):
        logits = make_logits(1, 16, seed)
        expected = oracle(torch.tensor([prompt + output]), logits.clone())
        row = make_row(prompt, output, temperature=0, repetition_penalty=1.8)
        assert sample(logits, [row])[0].token == int(expected.argmax())


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([[3.0, 2.6, 2.2, 0.0]])
    history: dict[str, Any] = {"prompt": [2, 2, 2], "output": [0, 0, 1], "temperature": 0}
    for presence, frequency, expected in (
        (0.0, 0.0, 0),
        (0.3, 0.0, 0),  # 2.7 2.3 2.2
        (0.9, 0.0, 2),  # 2.1 1.7 2.2
        (0.0, 0.3, 0),  # 2.4 2.3 2.2
        (0.0, 0.35, 0),  # 2.3 2.25 2.2
        (0.0, 0.39, 0),  # 2.22 2.21 2.2
        (0.0, 0.45, 2),  # 2.1 2.15 2.2
        (-1.0, 0.7, 1),  # 2.6 2.9 2.2
    ):
        row = make_row(**history, presence_penalty=presence, frequency_penalty=frequency)
        assert sample(logits, [row])[0].token == expected, (presence, frequency)


def test_penalties_leave_the_given_logits_alone() -> None:
    logits = make_logits(1, 20)
    before = logits.clone()
    everything: dict[str, Any] = {
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "logit_bias": {1: 3.0},
        "allowed_token_ids": [1, 2],
        "min_tokens": 3,
    }
    sample(logits, [make_row([1], [2], stop=frozenset({2}), **everything)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", [{"logit_bias": {8: 1.0}}, {"allowed_token_ids": [8]}])
def test_ids_outside_the_vocabulary_are_our_own_bug(params: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="out of vocabulary"):
        sample(torch.zeros(1, 8), [make_row(**params)])
