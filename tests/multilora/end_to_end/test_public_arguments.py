"""Whatever a caller gives to a public entry, it works or is refused by an error of ours.

Of every argument of every entry each hostile value by itself; by hypothesis two at once, and nested
ones. It takes little time and memory, and the engine and its other requests are as before.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import resource
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("hypothesis")
import hypothesis

from multilora import LLM, Engine, EngineConfig, LoRARequest, MultiloraError, SamplingParams
from multilora.config.model import ModelConfig
from multilora.entrypoints import cli
from multilora.tokenization.tokenizer import load_tokenizer
from tests.harness.adapter_folders import write_adapter
from tests.harness.hostile_values import ATOMS, arguments, made
from tests.harness.model_folders import write_checkpoint
from tests.harness.paths import UMA
from tests.harness.tiny_engines import drain, greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

LONGEST, MOST_BYTES = 1.0, 256 << 20  # seconds and bytes of one call
SMALL: dict[str, Any] = {
    "max_model_len": 128,
    "num_kv_blocks": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_loras": 4,
}
PROMPT = [5, 6, 7, 8]


class House:
    """A small engine with what its entries are called with."""

    def __init__(self, root: Path) -> None:
        shape = {"vocab_size": load_tokenizer(UMA / "base").vocab_size, "eos_token_ids": ()}
        write_checkpoint(root / "base", **shape)
        write_adapter(root / "a", ModelConfig.from_dir(root / "base"), seed=1, scale=0.5)
        self.root = root
        self.llm = LLM(
            root / "base", UMA / "base", adapters={"a": root / "a", "b": root / "a"}, **SMALL
        )
        self.engine = self.llm.engine
        self.expected = self.neighbour()

    def neighbour(self) -> list[int]:
        """The tokens of a request as others run them, of which nobody else may know."""
        self.engine.add_request(PROMPT, greedy(3), adapter="a", request_id="neighbour")
        return drain(self.engine)["neighbour"].outputs[0].token_ids

    def check(self) -> None:
        """That all is as before."""
        for name in self.engine.request_ids:
            self.engine.abort(name)
        while self.engine.has_work:
            self.engine.step()
        self.engine.check_integrity()
        for name in self.engine.adapters:
            if name not in ("a", "b"):
                self.engine.unload_adapter(name)
        for name in ("a", "b"):
            self.llm.load_adapter(name, self.root / "a")
        assert self.neighbour() == self.expected


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


def _added(house: House, call: Callable[..., Any], **given: Any) -> None:
    """Calls it amid another's request, which it must not change."""
    house.engine.add_request(PROMPT, greedy(3), adapter="a", request_id="neighbour")
    house.engine.step()
    try:
        call(**given)
    finally:
        done = drain(house.engine)
        if "neighbour" in done:  # else it was aborted, by name
            assert done["neighbour"].outputs[0].token_ids == house.expected


def _own(given: Any, folder: Any) -> Any:
    """The folder where "own" is given."""
    return folder if isinstance(given, str) and given == "own" else given


