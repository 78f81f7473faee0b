"""What the layers see of a step's adapters."""

from __future__ import annotations

import torch

from multilora.adapters.weight_changes import NormChanges
from multilora.model.forward_batch import ForwardBatch, NormRows
from multilora.model.layers import RMSNorm


def test_a_token_has_the_norms_of_its_slot() -> None:
    norm = RMSNorm(8, 1e-5, torch.float32, 2)
    norm.weight.copy_(torch.rand(8))
    changes, change = NormChanges(3, 2, 8), torch.randn(3, 8)
    changes.write(1, [(change, 0.5)])
    none = torch.zeros(3, dtype=torch.int32)
    rows = NormRows(changes, changes.rows_of(torch.tensor([-1, 1, 0], dtype=torch.int32)))
    plain, own = (
        ForwardBatch(none, none, none, none, none, none[None], 1, 1, None, {}, norms=norms)
        for norms in (None, rows)
    )
    x, residual = torch.randn(2, 3, 8)
    wanted, found = (norm(x, residual.clone(), batch) for batch in (plain, own))
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])
    torch.testing.assert_close(found[1], wanted[1] * (1 + 0.5 * change[2] / norm.weight))
