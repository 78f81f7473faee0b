"""Rank pages against the plain sum `scale * B @ A`, pools and table against what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from multilora.adapters.peft.reader import Adapter, LoraModule, read_adapter
from multilora.adapters.rank_pages import AdapterTable, PackedSite, RankPagePool, pack
from multilora.config.lora_sites import sites_of
from multilora.errors import AdapterInvalid
from tests.harness.adapter_folders import CONFIG, LINEARS, write_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from multilora.config.lora_sites import Site

SITES = sites_of(CONFIG)
ALL = (*LINEARS, "embed_tokens", "lm_head")


def delta(packed: PackedSite, site: Site, layer: int) -> torch.Tensor:
    """The weight change `[out, in]` of one layer, page after page."""
    change = torch.zeros(site.out, site.in_)
    for a, b in zip(packed.a.float(), packed.b.float(), strict=True):
        if site.name == "embed":
            return (packed.a.float() @ packed.b[:, 0].float()).sum(0).T
        for index, start in enumerate(site.slice_starts[:-1]):
            end = site.slice_starts[index + 1]
            change[start:end] += b[layer, :, start:end].T @ a[layer, index]
    return change


def direct(adapter: Adapter, site: Site, layer: int) -> torch.Tensor:
    change = torch.zeros(site.out, site.in_)
    for index, start in enumerate(site.slice_starts[:-1]):
        module = adapter.modules.get((site.name, layer, index))
        if module is not None:
            product = module.b.float() @ module.a.float() * module.scale
            change[start : site.slice_starts[index + 1]] = product
    return change


def one_module(site: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> Adapter:
    return Adapter("d", {(site, 0, 0): LoraModule(a, b, scale)}, a.shape[0])


# ---- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 8},
        {"rank": 3},
        {"rank": 20, "use_rslora": True, "alpha": 5},
        {"rank": 4, "rank_pattern": {"q_proj": 17, "layers.1.mlp.up_proj": 9}},
        {"rank": 8, "layers": [1], "targets": ["k_proj", "down_proj"]},
        {"rank": 8, "dtype": torch.bfloat16},
    ],
    ids=["rank8", "rank3", "rslora", "mixed", "one-layer", "bfloat16"],
)
def test_pages_sum_to_the_scaled_product(tmp_path: Path, fields: Mapping[str, object]) -> None:
    folder = write_adapter(tmp_path / "a", CONFIG, **{"targets": ALL, **fields})  # type: ignore[arg-type]
    adapter = read_adapter(folder, CONFIG)
    for site in SITES.values():
        packed = pack(adapter, site, torch.float32)
        assert (packed is None) == (adapter.rank_at(site.name) == 0)
        if packed is None:
            continue
        assert packed.num_pages == -(-adapter.rank_at(site.name) // 8)
        for layer in range(site.layers):
            torch.testing.assert_close(delta(packed, site, layer), direct(adapter, site, layer))


@pytest.mark.parametrize("name", SITES)
def test_page_shapes(tmp_path: Path, name: str) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", CONFIG, rank=9, targets=ALL), CONFIG)
    site = SITES[name]
    packed = pack(adapter, site, torch.bfloat16)
    assert packed is not None
    a_shape = (2, site.layers, len(site.slices), 8, site.in_)
    assert packed.a.shape == ((2, site.in_, 8) if name == "embed" else a_shape)
    assert packed.b.shape == (2, site.layers, 8, site.out)
    assert packed.a.dtype == packed.b.dtype == torch.bfloat16
    assert packed.a.is_contiguous()
    assert packed.b.is_contiguous()
    assert packed.num_bytes == 2 * (packed.a.numel() + packed.b.numel())


def test_what_lora_does_not_touch_is_zero() -> None:
    site = SITES["qkv"]
    q, k, _ = site.slices
    modules = {
        ("qkv", 1, 0): LoraModule(torch.ones(9, site.in_), torch.ones(q.out, 9), 1.0),
        ("qkv", 1, 1): LoraModule(torch.ones(2, site.in_), torch.ones(k.out, 2), 1.0),
    }
    packed = pack(Adapter("d", modules, 9), site, torch.float32)
    assert packed is not None
    # rank rows of q and k in the two pages of layer 1; v and layer 0 have none
    assert packed.a[:, 1].sum(-1).tolist() == [
        [[32.0] * 8, [32.0] * 2 + [0.0] * 6, [0.0] * 8],
        [[32.0] + [0.0] * 7, [0.0] * 8, [0.0] * 8],
    ]
    assert not packed.a[:, 0].any()
    assert not packed.b[:, 0].any()
    assert packed.b.sum().item() == q.out * 9 + k.out * 2


def test_the_scale_meets_b_in_fp32_before_the_one_cast() -> None:
    site = SITES["o"]
    b = torch.randn(site.out, 8)
    packed = pack(one_module("o", torch.ones(8, site.in_), b, 1 / 3), site, torch.bfloat16)
    assert packed is not None
    assert torch.equal(packed.b[0, 0], (b * (1 / 3)).bfloat16().T)
    assert not torch.equal(packed.b[0, 0], (b.bfloat16() * (1 / 3)).T)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "scale"),
    [
        (torch.float16, 1.0, 1.0, 70_000.0),
        (torch.float16, 70_000.0, 1.0, 1.0),
        (torch.bfloat16, 1.0, 1.0, 1e39),
        (torch.float32, 1.0, 0.0, 1e300),
    ],
)
def test_overflow_is_refused_and_names_the_site(
    dtype: torch.dtype, a: float, b: float, scale: float
) -> None:
    site = SITES["down"]
    lora = one_module("down", torch.full((8, site.in_), a), torch.full((site.out, 8), b), scale)
    with pytest.raises(AdapterInvalid, match=r"site down .* overflow"):
        pack(lora, site, dtype)


# ---- pools --------------------------------------------------------------------------------------


def test_a_pool_takes_no_memory_until_it_is_needed() -> None:
    pool = RankPagePool(SITES["qkv"], 4, dtype=torch.float32)
    assert pool.allocate(0) == []
    assert not pool.is_allocated
    with pytest.raises(AssertionError, match="no adapter"):
        pool.layer(0)
    assert pool.allocate(1) is not None
    assert pool.is_allocated
    assert pool.layer(0)[0].shape == (4, 3, 8, 32)


@pytest.mark.parametrize("name", ["embed", "qkv", "lm_head"])
def test_a_stand_in_has_the_layout_of_the_pages_to_come(name: str) -> None:
    pool = RankPagePool(SITES[name], 3, dtype=torch.bfloat16)
    with pool.stand_in():
        before = [(t.shape[1:], t.stride()) for t in pool.layer(0)]
    assert not pool.is_allocated
    pool.reserve()
    pages = pool.layer(0)
    assert [(t.shape[1:], t.stride()) for t in pages] == before
    with pool.stand_in():
        assert pool.layer(0)[0].data_ptr() == pages[0].data_ptr()


def test_a_pool_gives_each_page_once() -> None:
    pool = RankPagePool(SITES["o"], 3, dtype=torch.float32)
    first, second = pool.allocate(2), pool.allocate(1)
    assert first is not None
    assert second is not None
    assert {*first, *second} == {0, 1, 2}
    assert pool.allocate(1) is None
    pool.free(first)
    assert (pool.num_free, pool.used) == (2, frozenset(second))
    pool.check_integrity()
    with pytest.raises(AssertionError, match="not in use"):
        pool.free(first)


def test_num_bytes_counts_pages_in_use(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", CONFIG, rank=16, targets=ALL), CONFIG)
    for site in SITES.values():
        packed = pack(adapter, site, torch.float16)
        assert packed is not None
        pool = RankPagePool(site, 5, dtype=torch.float16)
        assert pool.num_bytes == 0
        pool.allocate(packed.num_pages)
        assert pool.num_bytes == packed.num_bytes


@pytest.mark.parametrize("name", SITES)
def test_written_pages_come_back_by_layer(tmp_path: Path, name: str) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a", CONFIG, rank=16, targets=ALL), CONFIG)
    site = SITES[name]
    packed = pack(adapter, site, torch.float32)
    assert packed is not None
    pool = RankPagePool(site, 6, dtype=torch.float32)
    assert pool.allocate(3) is not None
    ids = pool.allocate(2)
    assert ids is not None
    ids.reverse()
    pool.write(ids, packed)
    for layer in range(site.layers):
        a, b = pool.layer(layer)
        assert torch.equal(a[ids], packed.a if name == "embed" else packed.a[:, layer])
        assert torch.equal(b[ids], packed.b[:, layer])


# ---- table --------------------------------------------------------------------------------------


def test_a_table_row_is_what_was_written() -> None:
    table = AdapterTable(SITES, slots=3, max_pages=4, max_rows=0, dtype=torch.float32)
    found = table.site("qkv")
    table.write(1, "qkv", [7, 2, 5], [1.0, 0.5, -2.0])
    assert table.row(1, "qkv") == ([7, 2, 5], [1.0, 0.5, -2.0])
    assert table.row(1, "o") == table.row(0, "qkv") == ([], [])
    table.write(1, "qkv", [3], [1.0])
    assert table.row(1, "qkv") == ([3], [1.0])
    table.clear(1)
    assert table.row(1, "qkv") == ([], [])
    assert table.site("qkv").page_ids.data_ptr() == found.page_ids.data_ptr()
    assert (found.page_ids.dtype, found.num_pages.dtype) == (torch.int32, torch.int32)
    assert found.page_weights.dtype == torch.float32
    assert found.page_ids.shape == found.page_weights.shape == (3, 4)


@pytest.mark.parametrize(("pages", "columns"), [(1, 16), (16, 16), (17, 32), (40, 40), (None, 40)])
def test_a_narrower_table_is_a_view(pages: int | None, columns: int) -> None:
    """In sixteens, and never wider than the table."""
    table = AdapterTable(SITES, slots=3, max_pages=40, max_rows=0, dtype=torch.float32)
    whole, found = table.site("o"), table.site("o", pages)
    table.write(1, "o", [7, 2], [1.0, 0.5])
    assert found.page_ids.shape == found.page_weights.shape == (3, columns)
    assert found.page_ids[1, :2].tolist() == [7, 2]
    assert found.page_weights[1, :2].tolist() == [1.0, 0.5]
    for wide, narrow in zip(whole[:3], found[:3], strict=True):
        assert wide.data_ptr() == narrow.data_ptr()
        assert wide.stride() == narrow.stride()
