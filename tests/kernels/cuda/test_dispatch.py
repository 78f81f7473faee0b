"""What the CUDA ops need, and say where it is missing; without a CUDA device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import multilora_kernels as mk
from multilora_kernels.cuda import dispatch

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.seconds
def test_importing_the_package_does_not_import_triton(run_python: Callable[..., str]) -> None:
    """It is an extra; and TRITON_INTERPRET could not be set any more."""
    code = "import sys, multilora_kernels; print('triton' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_without_triton_a_cuda_op_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "multilora_kernels.cuda.lora", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # type: ignore[arg-type]
    with pytest.raises(dispatch.TritonMissing, match=r"pip install 'multilora\[gpu\]'"):
        dispatch.triton_module("lora")


def test_another_missing_module_is_not_taken_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError("no tritonclient", name="tritonclient")

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="tritonclient"):
        dispatch.triton_module("lora")


def test_packed_weights_are_refused_with_the_cure() -> None:
    packed = mk.pack(torch.zeros(2, 4))
    with pytest.raises(dispatch.NoCudaKernel, match="unpack"):
        dispatch.linear_packed(torch.zeros(1, 4), packed, None)