CALLS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "add_request": (
        lambda house, **given: _added(house, house.engine.add_request, **given),
        {
            "prompt": "[5, 6]",
            "params": "SamplingParams(max_tokens=2)",
            "adapter": "None",
            "request_id": "None",
        },
    ),
    "abort": (lambda house, **given: house.engine.abort(**given), {"request_id": "'x'"}),
    "output": (lambda house, **given: house.engine.output(**given), {"request_id": "'x'"}),
    "load_adapter": (
        lambda house, **given: house.engine.load_adapter(**given),
        {"name": "'c'", "path": "'/nonexistent'"},
    ),
    "register_adapter": (
        lambda house, **given: house.engine.register_adapter(**given),
        {"name": "'c'", "path": "'/nonexistent'", "digest": "None"},
    ),
    "load_adapter_from_tensors": (
        lambda house, **given: house.engine.load_adapter_from_tensors(**given),
        {"name": "'c'", "config": "{}", "tensors": "{}"},
    ),
    "adapter_chat_template": (
        lambda house, **given: house.engine.adapter_chat_template(**given),
        {"adapter": "'a'"},
    ),
    "has_adapter": (lambda house, **given: house.engine.has_adapter(**given), {"name": "'a'"}),
    "adapter_path": (lambda house, **given: house.engine.adapter_path(**given), {"name": "'a'"}),
    "unload_adapter": (
        lambda house, **given: house.engine.unload_adapter(**given),
        {"name": "'b'"},
    ),
    "LLM.load_adapter": (
        lambda house, **given: house.llm.load_adapter(**given),
        {"name": "'c'", "path": "'/nonexistent'"},
    ),
    "LLM.register_adapter": (
        lambda house, **given: house.llm.register_adapter(**given),
        {"name": "'c'", "path": "'/nonexistent'", "digest": "None"},
    ),
    "LLM.unload_adapter": (
        lambda house, **given: house.llm.unload_adapter(**given),
        {"name": "'b'"},
    ),
    "generate": (
        lambda house, **given: house.llm.generate(**given),
        {
            "prompts": "[[5, 6], 'hello']",
            "sampling_params": "SamplingParams(max_tokens=2)",
            "adapter": "None",
            "lora_request": "None",
            "priority": "None",
            "use_tqdm": "False",
        },
    ),
    "chat": (
        lambda house, **given: house.llm.chat(**given),
        {
            "messages": "[{'role': 'user', 'content': 'hi'}]",
            "sampling_params": "SamplingParams(max_tokens=2)",
            "use_tqdm": "False",
            "lora_request": "None",
            "adapter": "None",
            "chat_template": "None",
            "add_generation_prompt": "True",
            "continue_final_message": "False",
            "tools": "None",
            "chat_template_kwargs": "None",
        },
    ),
    "encode": (
        lambda house, **given: house.llm.get_tokenizer().encode(**given),
        {"text": "'hi'", "add_special_tokens": "True", "max_length": "None"},
    ),
    "encode_with_special": (
        lambda house, **given: house.llm.get_tokenizer().encode_with_special(**given),
        {"text": "'hi'", "add_special_tokens": "True", "max_length": "None"},
    ),
    "decode": (
        lambda house, **given: house.llm.get_tokenizer().decode(**given),
        {"ids": "[5, 6]", "skip_special_tokens": "True"},
    ),
    "apply_chat_template": (
        lambda house, messages, **given: house.llm.get_tokenizer().apply_chat_template(
            messages, **given
        ),
        {
            "messages": "[{'role': 'user', 'content': 'hi'}]",
            "add_generation_prompt": "True",
            "continue_final_message": "False",
            "tools": "None",
            "max_length": "None",
            "chat_template": "None",
            "tokenize": "True",
            "other": "None",
        },
    ),
    "SamplingParams": (
        lambda _, **given: SamplingParams(**given),
        {field.name: f"{field.default!r}" for field in fields(SamplingParams)}
        | {"output_kind": "SamplingParams().output_kind", "structured_outputs": "None"},
    ),
    "clone": (
        lambda _, **given: SamplingParams().clone(**given),
        {"n": "1", "stop": "None", "best_of": "None"},
    ),
    "LoRARequest": (
        lambda _, **given: LoRARequest(**given),
        {"lora_name": "'x'", "lora_int_id": "1", "lora_path": "'y'", "load_inplace": "False"},
    ),
    "load_tokenizer": (lambda _, **given: load_tokenizer(**given), {"folder": "'/nonexistent'"}),
    "LLM": (
        lambda house, model, **given: LLM(_own(model, house.root / "base"), **given, **SMALL),
        {
            "model": "'own'",
            "tokenizer": "None",
            "adapters": "None",
            "enable_lora": "True",
            "tensor_parallel_size": "1",
            "skip_tokenizer_init": "True",
        },
    ),
    "Engine": (lambda _, **given: Engine(**given), {"config": "5"}),
    "params": (
        lambda house, **given: _added(
            house,
            house.engine.add_request,
            prompt=PROMPT,
            params=SamplingParams(**{**given, "max_tokens": 2}),
        ),
        {
            field.name: f"{field.default!r}"
            for field in fields(SamplingParams)
            if field.name not in ("output_kind", "n")
        },
    ),
}


def _config(house: House, **given: Any) -> None:
    """An engine of these settings, which answers if it can be made."""
    given["model"] = _own(given["model"], str(house.root / "base"))
    given["tokenizer"] = _own(given["tokenizer"], str(UMA / "base"))
    engine = Engine(EngineConfig.from_kwargs(**given))
    engine.add_request(PROMPT, greedy(2))
    while engine.has_work:
        engine.step()


CALLS["EngineConfig"] = (
    _config,
    {field.name: f"{field.default!r}" for field in fields(EngineConfig)}
    | {name: f"{value!r}" for name, value in SMALL.items()}
    | {"model": "'own'", "tokenizer": "'own'"},
)
"""By name: how an entry is called, and arguments that it takes, spelled."""


