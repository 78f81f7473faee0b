"""`LLM` as a script of vLLM's uses it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from multilora import LLM, LoRARequest, RequestOutputKind, SamplingParams
from multilora.config.model import ModelConfig
from multilora.entrypoints import llm as llm_module
from multilora.errors import ConfigError, RequestError
from multilora.scheduling.policies import POLICIES
from multilora.tokenization import template_process
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.adapter_folders import write_adapter
from tests.harness.model_folders import write_checkpoint
from tests.harness.paths import UMA

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SETTINGS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 8, "enable_lora": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llm")
    shape = {"vocab_size": load_tokenizer(UMA / "base").vocab_size, "eos_token_ids": ()}
    write_checkpoint(root / "base", **shape)
    config = ModelConfig.from_dir(root / "base")
    for seed, name in enumerate(("a", "b")):
        write_adapter(root / name, config, seed=seed, scale=0.5)
    return root


@pytest.fixture(scope="module")
def llm(folders: Path) -> LLM:
    return LLM(str(folders / "base"), str(UMA / "base"), tensor_parallel_size=1, **SETTINGS)


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_a_lora_request_loads_its_folder_once(llm: LLM, folders: Path) -> None:
    request = LoRARequest("sql", 1, str(folders / "a"))
    (output,) = llm.generate("hello", GREEDY, lora_request=request)
    assert output.lora_request == request
    assert output.adapter == "sql"
    digest = llm.adapters["sql"].digest
    assert digest == llm.load_adapter("other", folders / "a")  # identity is content
    assert ids(llm.generate("hello", GREEDY, adapter="other")) == ids([output])
    versions = llm.engine.store
    before = versions.infos()["sql"]
    llm.generate("hello", GREEDY, lora_request=LoRARequest("sql", 7, str(folders / "a")))
    assert versions.infos()["sql"] == before


def test_another_folder_under_the_name_is_another_adapter(llm: LLM, folders: Path) -> None:
    first = llm.generate("hello", GREEDY, lora_request=LoRARequest("x", 1, str(folders / "a")))
    second = llm.generate("hello", GREEDY, lora_request=LoRARequest("x", 1, str(folders / "b")))
    assert ids(first) != ids(second)
    assert llm.adapters["x"].digest == llm.load_adapter("b", folders / "b")


def test_load_inplace_reads_the_folder_again(llm: LLM, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "a", tmp_path / "x")
    request = LoRARequest("live", 1, str(tmp_path / "x"))
    before = ids(llm.generate("hello", GREEDY, lora_request=request))
    shutil.copytree(folders / "b", tmp_path / "x", dirs_exist_ok=True)
    assert ids(llm.generate("hello", GREEDY, lora_request=request)) == before
    again = LoRARequest("live", 1, str(tmp_path / "x"), load_inplace=True)
    assert ids(llm.generate(["hello"] * 2, GREEDY, lora_request=again)) != before * 2


def test_a_list_of_lora_requests_is_one_for_each(llm: LLM, folders: Path) -> None:
    two = [LoRARequest("one", i, str(folders / name)) for i, name in enumerate("ab", 1)]
    with pytest.raises(RequestError, match="two prompts of one call name 'one'"):
        llm.generate(["hello", "hello"], GREEDY, lora_request=two)
    requests = [LoRARequest("a", 1, str(folders / "a")), None]
    mixed = llm.generate(["hello"] * 2, GREEDY, lora_request=requests)
    assert [output.lora_request for output in mixed] == requests
    assert ids(mixed)[1] == ids(llm.generate("hello", GREEDY))[0]
    with pytest.raises(RequestError, match="not both"):
        llm.generate("hello", GREEDY, adapter="a", lora_request=requests[0])
    with pytest.raises(RequestError, match="must be a LoRARequest"):
        llm.generate("hello", GREEDY, lora_request="a")  # type: ignore[arg-type]


def test_prompts_may_be_dicts(llm: LLM) -> None:
    tokens = llm.get_tokenizer().encode("hello there")
    dicts: list[Any] = [
        {"prompt": "hello there"},
        {"prompt_token_ids": tokens},
        {"prompt_token_ids": tokens, "prompt": "shown"},
    ]
    outputs = llm.generate(dicts, GREEDY)
    assert [output.prompt for output in outputs] == ["hello there", None, "shown"]
    assert [output.prompt_token_ids for output in outputs] == [tokens] * 3
    with pytest.raises(RequestError, match=r"'multi_modal_data', which is not supported"):
        llm.generate({"prompt": "x", "multi_modal_data": {}}, GREEDY)
    with pytest.raises(RequestError, match="a prompt is text"):
        llm.generate({}, GREEDY)


def test_chat_shows_the_rendered_prompt_and_takes_a_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, False)
    tokenizer = llm.get_tokenizer()
    assert output.prompt == tokenizer.render_chat_template(messages)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)  # type: ignore[call-arg]
    assert rendered == output.prompt
    assert ids(llm.generate(rendered, GREEDY)) == ids([output])
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (other,) = llm.chat(messages, GREEDY, chat_template=source)
    assert other.prompt == "[user] hi"
    named = llm.chat(messages, GREEDY, chat_template="default")
    assert named[0].prompt == output.prompt


def test_without_parameters_the_models_own_hold(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "base", tmp_path / "base")
    raw = {"temperature": 0.0, "max_new_tokens": 3}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(raw))
    settings = {**SETTINGS, "tokenizer": str(UMA / "base")}
    llm = LLM(tmp_path / "base", **settings)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=3)
    assert len(ids(llm.generate("hello"))[0]) == 3
    plain = LLM(tmp_path / "base", **settings, generation_config="vllm")
    assert plain.get_default_sampling_params() == SamplingParams()


def test_any_output_kind_gives_the_whole_answer(llm: LLM) -> None:
    whole = ids(llm.generate("hello", GREEDY))
    for kind in RequestOutputKind:
        assert ids(llm.generate("hello", GREEDY.clone(output_kind=kind))) == whole


def test_priorities_are_refused_until_a_policy_knows_them(llm: LLM) -> None:
    llm.generate(["a", "b"], GREEDY, priority=[0, 0])
    with pytest.raises(RequestError, match="requests have none here"):
        llm.generate(["a", "b"], GREEDY, priority=[0, 1])


def test_the_prefix_cache_can_be_forgotten(llm: LLM) -> None:
    prompt = list(range(30, 80))
    llm.generate(prompt, GREEDY)
    assert llm.generate(prompt, GREEDY)[0].num_cached_tokens > 0
    assert llm.reset_prefix_cache()
    assert llm.generate(prompt, GREEDY)[0].num_cached_tokens == 0
    llm.engine.add_request(prompt, GREEDY)
    llm.engine.step()
    assert not llm.reset_prefix_cache()
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()


def test_metrics_and_what_is_no_folder(llm: LLM) -> None:
    assert llm.get_metrics()["generated_tokens"] > 0
    with pytest.raises(ConfigError, match="tokenizer must be a folder"):
        LLM("base", {"a": "b"})  # type: ignore[arg-type]


def test_a_second_ctrl_c_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = llm.engine.add_request([5, 6], GREEDY)
    step, abort, steps = llm.engine.step, llm.engine.abort, iter(range(100))
    presses = iter([True, False, True, False, False])

    def interrupted_step() -> Any:
        found = step()
        if next(steps) == 1:
            raise KeyboardInterrupt
        return found

    def interrupted_abort(request_id: str) -> bool:
        if next(presses, False):
            raise KeyboardInterrupt
        return abort(request_id)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted_step)
        patch.setattr(llm.engine, "abort", interrupted_abort)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b", "c"], GREEDY.clone(max_tokens=50))
    assert set(llm.engine.request_ids) <= {mine}
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()


def test_a_chat_is_rendered_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ask = [], template_process.PROCESS.ask

    def counted(*request: Any) -> Any:
        asked.append(request)
        return ask(*request)

    monkeypatch.setattr(template_process.PROCESS, "ask", counted)
    llm.chat([{"role": "user", "content": "hi"}], GREEDY, False)
    assert len(asked) == 1


def test_a_policy_that_admits_nobody_is_named(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nobody:
        def order(self, *_: object) -> list[Any]:
            return []

    monkeypatch.setitem(POLICIES, "nobody", Nobody())
    monkeypatch.setattr(llm_module, "MAX_IDLE", 0.05)
    stuck = LLM(str(folders / "base"), str(UMA / "base"), policy="nobody", **SETTINGS)
    with pytest.raises(ConfigError, match="policy 'nobody' has admitted none of 2 waiting"):
        stuck.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert not stuck.engine.has_work
