"""The figures: what is counted, under which labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from multilora.engine.engine import EngineStats
from multilora.outputs import CompletionOutput, RequestMetrics, RequestOutput
from multilora.server.metrics import BASE, MIX, Metrics, label_of

STATS = EngineStats(*range(12))
ANSWER = CompletionOutput(0, "abc", [1, 2, 3], None, None, "stop", None)
TIMES = RequestMetrics(0.0, 10.0, 10.0, 10.25, 10.65, 3, 10.0)
OUTPUT = RequestOutput("r", None, [4, 5], None, [ANSWER], True, 0, "a", metrics=TIMES)


def value(metrics: Metrics, name: str, **labels: str) -> Any:
    return metrics.registry.get_sample_value(f"multilora_{name}", labels)


def test_a_request_is_counted_under_its_adapter() -> None:
    metrics = Metrics("base")
    metrics.ended(OUTPUT, ["stop"], 3)
    metrics.ended(replace(OUTPUT, adapter=None), ["stop", "length"], 6)
    metrics.gap("a", 0.2)
    assert value(metrics, "requests_total", adapter="a", finish_reason="stop") == 1
    assert value(metrics, "requests_total", adapter=BASE, finish_reason="length") == 1
    assert value(metrics, "adapter_prompt_tokens_total", adapter="a") == 2
    assert value(metrics, "adapter_generated_tokens_total", adapter=BASE) == 6
    assert value(metrics, "time_to_first_token_seconds_sum", adapter="a") == 0.25
    assert value(metrics, "inter_token_seconds_sum", adapter="a") == 0.2
    mean = value(metrics, "time_per_output_token_seconds_sum", adapter="a")
    assert abs(mean - 0.2) < 1e-9


def test_the_engines_counters_are_told() -> None:
    metrics = Metrics("base")
    text = metrics.text(STATS).decode()
    assert "multilora_engine_steps_total 0.0" in text
    assert "multilora_engine_running 4.0" in text
    assert "multilora_engine_waiting 5.0" in text
    assert 'multilora_model{name="base"} 1.0' in text


def test_an_adapter_that_has_gone_leaves_no_series() -> None:
    metrics = Metrics("base")
    metrics.ended(OUTPUT, ["stop"], 3)
    metrics.gap("a", 0.2)
    metrics.forget("a")
    metrics.forget("nobody")
    assert 'adapter="a"' not in metrics.text(STATS).decode()


def test_mixes_share_a_label() -> None:
    found = [label_of(spec) for spec in (None, {}, "a", "a@3fa9c1", {"a": 1.0})]
    assert found == [BASE, BASE, "a", "a", "a"]
    assert label_of({"a": 0.5, "b": 0.5}) == MIX


def test_two_apps_in_one_process_do_not_share_figures() -> None:
    one, two = Metrics("base"), Metrics("base")
    one.ended(OUTPUT, ["stop"], 3)
    assert value(two, "adapter_prompt_tokens_total", adapter="a") is None