def judge(house: House, name: str, spelled: Mapping[str, str]) -> None:
    """Calls an entry, and looks at what is left."""
    call, _ = CALLS[name]
    values = {argument: made(text) for argument, text in spelled.items()}
    before, start = _peak(), time.thread_time()  # a busy machine is no failure
    with contextlib.suppress(MultiloraError):
        call(house, **values)
    taken, grown = time.thread_time() - start, _peak() - before
    assert taken < LONGEST, f"{taken:.2f} s"
    assert grown < MOST_BYTES, f"{grown >> 20} MiB"


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


CHEAP = ("SamplingParams", "clone", "LoRARequest", "load_tokenizer", "Engine", "EngineConfig")
OF_ENGINE = [name for name in CALLS if name not in CHEAP]


@pytest.mark.seconds
@pytest.mark.parametrize("name", CHEAP)
def test_each_hostile_value_of_each_setting_works_or_is_refused(house: House, name: str) -> None:
    _, known = CALLS[name]
    for argument in known:
        for value in ATOMS:
            judge(house, name, {**known, argument: value})


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ENGINE)
def test_each_hostile_value_of_each_call_works_or_is_refused(house: House, name: str) -> None:
    _, known = CALLS[name]
    for argument in known:
        for value in ATOMS:
            judge(house, name, {**known, argument: value})
        house.check()


@pytest.mark.seconds
@pytest.mark.parametrize("name", CALLS)
def test_any_two_hostile_arguments_work_or_are_refused(house: House, name: str) -> None:
    _draw(house, name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_many_pairs_of_hostile_arguments_work_or_are_refused(house: House, name: str) -> None:
    _draw(house, name, 2000)


def _draw(house: House, name: str, examples: int) -> None:
    # The same examples in every run; memory and time are no matter of shrinking.
    @hypothesis.settings(derandomize=True, max_examples=examples, deadline=None, database=None)
    @hypothesis.given(arguments(CALLS[name][1]))
    def drawn(spelled: dict[str, str]) -> None:
        judge(house, name, spelled)

    drawn()
    house.check()


# The command line ---------------------------------------------------------------------------------

TEXTS = (
    *("", " ", "x", "=", "a=b=c", "a=nan", "-1", "0", "1", "2147483648", "1099511627776", "9" * 31),
    *(
        "nan",
        "inf",
        "1e400",
        "-0.0",
        "0x10",
        "None",
        "x" * 5000,
        "9" * 5000,
        "../..",
    ),
    *("--", "-", "--help", "{", "[]", "/nonexistent", "."),
)
COMMANDS = {
    "generate": {
        "prompt": "hi",
        **dict.fromkeys(("prompt-file", "output", "adapter", "use", "n", "temperature", "top-k")),
        **dict.fromkeys(("top-p", "min-p", "stop", "seed", "dtype", "quantization", "device")),
        **dict.fromkeys(("quantization-group-size", "kv-cache-dtype", "load-format")),
        **dict.fromkeys(("gpu-memory-utilization", "lora-pages", "max-lora-rank", "max-loras")),
        **{"max-tokens": "2", "max-model-len": "128", "num-kv-blocks": "32", "max-num-seqs": "8"},
    },
    "info": dict.fromkeys(
        (
            *("device", "memory", "dtype", "quantization", "quantization-group-size"),
            *("kv-cache-dtype", "max-model-len", "max-num-seqs", "num-kv-blocks", "max-loras"),
            *("max-lora-rank", "lora-rank", "lora-pages", "gpu-memory-utilization"),
        )
    ),
    "demo": {"scene": "0", "max-tokens": "1"},
}
"""The options of each command, with what they are given beside a hostile one."""


def _ends(argv: list[str]) -> None:
    """Runs a command, which ends with an exit status and an error of a line or none."""
    start = time.thread_time()
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code in (0, 1, 2)
    assert time.thread_time() - start < LONGEST


def _command_lines(house: House) -> Iterator[list[str]]:
    for command, known in COMMANDS.items():
        place = [] if command == "demo" else [str(house.root / "base")]
        for option in known:
            for text in TEXTS:
                options = {**known, option: text}
                if command == "demo" and option == "max-tokens":
                    options["scene"] = "0"  # there is none: the demo itself takes seconds
                rest = [f"--{name}={value}" for name, value in options.items() if value is not None]
                yield [command, *place, *rest]
    for text in TEXTS:
        yield from (["generate", text, "--prompt", "hi"], ["info", text], [text])
        yield ["adapters", "check", text, "--model", str(house.root / "base")]
        yield ["adapters", "check", str(house.root / "a"), "--model", text]


@pytest.mark.seconds
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 7))]
)
def test_any_command_line_works_or_is_an_error_of_a_line(
    house: House, part: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    for argv in itertools.islice(_command_lines(house), part, None, 7):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        _ends(argv)
        assert "Traceback" not in capsys.readouterr().err
