"""Sentences that say what a measurement means, wherever the number alone could be read as good news."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compressor.profile import faster

__all__ = ["pruning_speed"]


def pruning_speed(target: str, pruned_ns: Sequence[int], unpruned_ns: Sequence[int]) -> dict[str, Any]:
    """What pruning alone changed on a target: ``{ratio, ci95, faster, sentence}``, as ``compress --json`` prints it.

    Fewer MACs are not always less time: narrow matrices fill a kernel badly. `sentence` is empty when pruning pays.

    Args:
        target: its name.
        pruned_ns: float artifact of the pruned model, interleaved with
        unpruned_ns: that of the unpruned one.
    """
    found = faster(pruned_ns, unpruned_ns)
    interval = [found.low, found.high] if math.isfinite(found.high) else None
    sentence = ""
    if not found.is_faster:
        bounds = (
            "too few runs for an interval" if interval is None else f"95 % interval {found.low:.2f} to {found.high:.2f}"
        )
        sentence = (
            f"Pruning is not measurably faster on {target}: in float it takes {found.ratio:.2f}x the unpruned model's "
            f"time ({bounds}). Remove more, or leave the model whole there."
        )
    return {"ratio": found.ratio, "ci95": interval, "faster": found.is_faster, "sentence": sentence}
