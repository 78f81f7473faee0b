"""The types that the tests of kernels run in."""

from __future__ import annotations

import pytest

from multilora_kernels.testing.precision import TOLERANCE

by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
