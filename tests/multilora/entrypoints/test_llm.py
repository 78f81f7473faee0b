"""Offline inference: shapes of what goes in, order of what comes out, and what is refused."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from multilora.entrypoints.demo import EXPERTS, load, load_scene, run_batch
from multilora.entrypoints.llm import LLM
from multilora.errors import AdapterInvalid, AdapterNotFound, ConfigError, RequestError
from multilora.sampling_params import SamplingParams
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import TINY, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 20]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SETTINGS = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llm")
    write_checkpoint(root / "base")
    write_adapter(root / "a", TINY, seed=1, scale=0.5)
    write_adapter(root / "b", TINY, seed=2, scale=0.5, rank=16)
    return root


@pytest.fixture(scope="module")
def llm(folders: Path) -> LLM:
    adapters = {"a": folders / "a", "b": folders / "b"}
    return LLM(folders / "base", adapters=adapters, **SETTINGS)


@pytest.fixture(scope="module")
def uma() -> LLM:
    return load()


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_results_come_in_the_order_of_the_prompts_though_they_finish_in_another(llm: LLM) -> None:
    lengths = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 2, 5)]
    outputs = llm.generate(PROMPTS, lengths)
    assert [o.prompt_token_ids for o in outputs] == PROMPTS
    assert [len(tokens) for tokens in ids(outputs)] == [9, 2, 5]
    assert all(o.finished for o in outputs)


def test_a_list_of_ints_is_one_prompt(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS[0], GREEDY)
    assert [o.prompt_token_ids for o in outputs] == [PROMPTS[0]]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_one_batch_of_several_adapters_answers_as_each_alone(llm: LLM) -> None:
    mix = {"a": 0.7, "b": 0.3}
    specs: list[Any] = ["a", None, mix]
    together = ids(llm.generate([PROMPTS[0]] * 3, GREEDY, adapter=specs))
    alone = [ids(llm.generate([PROMPTS[0]], GREEDY, adapter=spec))[0] for spec in specs]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 3


def test_one_adapter_or_mix_serves_all_prompts(llm: LLM) -> None:
    for spec in ("a", {"a": 0.5, "b": 0.5}):
        outputs = llm.generate(PROMPTS, GREEDY, adapter=spec)
        assert [o.adapter for o in outputs] == [spec] * 3


def test_default_parameters_give_sixteen_tokens_at_most(llm: LLM) -> None:
    (output,) = llm.generate([PROMPTS[0]])
    assert 1 <= len(output.outputs[0].token_ids) <= 16


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"adapter": ["a"]}, "adapter has 1 entries for 3 prompts"),
        ({"sampling_params": [GREEDY] * 4}, "sampling_params has 4 entries for 3 prompts"),
        ({"sampling_params": {"temperature": 0}}, "must be SamplingParams"),
        ({"sampling_params": [GREEDY, None, 3]}, "must be SamplingParams"),
    ],
)
def test_lists_that_do_not_fit_the_prompts_are_refused(
    llm: LLM, kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate(PROMPTS, **kwargs)


@pytest.mark.parametrize("prompts", [7, [1, "two"], [1, True], ["one", 2], [[1], 3.5], None, {1}])
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.has_work


def test_a_refused_prompt_aborts_those_before_it(llm: LLM) -> None:
    with pytest.raises(AdapterNotFound, match="nobody"):
        llm.generate(PROMPTS, GREEDY, adapter=["a", "b", "nobody"])
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()
    assert llm.engine.memory()["kv"] == 0


def test_an_interrupt_aborts_everything(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = llm.engine.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, adapter="a")
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()
    assert llm.engine.memory()["kv"] == 0
    assert len(ids(llm.generate(PROMPTS, GREEDY, adapter="a"))) == 3


def test_adapters_come_and_go(llm: LLM, folders: Path) -> None:
    digest = llm.load_adapter("c", folders / "b")
    assert llm.adapters["c"].digest == digest == llm.adapters["b"].digest
    with_c = ids(llm.generate(PROMPTS, GREEDY, adapter="c"))
    assert with_c == ids(llm.generate(PROMPTS, GREEDY, adapter="b"))
    llm.unload_adapter("c")
    assert set(llm.adapters) == {"a", "b"}
    with pytest.raises(AdapterNotFound):
        llm.unload_adapter("c")


def test_an_unknown_setting_names_the_known_ones(folders: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gpu_memory'.*max_num_seqs"):
        LLM(folders / "base", gpu_memory=1)


def test_an_adapter_that_is_not_there_is_refused_at_the_start(folders: Path) -> None:
    with pytest.raises(AdapterInvalid, match="no such folder"):
        LLM(folders / "base", adapters={"x": folders / "x"}, **SETTINGS)


def test_chat_without_a_tokenizer_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_a_progress_bar_counts_prompts_and_tokens_on_a_terminal(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    llm.generate(PROMPTS, GREEDY)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "tokens/s" in shown


# With a tokenizer ---------------------------------------------------------------------------------


@pytest.mark.seconds
def test_text_prompts_are_encoded_and_answers_decoded(uma: LLM) -> None:
    (output,) = uma.generate("## Job post", GREEDY)
    assert uma.engine.tokenizer is not None
    assert output.prompt == "## Job post"
    assert output.prompt_token_ids == uma.engine.tokenizer.encode("## Job post")
    assert output.outputs[0].text == uma.engine.tokenizer.decode(output.outputs[0].token_ids)


@pytest.mark.seconds
def test_chat_takes_one_conversation_or_many(uma: LLM) -> None:
    one = [{"role": "user", "content": load_scene(1).prompts["feedback"]}]
    params = SamplingParams(temperature=0, max_tokens=8)
    single = uma.chat(one, params, adapter="feedback")
    double = uma.chat([one, one], params, adapter=["feedback", None])
    assert len(single) == 1
    assert ids(double)[0] == ids(single)[0] != ids(double)[1]
    assert single[0].outputs[0].text.startswith("To improve")


@pytest.mark.parametrize("messages", ["hello", [1], ["hello"], [{"role": "user"}, []], 5])
def test_what_is_no_conversation_is_refused(uma: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="message"):
        uma.chat(messages, GREEDY)


def test_a_batch_that_is_not_read_to_its_end_is_aborted(uma: LLM) -> None:
    states = run_batch(uma, load_scene(1).prompts, GREEDY)
    assert set(next(states).outputs) <= set(EXPERTS)
    states.close()  # type: ignore[attr-defined]
    while uma.engine.has_work:
        uma.engine.step()
    assert uma.engine.memory()["kv"] == 0
