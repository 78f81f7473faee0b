"""`multilora generate`: what it answers, from where its prompts come, and how it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from multilora.engine.engine import Engine
from multilora.entrypoints import demo
from multilora.entrypoints.commands import generate as command
from tests.harness.command_line import run

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = demo.load_scene(1).prompts["feedback"]
ANSWER = demo.load_scene(1).answers["feedback"]


def generate_args(*more: object) -> list[object]:
    with demo.assets() as folder:
        adapter = f"feedback={folder / 'adapters' / 'feedback'}"
        return ["generate", folder / "base", "--adapter", adapter, *more]


@pytest.mark.seconds
def test_generate_streams_an_adapters_answer(capsys: pytest.CaptureFixture[str]) -> None:
    args = generate_args("--prompt", PROMPT, "--use", "feedback", "--max-tokens", 12)
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    assert len(out) > 20
    assert ANSWER.startswith(out.rstrip("\n"))


@pytest.mark.seconds
def test_generate_quantizes_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    args = generate_args("--prompt", PROMPT, "--use", "feedback", "--max-tokens", 4)
    options = ("--quantization", "int4", "--quantization-group-size", "128")
    options += ("--kv-cache-dtype", "int8")
    code, out, err = run(capsys, *args, *options)
    assert (code, err) == (0, "")
    assert len(out) > 4


@pytest.mark.seconds
def test_generate_can_run_a_shape_with_random_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with demo.assets() as folder:
        for name in ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            if (folder / "base" / name).is_file():
                (tmp_path / name).write_bytes((folder / "base" / name).read_bytes())
    args = ["generate", tmp_path, "--prompt", "Hi", "--no-chat", "--max-tokens", 3]
    code, out, err = run(capsys, *args)
    assert (code, out) == (1, "")
    assert "holds no weights" in err
    code, _, err = run(capsys, *args, "--load-format", "dummy")
    assert (code, err) == (0, "")


def test_a_missing_gpu_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = run(capsys, *generate_args("--prompt", PROMPT, "--device", "cuda"))
    assert (code, out) == (1, "")
    assert err.startswith("error: device 'cuda' cannot be used")
    assert err.count("\n") == 1


@pytest.mark.seconds
def test_generate_answers_several_prompts_under_their_headings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = generate_args("--prompt", "One", "--prompt", "Two", "--no-chat", "--max-tokens", 3)
    code, out, _ = run(capsys, *args, "--use", "feedback=0.5")
    assert code == 0
    assert out.index("== One ==") < out.index("== Two ==")


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--use", "nobody"), "nobody"),
        (("--use", "feedback=much"), "name=weight"),
        (("--use", "feedback=1", "--use", "feedback=1"), "twice"),
        (("--adapter", "feedback"), "name=folder"),
        (("--adapter", "feedback=x"), "twice"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--dtype", "int4"), "dtype"),
        (("--quantization", "int2"), "quantization"),
        (("--quantization", "int8", "--quantization-group-size", "7"), "group_size"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    code, out, err = run(capsys, *generate_args("--prompt", "Hello", *options))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


# Files of prompts ---------------------------------------------------------------------------------


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.seconds
def test_each_line_of_a_file_has_its_own_adapter(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    file = write_jsonl(
        tmp_path / "asked.jsonl",
        {"prompt": PROMPT, "adapter": None},
        {"prompt": PROMPT},
        {"messages": messages, "adapter": {"feedback": 1}},
    )
    options = ("--prompt-file", file, "--output", "jsonl", "--max-tokens", 12)
    code, out, err = run(capsys, *generate_args(*options, "--use", "feedback"))
    assert (code, err) == (0, "")
    base, named, mixed = records(out)
    assert ANSWER.startswith(named["text"])
    assert not ANSWER.startswith(base["text"])
    assert [one["adapter"] for one in (base, named, mixed)] == [None, "feedback", {"feedback": 1}]
    assert mixed["messages"] == messages
    assert mixed["text"] == named["text"]
    assert named == {
        "prompt": PROMPT,
        "adapter": "feedback",
        "index": 0,
        "text": named["text"],
        "finish_reason": "length",
        "prompt_tokens": mixed["prompt_tokens"],
        "cached_tokens": 0,
        "completion_tokens": 12,
        "error": None,
    }


@pytest.mark.seconds
def test_sampling_and_engine_options_reach_where_they_belong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    add = Engine.add_request

    def watched(self: Engine, prompt: Any, params: Any, **options: Any) -> str:
        seen[:] = [self.config, params]
        return add(self, prompt, params, **options)

    monkeypatch.setattr(Engine, "add_request", watched)
    options = "--n 2 --top-k 5 --min-p 0.1 --top-p 0.9 --temperature 0.7 --seed 3 --max-tokens 2"
    options += " --stop one --stop two --max-model-len 128 --max-lora-rank 64 --max-loras 2"
    options += " --max-num-seqs 3 --num-kv-blocks 40 --lora-pages 16"
    code, out, err = run(capsys, *generate_args("--prompt", "Hi", "--no-chat", *options.split()))
    assert (code, err) == (0, "")
    assert out.index("== Hi (1 of 2) ==") < out.index("== Hi (2 of 2) ==")
    config, params = seen
    assert (params.n, params.top_k, params.min_p, params.top_p) == (2, 5, 0.1, 0.9)
    assert (params.temperature, params.seed, params.max_tokens) == (0.7, 3, 2)
    assert params.stop == ("one", "two")
    assert (config.max_model_len, config.max_lora_rank, config.max_loras) == (128, 64, 2)
    assert (config.max_num_seqs, config.num_kv_blocks, config.lora_pages) == (3, 40, 16)


@pytest.mark.seconds
def test_a_stop_text_ends_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    word = ANSWER.split()[2]
    args = generate_args("--prompt", PROMPT, "--use", "feedback", "--max-tokens", 12)
    code, out, _ = run(capsys, *args, "--stop", word, "--output", "jsonl")
    assert code == 0
    (record,) = records(out)
    assert record["text"] == ANSWER[: ANSWER.index(word)]
    assert record["finish_reason"] == "stop"


@pytest.mark.seconds
def test_a_prompt_that_cannot_be_accepted_is_named_by_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "asked.txt"
    file.write_text("Hello\n\n" + "too long " * 200 + "\n", encoding="utf-8")
    for chat in ("--chat", "--no-chat"):
        options = ("--prompt-file", file, "--max-model-len", 64, chat)
        code, out, err = run(capsys, *generate_args(*options))
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {file}:3: ")
        assert "shorten the prompt or raise max_model_len" in err
        assert err.count("\n") == 1


@pytest.mark.seconds
@pytest.mark.parametrize("output", ["text", "jsonl"])
@pytest.mark.parametrize("prompts", [("One",), ("One", "Two")])
def test_an_answer_that_failed_is_said_and_the_exit_status_is_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    prompts: tuple[str, ...],
) -> None:
    step = Engine.step

    def failing(self: Engine) -> list[Any]:
        found = step(self)
        for one in found:
            if one.finished and "One" in (one.prompt or ""):
                object.__setattr__(one, "error", "the logits are not finite")
        return found

    monkeypatch.setattr(Engine, "step", failing)
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    args = generate_args(*options, "--no-chat", "--max-tokens", 2, "--output", output)
    code, out, err = run(capsys, *args)
    assert code == 1
    if output == "jsonl":
        errors = [record["error"] for record in records(out)]
        assert errors == ["the logits are not finite", None][: len(prompts)]
    else:
        assert err.startswith("error: ")
        assert err.endswith("the logits are not finite\n")
        assert len(prompts) == 1 or "== Two ==" in out


def test_answers_are_given_in_the_order_of_the_prompts_as_soon_as_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second ends first and waits for the first; both come before the third has ended."""
    told = iter([["b"], ["a"], ["c"]])

    class Scripted:
        left = 3
        added = iter("abc")

        @property
        def has_work(self) -> bool:
            return self.left > 0

        def add_request(self, *_: object, **__: object) -> str:
            return next(self.added)

        def step(self) -> list[Any]:
            self.left -= 1
            return [_Told(name) for name in next(told)]

        def abort(self, _: str) -> None:
            pass

    class _Told:
        outputs: tuple[Any, ...] = ()

        def __init__(self, name: str) -> None:
            self.request_id = name

    class Held:
        engine = Scripted()

    asked = [command.Asked(name) for name in ("A", "B", "C")]
    llm: Any = Held()
    answers = command._answers(llm, asked, ["A", "B", "C"], command_params())
    found = [(output.request_id, llm.engine.left) for output in answers]
    assert found == [("a", 1), ("b", 1), ("c", 0)]


def command_params() -> Any:
    from multilora import SamplingParams

    return SamplingParams()
