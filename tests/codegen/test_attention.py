"""What paged attention compiles to: one table of what each form must and may be."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from multilora_kernels.cuda import attention
from multilora_kernels.testing.codegen import Launch, compiling
from tests.harness.triton_version import FEW_SPILLS, IS_PINNED

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
KV_HEADS, GROUP = 8, 4  # Llama 3.1 8B


class Expect(NamedTuple):
    """Registers a thread, with the pinned Triton, and KiB of shared memory are upper bounds."""

    arch: int
    kv_dtype: torch.dtype
    head_dim: int
    block_size: int
    batch_invariant: bool
    registers: int  # of the split form; the chunk form may use all that 8 warps have
    split: tuple[str, int]  # matrix instruction, shared memory
    chunk: tuple[str, int]


# 168 registers let 3 programs of 4 warps share a multiprocessor, more let 2, which is enough (of 8
# warps, in batch-invariant forms, 1 does): each
# has 32 KiB and more on their way. Shared memory: two tiles of K and V ahead, so that reading never
# stops; sm_80 has 163 KiB, sm_86, 89 and 120 have 99, the others 227.
TABLE = [
    Expect(90, BF16, 128, 16, False, 224, ("HMMA", 75), ("HGMMA", 100)),
    Expect(90, BF16, 128, 64, False, 224, ("HMMA", 75), ("HGMMA", 100)),
    Expect(90, FP16, 64, 16, False, 104, ("HMMA", 40), ("HGMMA", 52)),
    Expect(90, FP8, 128, 16, False, 224, ("HMMA", 42), ("HGMMA", 84)),
    Expect(90, BF16, 128, 16, True, 224, ("HGMMA", 84), ("HGMMA", 84)),
    Expect(90, BF16, 128, 64, True, 224, ("HGMMA", 84), ("HGMMA", 84)),
    Expect(90, FP8, 128, 16, True, 224, ("HGMMA", 84), ("HGMMA", 84)),
    Expect(80, BF16, 128, 16, False, 168, ("HMMA", 75), ("HMMA", 52)),
    Expect(80, BF16, 128, 16, True, 168, ("HMMA", 40), ("HMMA", 40)),
    Expect(80, BF16, 64, 16, False, 104, ("HMMA", 40), ("HMMA", 36)),
    Expect(100, BF16, 128, 16, False, 224, ("HMMA", 75), ("UTCHMMA", 100)),
    Expect(100, BF16, 128, 16, True, 176, ("UTCHMMA", 84), ("UTCHMMA", 84)),
    Expect(89, FP8, 128, 16, False, 224, ("HMMA", 42), ("HMMA", 44)),
    Expect(120, BF16, 128, 16, False, 168, ("HMMA", 75), ("HMMA", 52)),
    Expect(120, BF16, 128, 16, True, 224, ("HMMA", 84), ("HMMA", 84)),
    Expect(90, BF16, 32, 16, False, 128, ("HMMA", 24), ("HGMMA", 28)),
]

USUAL = (0, 3, 4, 7)


def launches(
    expect: Expect, max_query_len: int = 64, max_seq_len: int = 8192, seqs: int = 16
) -> list[Launch]:
    """The split form, the chunk form and the merge, of q that is a part of a fused projection."""
    dtype = BF16 if expect.kv_dtype == FP8 else expect.kv_dtype
    fused = torch.zeros(64, KV_HEADS * (GROUP + 2), expect.head_dim, dtype=dtype)
    shape = (2, 64, expect.block_size, KV_HEADS, expect.head_dim)
    k_blocks, v_blocks = torch.zeros(shape).to(expect.kv_dtype)
    scales = [torch.ones(KV_HEADS)] * 2 if expect.kv_dtype == FP8 else [None, None]
    lens, starts = torch.zeros(seqs, dtype=torch.int32), torch.zeros(seqs + 1, dtype=torch.int32)
    table = torch.zeros(seqs, 512, dtype=torch.int32)
    with compiling(expect.arch) as found:
        attention.paged_attention(
            fused[:, : KV_HEADS * GROUP], k_blocks, v_blocks, table, lens, starts, 0.1,
            max_query_len, max_seq_len, *scales, expect.batch_invariant, sm=expect.arch,
        )  # fmt: skip
    return found


def name_of(expect: Expect) -> str:
    mode = " invariant" if expect.batch_invariant else ""
    dtype = str(expect.kv_dtype)[6:]
    return f"sm_{expect.arch} {dtype} dim {expect.head_dim} blocks of {expect.block_size}{mode}"


# A row takes 5 to 20 s to compile, unless Triton's cache has it: the usual run tries a few.
@pytest.mark.parametrize(
    "expect",
    [
        pytest.param(row, id=name_of(row), marks=[] if i in USUAL else pytest.mark.slow)
        for i, row in enumerate(TABLE)
    ],
)
def test_code(expect: Expect) -> None:
    split, chunk, merge = launches(expect)
    assert not IS_PINNED or split.registers <= expect.registers, split
    for launch, is_split in ((split, True), (chunk, False)):
        mma, shared = expect.split if is_split else expect.chunk
        assert launch.mma == {mma}
        assert launch.spills <= FEW_SPILLS
        assert launch.stack_bytes <= 4 * FEW_SPILLS
        assert launch.shared_bytes <= shared * 1024, launch
        assert launch.narrow("LDG", "STG", "LDGSTS") == 0, launch.accesses
        # K and V come by asynchronous copies of 16 bytes, 8 where e4m3 is widened on the way. What
        # is narrower reads the block table. Two tiles of both lie ahead in each of the two walks.
        least = 8 if expect.kv_dtype == FP8 else 16
        copies = [(size, n) for (op, size), n in launch.accesses.items() if op == "LDGSTS"]
        copied = sum(size * n for size, n in copies if size >= least)  # bytes a thread
        tile = attention.form(is_split, expect.batch_invariant, 2, expect.head_dim, expect.arch)
        numel = 2 * tile.kv * expect.head_dim
        wanted = 2 * 2 * numel * expect.kv_dtype.itemsize // (32 * launch.num_warps)
        assert copied >= wanted, launch.accesses
        assert launch.narrow("STG", below=16) <= 1, launch.accesses
    assert merge.spills == merge.stack_bytes == 0
    assert merge.registers <= 64
    assert merge.ops["LDGSTS"] > 0  # segments are read ahead


@pytest.mark.parametrize("seqs", [256, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "expect",
    [
        pytest.param(TABLE[i], id=name_of(TABLE[i]), marks=[] if i == 0 else pytest.mark.slow)
        for i in USUAL
    ],
)
def test_many_sequences_fit_as_few_do(expect: Expect, seqs: int) -> None:
    few, many = launches(expect), launches(expect, seqs=seqs)
    assert not IS_PINNED or many[0].registers <= expect.registers, many[0]
    for one, other in zip(few, many, strict=True):
        assert other.spills <= FEW_SPILLS
        assert other.stack_bytes <= 4 * FEW_SPILLS
        assert other.shared_bytes == one.shared_bytes
        assert other.mma == one.mma


def test_grids() -> None:
    expect = TABLE[0]
    split, chunk, merge = launches(expect)
    assert split.grid == (64, KV_HEADS, 1)
    long = launches(expect, 1, 131_072)[0]
    assert long.grid == split.grid
    assert chunk.grid == (64 // 32 + 16, KV_HEADS, 1)
    assert merge.grid == (64, KV_HEADS, 1)
    assert [launch.kernel for launch in launches(expect, 4)] == ["_split_kernel", "merge_kernel"]
