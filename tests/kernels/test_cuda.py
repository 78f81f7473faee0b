"""The registration of the CUDA ops, without a CUDA device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from multilora_kernels import cuda

if TYPE_CHECKING:
    from collections.abc import Callable

OPS = (
    "apply_token_mask_",
    "draw",
    "linear",
    "linear_packed",
    "lora_",
    "lora_embed_",
    "lora_expand_",
    "lora_shrink",
    "lora_splits",
    "paged_attention",
    "rms_norm",
    "rope_store_kv_",
    "silu_mul",
    "top_logprobs",
)


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_cuda_function(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"multilora::{name}", "CUDA")


def test_importing_the_package_does_not_import_triton(run_python: Callable[..., str]) -> None:
    """It is an extra; and TRITON_INTERPRET could not be set any more."""
    code = "import sys, multilora_kernels; print('triton' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_without_triton_a_cuda_op_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "multilora_kernels.lora", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # type: ignore[arg-type]
    with pytest.raises(cuda.TritonMissing, match=r"pip install 'multilora\[gpu\]'"):
        cuda.triton_module("lora")


def test_another_missing_module_is_not_taken_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError("no tritonclient", name="tritonclient")

    monkeypatch.setattr(cuda.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="tritonclient"):
        cuda.triton_module("lora")


def test_packed_weights_are_refused_with_the_cure() -> None:
    with pytest.raises(cuda.NoCudaKernel, match="unpack"):
        cuda._linear_packed()
