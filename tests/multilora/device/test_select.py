"""Which device a name means."""

from __future__ import annotations

import pytest
import torch

from multilora.device.select import open_device
from multilora.errors import ConfigError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_the_cpu_is_there_and_auto_finds_it() -> None:
    assert open_device("cpu").torch == torch.device("cpu")
    assert open_device("auto").is_cuda == torch.cuda.is_available()


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_missing_gpu_is_an_error_with_the_cure(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' cannot be used.*use device='cpu'"):
        open_device(name)


def test_a_gpu_beyond_the_last_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"'cuda:2' is not there; this machine has cuda:0..1"):
        open_device("cuda:2")
