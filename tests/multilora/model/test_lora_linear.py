"""A fused linear and each row's own delta on it, against sums that are written out."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import multilora_kernels as mk
from multilora.config.lora_sites import Site, Slice
from multilora.config.quantization import Scheme
from multilora.errors import CheckpointError
from multilora.model.forward_batch import SiteLora
from multilora.model.lora_linear import Linear, LoraEmbedding, LoraLinear
from tests.harness.small_stores import SITES, load, make_adapter, make_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

QKV, EMBED = SITES["qkv"], SITES["embed"]
SLOTS = [0, 0, -1, 1, 0]  # by row


class Side:
    """Notes when work is forked and joined."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @contextmanager
    def fork(self) -> Iterator[None]:
        self.calls.append("fork")
        yield

    def join(self) -> None:
        self.calls.append("join")


def adapted(site: str) -> tuple[SiteLora, list[Any]]:
    """Two adapters at a site, "a" in slot 0 and twice "b" in slot 1; their modules."""
    store = make_store()
    load(store, "a", "b", sites=(site,))
    mixes = [(("a", 1.0),), (("b", 2.0),)]
    assert [store.pin(mix) for mix in mixes] == [0, 1]
    tiles = mk.make_tiles(SLOTS, mk.DECODE_TILE)
    table, scales = store.table.site(site), store.table.scales[site]
    lora = SiteLora(store.pool(site), table, scales, tiles, SITES[site].slice_starts)
    last = SITES[site].layers - 1
    return lora, [make_adapter(name, sites=(site,)).modules[site, last, 0] for name in "ab"]


def batch_of(site: str = "", lora: Any = None, side: Any = None, ids: Any = None) -> Any:
    found = {} if lora is None else {site: lora}
    return SimpleNamespace(lora=found, side=side, batch_invariant=False, ids=ids)


def loaded(linear: Linear | LoraLinear | LoraEmbedding, *paths: str) -> dict[str, Tensor]:
    """Fills a linear with random weights; these by name."""
    part = linear.part(paths) if isinstance(linear, Linear) else linear.part()
    stored = {name: torch.randn(shape) for name, shape in part.shapes.items()}
    with torch.no_grad():
        part.load(stored.__getitem__)
    return stored


def test_slices_of_the_checkpoint_are_rows_in_their_order() -> None:
    linear = Linear(QKV, torch.float32, bias=True)
    stored = loaded(linear, "q", "k")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        "q.weight": (4, 4),
        "q.bias": (4,),
        "k.weight": (2, 4),
        "k.bias": (2,),
    }
    x = torch.randn(3, 4)
    wanted = [x @ stored[f"{s}.weight"].T + stored[f"{s}.bias"] for s in "qk"]
    torch.testing.assert_close(linear(x, False), torch.cat(wanted, 1))
    assert linear.num_bytes >= 6 * 4 * 4


def test_a_site_knows_its_modules_of_a_layer() -> None:
    names = set(LoraLinear(QKV, 1, torch.float32).part().shapes)
    assert names == {f"model.layers.1.self_attn.{m}_proj.weight" for m in "qk"}


@pytest.mark.parametrize("beside", [False, True], ids=["after the base", "beside the base"])
def test_each_row_gets_its_own_delta(beside: bool) -> None:
    linear, x = LoraLinear(QKV, 1, torch.float32), torch.randn(len(SLOTS), 4)
    loaded(linear)
    lora, modules = adapted("qkv")
    side = Side() if beside else None
    base = linear(x, batch_of())
    found = linear(x, batch_of("qkv", lora, side))
    wanted = base.clone()
    for row, slot in enumerate(SLOTS):
        if slot >= 0:
            module = modules[slot]
            delta = (1 + slot) * module.scale * (module.b @ (module.a @ x[row]))
            wanted[row, : len(delta)] += delta
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[2], base[2])
    assert side is None or side.calls == ["fork", "join"]


def test_an_adapter_of_another_site_changes_nothing() -> None:
    linear, x = LoraLinear(QKV, 0, torch.float32), torch.randn(len(SLOTS), 4)
    loaded(linear)
    lora, _ = adapted("o")
    assert torch.equal(linear(x, batch_of("o", lora)), linear(x, batch_of()))


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_gives_rows_and_their_deltas(tied: bool) -> None:
    vocab, hidden = EMBED.in_, EMBED.out
    head = None
    if tied:
        head = Linear(Site("lm_head", "", (Slice("lm_head", vocab),), hidden, 1), torch.float32)
    embedding = LoraEmbedding(vocab, hidden, torch.float32, head)
    (weight,) = loaded(embedding).values()
    ids = torch.tensor([3, 0, 11, 7, 3])
    assert torch.equal(embedding(batch_of(ids=ids)), weight[ids])
    lora, modules = adapted("embed")
    found = embedding(batch_of("embed", lora, ids=ids))
    wanted = weight[ids].clone()
    for row, slot in enumerate(SLOTS):
        if slot >= 0:
            module = modules[slot]
            wanted[row] += (1 + slot) * module.scale * (module.b @ module.a[:, ids[row]])
    torch.testing.assert_close(found, wanted)


def test_quantized_rows_are_near_the_weights() -> None:
    linear = Linear(QKV, torch.float32, scheme=Scheme(8, None))
    stored = torch.cat(list(loaded(linear, "q", "k").values()))
    rows = linear.rows(torch.arange(6), torch.float32)
    step = stored.abs().amax(1, keepdim=True) / 127
    assert ((rows - stored).abs() <= step * 0.51).all()
    assert torch.equal(linear.rows(torch.arange(6), torch.bfloat16), rows.bfloat16())


def test_a_weight_that_cannot_be_quantized_is_named() -> None:
    linear = Linear(QKV, torch.float32, scheme=Scheme(8, None))
    part = linear.part(["q", "k"])
    with pytest.raises(CheckpointError, match=r"k\.weight: .*leave out quantization"):
        part.load(lambda name: torch.full(part.shapes[name], torch.nan if "k" in name else 1.0))
