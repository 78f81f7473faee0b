"""The identity of a mix."""

from __future__ import annotations

from multilora.adapters.mix import mix_identity
from multilora.adapters.store import AdapterStore


def test_identity_tells_mixes_apart() -> None:
    mixes = [(), (("a", 1.0),), (("a", 0.1 + 0.2),), (("a", 0.3),), (("a", 1.0), ("b", 1.0))]
    assert len({mix_identity(mix) for mix in mixes}) == len(mixes)
    assert AdapterStore.identity((("a", 1.0),)) == mix_identity((("a", 1.0),))
    assert len(mix_identity(())) == 32
