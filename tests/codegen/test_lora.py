"""What the LoRA kernels compile to, for the sites of Llama 3.1 and the plans that they run with.

All of it holds for every launch here: no spills, no access of fewer than 4 bytes, weights and rows
of x by 16-byte copies, y stored 16 bytes at a time, and only HMMA, the matrix instruction that
tiles of any height share (with another one a row's bits could depend on its tile's height).
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from multilora_kernels import Table, Tiles
from multilora_kernels.cuda import launch_plans, lora
from multilora_kernels.testing.codegen import Launch, compiling
from tests.harness.triton_version import FEW_SPILLS, IS_PINNED

SMS = 132
REGISTERS = 65_536  # of a multiprocessor, all architectures here
KIB = 1024

# in, and the first column of each slice
SITES = {
    "8B qkv": (4096, (0, 4096, 5120, 6144)),
    "8B o": (4096, (0, 4096)),
    "8B gate_up": (4096, (0, 14336, 28672)),
    "8B down": (14336, (0, 4096)),
    "8B lm_head": (4096, (0, 128256)),
    "70B qkv": (8192, (0, 8192, 9216, 10240)),
    "70B o": (8192, (0, 8192)),
    "70B gate_up": (8192, (0, 28672, 57344)),
    "70B down": (28672, (0, 8192)),
}


class Bound(NamedTuple):
    tokens: int  # of the step, which choose the row of the plan
    shrink_registers: int  # a thread
    shrink_shared: int  # a block
    expand_registers: int
    expand_shared: int


BOUNDS = [
    #      tokens  shrink          expand
    Bound(64, 96, 18 * KIB, 80, 5 * KIB),
    Bound(1024, 128, 24 * KIB, 128, 8 * KIB),
]
FAST = {(90, "8B qkv", 64), (90, "8B down", 1024), (80, "8B qkv", 1024), (100, "8B down", 64)}
CASES = [
    pytest.param(
        arch, site, bound,
        id=f"sm_{arch} {site} {bound.tokens}",
        marks=() if (arch, site, bound.tokens) in FAST else pytest.mark.slow,
    )
    for arch in launch_plans.ARCHITECTURES for site in SITES for bound in BOUNDS
]  # fmt: skip


def make_call(
    site: str, tokens: int, dtype: torch.dtype, dora: bool = False
) -> tuple[list[Tensor], Table, Tiles, tuple[int, ...]]:
    """y, x, a_pages, b_pages of a site, a table and tiles: as large as they must be, unfilled."""
    in_, starts = SITES[site]
    out, slices, slots, tiles = starts[-1], len(starts) - 1, 64, min(tokens, 80)

    def floats(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32)

    table = Table(
        integers(slots, 16), floats(slots, 16, kind=torch.float32), integers(slots),
        *(integers(slots), floats(4, out), floats(4, out)) if dora else (),
    )  # fmt: skip
    # Pages of two layers: a view of one, as the runner has it.
    a_pages, b_pages = floats(3, 2, slices, 8, in_)[:, 1], floats(3, 2, 8, out)[:, 1]
    tensors = [floats(tokens, out), floats(tokens, in_), a_pages, b_pages]
    return tensors, table, Tiles(*(integers(tiles) for _ in range(3)), integers(1)), starts


def compiled(
    arch: int, site: str, tokens: int, dtype: torch.dtype = torch.bfloat16, dora: bool = False
) -> tuple[Launch, Launch]:
    tensors, *rest = make_call(site, tokens, dtype, dora)
    with compiling(arch) as launches:
        lora.lora_(*tensors, *rest, launch_plans.target(arch, SMS))
    shrink, expand = launches
    assert (shrink.kernel, expand.kernel) == ("_shrink_kernel", "_expand_kernel")
    return shrink, expand


def assert_clean(launch: Launch) -> None:
    assert launch.spills == launch.stack_bytes == 0
    assert launch.narrow("LDG", "STG", "LDGSTS") == 0
    assert launch.mma == {"HMMA"}


@pytest.mark.parametrize(("arch", "site", "bound"), CASES)
def test_every_site_compiles_clean(arch: int, site: str, bound: Bound) -> None:
    shrink, expand = compiled(arch, site, bound.tokens)
    assert_clean(shrink)
    assert_clean(expand)
    # All of x and A comes by asynchronous copies of 16 bytes; 4 bytes are tables only.
    assert {size for (name, size) in shrink.accesses if name == "LDGSTS"} == {16}
    assert {size for (name, size) in expand.accesses if name == "STG"} == {16}
    assert expand.accesses["LDG", 16] > 0
    assert not IS_PINNED or shrink.registers <= bound.shrink_registers
    assert shrink.shared_bytes <= bound.shrink_shared
    assert not IS_PINNED or expand.registers <= bound.expand_registers
    assert expand.shared_bytes <= bound.expand_shared


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda b: f"{b.tokens} tokens")
@pytest.mark.parametrize("arch", launch_plans.ARCHITECTURES)
def test_the_programs_that_the_plan_counts_on_fit(arch: int, bound: Bound) -> None:
    """Expand is persistent: all its programs must be resident at once."""
    plan = launch_plans.load(arch).choose("lora_expand", (4096, 1), bound.tokens)
    threads = plan["num_warps"] * 32 * plan["programs_per_sm"]
    assert bound.expand_registers * threads <= REGISTERS
    assert threads <= 2048


def test_the_grids() -> None:
    shrink, expand = compiled(90, "8B qkv", 64)
    assert shrink.grid == (64, 2, 8)  # tile capacity, column programs, splits
    assert expand.grid == (SMS * 6, 1, 1)


def test_one_row_compiles_though_triton_folds_ones_away() -> None:
    """An integer argument of 1 is a constant to the compiler, without a tensor's methods."""
    for launch in compiled(90, "8B o", 1):
        assert_clean(launch)


@pytest.mark.parametrize("tokens", [64, pytest.param(1024, marks=pytest.mark.slow)])
def test_dora_adds_no_more_than_its_two_rows(tokens: int) -> None:
    """c and bias have one value for each column, and a tile may have a thread for each column."""
    _, plain = compiled(90, "8B down", tokens)
    _, expand = compiled(90, "8B down", tokens, dora=True)
    assert expand.spills == 0
    assert expand.mma == {"HMMA"}
    assert expand.narrow("STG", "LDGSTS") == 0
    assert expand.narrow("LDG") <= 2
    assert expand.accesses["LDG", 16] >= plain.accesses["LDG", 16]


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda b: f"{b.tokens} tokens")
def test_fp16_compiles_as_bf16_does(bound: Bound) -> None:
    for launch in compiled(90, "8B qkv", bound.tokens, torch.float16):
        assert_clean(launch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", launch_plans.ARCHITECTURES)
@pytest.mark.parametrize("tokens", [64, 1024])
def test_the_embedding_is_one_launch(arch: int, tokens: int) -> None:
    (y, *_), table, tiles, _ = make_call("8B o", tokens, torch.bfloat16)
    ids = torch.empty(tokens, dtype=torch.int64)
    a_pages, b_pages = (torch.empty(3, *s, dtype=y.dtype) for s in ((128256, 8), (8, 4096)))
    with compiling(arch) as launches:
        lora.lora_embed_(y, ids, a_pages, b_pages, table, tiles, launch_plans.target(arch, SMS))
    (launch,) = launches
    assert launch.spills <= FEW_SPILLS
    assert launch.mma == {"HMMA"}
    assert {size for (name, size) in launch.accesses if name == "STG"} == {16}
