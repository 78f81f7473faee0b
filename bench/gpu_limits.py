"""What counts as slow, and the lines that say so.

A prediction is a roofline (`gpu_model`), which leaves out what every kernel loses at its start and
end: only beyond 3 times of it is a kernel called slow. A whole step is, beyond 1.5 times: most of
it are large products, which come close to their rooflines. Ours is slow beside a comparator if it
takes more than 1.05 times what the best one does; less is the noise of a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpu_model import H200, Card

KERNEL, STEP, COMPARATOR = 3.0, 1.5, 1.05

STAND_IN = Card("a CPU that interprets kernels", 1e12, 1e12, 1e12, 1e12, 1e7, 0.0, 0.0, 0.0, 0.0)
"""For rehearsals: so slow that no kernel is slower, however busy the machine."""


def card_of(device: str, bandwidth: float) -> Card:
    """The card of a device's name. Of one that is not known, an H200 with its bandwidth."""
    return H200 if "H200" in device else replace(H200, name=device, bandwidth=bandwidth)


class Judge:
    """Lists what is slow in a part's results, under "slow"."""

    def __init__(self, content: dict[str, Any], *, compares: bool = True) -> None:
        self._slow: list[dict[str, Any]] = content.setdefault("slow", [])
        self.case_name = ""  # that is being measured, for a later run to know its lines by
        # Beside torch on the same CPU an interpreted kernel says nothing.
        self._comparator = COMPARATOR if compares else math.inf

    def beside(
        self,
        case: str,
        us: float,
        predicted_us: float,
        *,
        limit: float = KERNEL,
        comparators: Mapping[str, float] | None = None,  # microseconds by name
    ) -> dict[str, float]:
        """What to write beside a measurement; lists it if it is slow."""
        ratio = us / predicted_us
        found = {"predicted_us": round(predicted_us, 2), "measured_to_predicted": round(ratio, 2)}
        self._check(case, ratio, "its prediction", limit)
        if comparators:
            best = min(comparators, key=lambda name: comparators[name])
            found["measured_to_best_comparator"] = round(us / comparators[best], 3)
            self._check(case, us / comparators[best], best, self._comparator)
        return found

    def _check(self, case: str, times: float, of: str, limit: float) -> None:
        if times > limit:
            named = {"case_name": self.case_name} if self.case_name else {}
            slow = {"case": case, "times": round(times, 2), "of": of, "limit": limit, **named}
            self._slow.append(slow)

    def closing(self, most: int = 5) -> str:
        """For a part's last line: how many are slow, and the worst of them."""
        worst = sorted(self._slow, key=lambda slow: slow["times"] / slow["limit"], reverse=True)
        lines = [f"{s['case']} ({s['times']} x {s['of']})" for s in worst[:most]]
        return f"slow: {len(worst)}" + (f": {'; '.join(lines)}" if lines else "")
