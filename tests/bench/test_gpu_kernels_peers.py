"""How `bench/gpu_kernels.py` calls vLLM's and SGLang's kernels, on stand-ins with their signatures.

The stand-ins do in torch what those kernels are documented to do, so weights, ranks and segments
must be laid out as they want them. Signatures as of September 2026.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gpu_kernels
import gpu_sglang
import gpu_vllm
import pytest
import torch
from gpu_kernels import Case, Plan, Problem

from multilora.device.cpu import Device
from tests.harness.model_folders import TINY

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LoRABatchInfo:
    use_cuda_graph: bool
    bs: int
    num_segments: int
    seg_indptr: Tensor
    weight_indices: Tensor
    lora_ranks: Tensor
    scalings: Tensor
    max_len: int | None
    seg_lens: Tensor | None
    permutation: Tensor | None
    expected_tokens: int | None = None
    has_active_lora: bool = False


def segments(info: LoRABatchInfo) -> Any:
    """(rows, adapter, rank) of each segment."""
    ends = info.seg_indptr.tolist()
    assert info.bs == info.num_segments == len(ends) - 1
    for i in range(info.num_segments):
        assert info.max_len is not None
        assert ends[i + 1] - ends[i] <= info.max_len
        rows = torch.arange(ends[i], ends[i + 1])
        rows = rows if info.permutation is None else info.permutation[rows].long()
        slot = int(info.weight_indices[i])
        yield rows, slot, int(info.lora_ranks[slot])


def shrink(x: Tensor, weights: Tensor, batch_info: LoRABatchInfo, stack_num: int = 1) -> Tensor:
    out = x.new_full((len(x), weights.shape[1]), torch.nan)
    for rows, slot, rank in segments(batch_info):
        width = rank * stack_num  # what lies beyond is not written
        out[rows, :width] = x[rows] @ weights[slot, :width].T
    return out


def expand(x: Tensor, weights: Tensor, info: LoRABatchInfo, ends: list[int], y: Tensor) -> Tensor:
    for rows, slot, rank in segments(info):
        for s, (first, last) in enumerate(itertools.pairwise(ends)):
            u = x[rows, s * rank : (s + 1) * rank]
            y[rows, first:last] += (u @ weights[slot, first:last, :rank].T) * info.scalings[slot]
    return y


def sgemm_lora_b_fwd(
    x: Tensor, weights: Tensor, batch_info: LoRABatchInfo, base_output: Tensor | None = None
) -> Tensor:
    assert base_output is not None
    return expand(x, weights, batch_info, [0, weights.shape[1]], base_output)


def qkv_lora_b_fwd(
    x: Tensor,
    qkv_lora_b: Tensor,
    batch_info: LoRABatchInfo,
    output_offset: Tensor,
    max_qkv_out_dim: int,
    base_output: Tensor | None = None,
) -> Tensor:
    assert base_output is not None
    assert max_qkv_out_dim == int(output_offset.diff().max())
    return expand(x, qkv_lora_b, batch_info, output_offset.tolist(), base_output)


def gate_up_lora_b_fwd(
    x: Tensor,
    gate_up_lora_b: Tensor,
    batch_info: LoRABatchInfo,
    output_dim: int,
    base_output: Tensor | None = None,
) -> Tensor:
    assert base_output is not None
    return expand(x, gate_up_lora_b, batch_info, [0, output_dim, 2 * output_dim], base_output)


def chunked_sgmv_lora_expand_forward(
    x: Tensor,
    weights: Tensor,
    batch_info: LoRABatchInfo,
    slice_offsets: Tensor,
    max_slice_size: int,
    base_output: Tensor | None,
    slice_block_config: tuple[int, int, int] | None = None,
) -> Tensor:
    assert base_output is not None
    assert slice_block_config is not None, "it would be counted on the host"
    assert batch_info.max_len == 16
    assert max_slice_size == int(slice_offsets.diff().max())
    return expand(x, weights, batch_info, slice_offsets.tolist(), base_output)


def compute_slice_block_config(slice_offsets: Tensor, BLOCK_N: int = 64) -> tuple[int, int, int]:
    blocks = [-(-width // BLOCK_N) for width in slice_offsets.diff().tolist()]
    return blocks[0], blocks[1] if len(blocks) > 1 else 0, sum(blocks)


def _lora_shrink(
    inputs: Tensor,
    lora_a_weights: list[Tensor],  # [adapters, rank, hidden] each
    output_tensor: Tensor,  # [slices, tokens, rank]
    token_lora_mapping: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    num_tokens_per_lora: Tensor,  # [max_loras + 1]
    lora_token_start_loc: Tensor,  # [max_loras + 2]
    lora_ids: Tensor,  # [max_loras + 1], padded with -1
    no_lora_flag_cpu: Tensor,
    num_active_loras: Tensor,
    scaling: float,
) -> None:
    output_tensor.zero_()
    for s, weight in enumerate(lora_a_weights):
        for i in range(int(num_active_loras)):
            first = int(lora_token_start_loc[i])
            span = slice(first, first + int(num_tokens_per_lora[i]))
            rows = token_indices_sorted_by_lora_ids[span].long()
            assert (token_lora_mapping[rows] == lora_ids[i]).all()
            output_tensor[s, rows] = (inputs[rows] @ weight[int(lora_ids[i])].T).float() * scaling


def _lora_expand(
    inputs: Tensor,  # [slices, tokens, rank]
    lora_b_weights: list[Tensor],  # [adapters, out, rank] each
    output_tensor: Tensor,
    token_lora_mapping: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    num_tokens_per_lora: Tensor,
    lora_token_start_loc: Tensor,
    lora_ids: Tensor,
    no_lora_flag_cpu: Tensor,
    num_active_loras: Tensor,
    offset_start: int = 0,
    add_inputs: bool = False,
) -> None:
    assert add_inputs
    assert lora_ids[-1] == -1
    start = offset_start
    for s, weight in enumerate(lora_b_weights):
        own = weight[token_lora_mapping.long()]
        delta = torch.einsum("tr,tnr->tn", inputs[s].to(weight.dtype), own)
        output_tensor[:, start : start + weight.shape[1]] += delta
        start += weight.shape[1]


@pytest.fixture
def _peers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "sglang": {"__version__": "0"},
        "sglang.srt.lora.utils": {"LoRABatchInfo": LoRABatchInfo},
        "sglang.srt.lora.triton_ops": {
            "sgemm_lora_a_fwd": shrink,
            "chunked_sgmv_lora_shrink_forward": shrink,
            "sgemm_lora_b_fwd": sgemm_lora_b_fwd,
            "qkv_lora_b_fwd": qkv_lora_b_fwd,
            "gate_up_lora_b_fwd": gate_up_lora_b_fwd,
            "chunked_sgmv_lora_expand_forward": chunked_sgmv_lora_expand_forward,
        },
        "vllm": {"__version__": "0"},
        "vllm.lora.ops.triton_ops.lora_shrink_op": {"_lora_shrink": _lora_shrink},
        "vllm.lora.ops.triton_ops.lora_expand_op": {"_lora_expand": _lora_expand},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        for i in range(name.count(".")):  # the packages above it
            package = name.rsplit(".", i + 1)[0]
            if package not in names:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_peers")
@pytest.mark.parametrize("site", ["qkv", "gate_up", "o"])
@pytest.mark.parametrize(("popularity", "rank"), [("zipf", "mixed"), ("identical", 16)])
def test_every_way_gives_what_the_loop_gives(site: str, popularity: str, rank: int | str) -> None:
    plan = Plan(torch.float32, (20,), 1, 1)
    problem = Problem(Case(site, 20, popularity, rank), plan, Device(), TINY)
    found = gpu_kernels.ways(problem)
    assert set(found) == {"ours", "bmm_gather", "loop", "vllm", "sglang", "sglang csgmv"}
    for name, steps in found.items():
        assert len(steps) == 2
        assert problem.error_of(steps[0]) < 1e-4, name


def test_without_them_a_line_says_why() -> None:
    for module in (gpu_vllm, gpu_sglang):
        assert module.state().startswith("not compared: ModuleNotFoundError")
