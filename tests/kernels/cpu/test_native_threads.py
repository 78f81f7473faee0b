"""The C++ kernels under threads: as many as torch was told, the same bits, two callers at once."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import multilora_kernels as ops
from multilora_kernels import Table, make_tiles
from multilora_kernels.cpu import native
from tests.harness.kernel_calls.lora import make_columns_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

pytestmark = pytest.mark.skipif(not native.HAS_CPP, reason="the C++ library is not built")

TASKS = Path("/proc/self/task")  # a folder for each thread of the process


def lora_call(seed: int, embed: bool) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    slots = [0] * 30 + [1] * 20 + [-1] * 5 + [2] * 9
    page_ids = torch.randint(6, (3, 4), generator=g).int()
    counts = torch.tensor([4, 2, 3], dtype=torch.int32)
    table, tiles = Table(page_ids, torch.rand(3, 4, generator=g), counts), make_tiles(slots, 16)
    y, x = torch.randn(2, 64, 700, generator=g)
    b_pages, ids = torch.randn(6, 8, 700, generator=g), torch.randint(90, (64,), generator=g)
    a_pages = torch.randn(*((6, 90, 8) if embed else (6, 1, 8, 700)), generator=g)

    def call() -> Tensor:
        out = y.clone()
        if embed:
            ops.lora_embed_(out, ids, a_pages, b_pages, table, tiles)
        else:
            ops.lora_(out, x, a_pages, b_pages, table, tiles, (0, 700))
        return out

    return call


def attention_call(seed: int) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 40, 16, 2, 64, generator=g)
    q = torch.randn(33, 4, 64, generator=g)
    table = torch.randint(40, (2, 10), generator=g).int()
    lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([130, 77], [0, 32, 33]))
    return lambda: ops.paged_attention(
        q, k, v, table, lens, starts, scale=0.1, max_query_len=32, max_seq_len=130
    )


def rope_call(seed: int) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, (k, v) = torch.randn(200, 8, 64, generator=g), torch.randn(2, 200, 2, 64, generator=g)
    cos, sin = torch.randn(2, 50, 32, generator=g)
    positions, kv_slots = torch.randint(50, (200,), generator=g), torch.randperm(256)[:200]

    def call() -> Tensor:
        out, cache = q.clone(), torch.zeros(2, 16, 16, 2, 64)
        ops.rope_store_kv_(out, k, v, cos, sin, positions, kv_slots, *cache)
        return torch.cat((out.flatten(), cache.flatten()))

    return call


def mask_call(seed: int) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, 5000, generator=g)
    mask = torch.randint(-(2**31), 2**31, (16, 157), generator=g).int()

    def call() -> Tensor:
        out = logits.clone()
        ops.apply_token_mask_(out, mask)
        return out

    return call


def columns_call(seed: int) -> Callable[[], Tensor]:
    torch.manual_seed(seed)
    y, x, changes, tiles = make_columns_call([2] * 20 + [6] * 20, in_=800)

    def call() -> Tensor:
        out = y.clone()
        ops.lora_columns_(out, x, changes, tiles)
        return out

    return call


def draw_call(seed: int) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits, numbers = torch.randn(16, 5000, generator=g), torch.randint(2**53, (16,), generator=g)
    all_of = torch.ones(16).double()
    rest = torch.ones(16), torch.full((16,), 4000), 0.9 * all_of, -9 * all_of, numbers
    return lambda: ops.draw(logits, *rest)[0]


def calls_of(seed: int) -> dict[str, Callable[[], Tensor]]:
    """Each C++ op on work that is worth a second thread."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(40, 800, generator=g), torch.randn(300, 800, generator=g)
    packed = ops.pack(weight)
    eight = ops.pack_quantized(*ops.quantize(weight, 8, None), 8)
    return {
        "lora_": lora_call(seed, embed=False),
        "lora_embed_": lora_call(seed, embed=True),
        "lora_columns_": columns_call(seed),
        "paged_attention": attention_call(seed),
        "rope_store_kv_": rope_call(seed),
        "rms_norm": lambda: ops.rms_norm(torch.cat([x] * 4), weight[0], 1e-5),
        "silu_mul": lambda: ops.silu_mul(torch.cat([x] * 4)),
        "apply_token_mask_": mask_call(seed),
        "top_logprobs": lambda: torch.cat(ops.top_logprobs(x, torch.arange(40), 5), 1),
        "draw": draw_call(seed),
        "linear of float32": lambda: ops.linear(x, packed),
        "linear of int8": lambda: ops.linear(x, eight),
    }


NAMES = sorted(calls_of(0)) if native.HAS_CPP else []


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def team(call: Callable[[], object], wanted: int) -> int:
    """How many threads `call` runs on: those it starts, and its own.

    It is called from a new Python thread, because OpenMP keeps a pool for each.
    """
    found: list[int] = []

    def body() -> None:
        torch.set_num_threads(wanted)
        before = len(os.listdir(TASKS))
        call()
        found.append(1 + len(os.listdir(TASKS)) - before)

    rest = len(os.listdir(TASKS))
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    end = time.monotonic() + 60
    while len(os.listdir(TASKS)) > rest and time.monotonic() < end:  # the pool goes after it
        time.sleep(0.001)
    return found[0]


@pytest.mark.skipif(not TASKS.is_dir(), reason="no /proc")
@pytest.mark.skipif(
    native.PATH is not None and b"__kmpc_" in native.PATH.read_bytes(),
    reason="built by clang: LLVM's OpenMP has one pool for all callers, so that no call starts one",
)
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("wanted", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_runs_on_as_many_threads_as_torch_was_told(name: str, wanted: int) -> None:
    torch.set_num_threads(1)
    assert team(calls_of(0)[name], wanted) == wanted


@pytest.mark.skipif(not TASKS.is_dir(), reason="no /proc")
@pytest.mark.parametrize("wanted", [1, 2])
def test_the_environment_says_how_many_threads(wanted: int, run_python: Callable[..., str]) -> None:
    code = (
        "import os, torch\n"
        "import multilora_kernels as mk\n"
        "x = torch.empty(160, 1600)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "mk.silu_mul(x)\n"
        "print(1 + len(os.listdir('/proc/self/task')) - before)"
    )
    assert int(run_python(code, OMP_NUM_THREADS=str(wanted))) == wanted


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    call, found = calls_of(0)[name], []
    for wanted in (1, 2, 3):
        torch.set_num_threads(wanted)
        found.append(call())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_two_threads_at_once_get_their_own_results() -> None:
    """As two engines in one process would; ctypes lets go of Python's lock during a call."""
    calls = [list(calls_of(seed).values()) for seed in (1, 2)]
    alone = [[call() for call in side] for side in calls]
    gate = threading.Barrier(2)

    def side(which: int) -> bool:
        gate.wait()
        return all(
            torch.equal(call(), expected)
            for _ in range(20)
            for call, expected in zip(calls[which], alone[which], strict=True)
        )

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(side, range(2)))
