"""`multilora adapters verify`: log-probabilities of an adapter here and in PEFT, a certificate."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import AdapterInvalid, ConfigError
from ...version import __version__

if TYPE_CHECKING:
    from ...engine.engine import Engine
    from ...outputs import RequestOutput

TOLERANCE = 1e-4  # of a log-probability in fp32
LENGTHS = (9, 33, 70)  # tokens of the prompts, random ones of the vocabulary
NEW_TOKENS = 16
TOP = 20  # log-probabilities at each position, the largest ones
NAME = "adapter"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was compared, and what came of it."""

    digest: str  # of the adapter
    passed: bool  # every log-probability within the tolerance, and each token PEFT's best
    worst: float  # largest difference of a log-probability
    tolerance: float
    prompts: int
    logprobs: int  # that were compared
    other_tokens: int  # new tokens that are not PEFT's best
    versions: dict[str, str]


def verify(
    path: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    model: Annotated[Path, typer.Option(help="Folder of the base checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the certificate, as JSON; else it is printed.")
    ] = None,
    max_lora_token_rows: Annotated[
        int, typer.Option(help="Rows of the embedding or head that it may change.")
    ] = 256,
) -> None:
    """Compares an adapter's log-probabilities with PEFT's, in fp32; status 1 if they differ."""
    if missing := [name for name in ("peft", "transformers") if find_spec(name) is None]:
        raise ConfigError(
            f"this compares with PEFT, which needs {' and '.join(missing)}: pip install "
            f"{' '.join(missing)}"
        )
    found = certify(path, model, max_lora_token_rows)
    text = json.dumps(asdict(found), indent=2)
    if out is None:
        print(text)
    else:
        out.write_text(f"{text}\n", encoding="utf-8")
    if not found.passed:
        raise AdapterInvalid(
            f"adapter at {path} differs from PEFT by up to {found.worst:.2g} in a log-probability, "
            f"in {found.other_tokens} tokens; please report it"
        )


def certify(path: Path, model: Path, max_lora_token_rows: int) -> Certificate:
    """Answers a few prompts with the adapter, and scores the answers with PEFT's model."""
    from ...adapters.peft.files import adapter_folder
    from ...config.engine import EngineConfig
    from ...engine.engine import Engine

    config = EngineConfig(
        model=str(model),
        dtype="float32",
        skip_tokenizer_init=True,
        max_loras=1,
        max_num_seqs=len(LENGTHS),
        max_lora_token_rows=max_lora_token_rows,
        num_kv_blocks=64,
        max_model_len=LENGTHS[-1] + NEW_TOKENS + 512,
    )
    engine = Engine(config)
    path = adapter_folder(path)
    digest = engine.load_adapter(NAME, path)
    outputs = _answers(engine, _prompts(engine, path))
    del engine  # two bases in memory are enough
    theirs = _peft_model(path, model)
    worst, count, others = 0.0, 0, 0
    for output in outputs:
        difference, compared, other = _compare(output, theirs)
        worst, count, others = max(worst, difference), count + compared, others + other
    names = ("torch", "transformers", "peft")
    versions = {"multilora": __version__, **{name: version(name) for name in names}}
    passed = worst <= TOLERANCE and not others
    return Certificate(digest, passed, worst, TOLERANCE, len(outputs), count, others, versions)


def _prompts(engine: Engine, path: Path) -> list[list[int]]:
    """Random tokens; an activated LoRA's invocation stands in the last two, and not at the end."""
    from ...adapters.peft.config import MAX_CONFIG_BYTES, parse_config
    from ...adapters.peft.files import CONFIG_FILE, open_regular

    with open_regular(path / CONFIG_FILE, MAX_CONFIG_BYTES) as file:
        invocation = list(parse_config(file.read(MAX_CONFIG_BYTES)).invocation)
    draw, vocab = random.Random(0), engine.model_config.vocab_size
    prompts = [[draw.randrange(vocab) for _ in range(length)] for length in LENGTHS]
    if invocation:
        prompts[1:] = [[*ids[:5], *invocation, *ids[5:]] for ids in prompts[1:]]
    return prompts


def _answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[RequestOutput]:
    from ...sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=TOP,
        prompt_logprobs=TOP,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    ids = [engine.add_request(list(prompt), params, adapter=NAME) for prompt in prompts]
    done = {}
    while engine.has_work:
        done.update({output.request_id: output for output in engine.step()})
    return [done[request_id] for request_id in ids]


def _peft_model(path: Path, model: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    return PeftModel.from_pretrained(base, path).eval()


def _compare(output: RequestOutput, theirs: Any) -> tuple[float, int, int]:
    """The largest difference, how many log-probabilities there were, and tokens not theirs."""
    import torch

    answer, prompt = output.outputs[0], output.prompt_token_ids
    assert output.prompt_logprobs is not None
    assert answer.logprobs is not None
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([[*prompt, *answer.token_ids]])).logits[0, :-1]
    wanted = logits.double().log_softmax(-1)
    found = [*output.prompt_logprobs[1:], *answer.logprobs]
    pairs = [
        (wanted[i, token].item(), entry.logprob)
        for i, row in enumerate(found)
        if row is not None
        for token, entry in row.items()
    ]
    best = wanted[len(prompt) - 1 :].argmax(-1).tolist()
    others = sum(ours != best_one for ours, best_one in zip(answer.token_ids, best, strict=True))
    return max(abs(one - other) for one, other in pairs), len(pairs), others
