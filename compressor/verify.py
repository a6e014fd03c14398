"""Is the artifact the model? Parity of outputs, and accuracy with the interval that says how much it means. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compressor.errors import ParityError
from compressor.intervals import proportion_interval
from compressor.types import Array, Parity, Precision

__all__ = ["AGREEMENT_FLOOR", "TOLERANCE", "accuracy", "check_parity", "parity", "tolerance"]

# Largest |difference| allowed, as a share of the largest |logit|. fp32, also of activations alone: rounding of some thousand
# float32 additions in another order. fp16: 11 bits of mantissa. bf16: 8. fp8: 4. Integers: a different CPU rounds single
# activations to the neighbouring step, and such flips accumulate over the blocks. Used for golden outputs, which must hold on
# another machine of the same runtime.
TOLERANCE: Mapping[Precision, float] = {
    "fp32": 1e-3,
    "fp16": 2e-2,
    "bf16": 5e-2,
    "w8a8": 1e-1,
    "w8a16": 5e-2,
    "w4a8": 1e-1,
    "w6a6": 2e-1,
    "w4a4": 5e-1,
    "w8a32": 1e-3,
    "w4a32": 1e-3,
    "fp8": 2e-1,
}

# A built artifact whose top-1 classes agree less often than this with the model it was built from is broken, not imprecise.
AGREEMENT_FLOOR: Mapping[Precision, float] = {
    "fp32": 0.99,
    "fp16": 0.97,
    "bf16": 0.9,
    "w8a8": 0.8,
    "w8a16": 0.9,
    "w4a8": 0.7,
    "w6a6": 0.5,
    "w4a4": 0.2,
    "w8a32": 0.9,
    "w4a32": 0.7,
    "fp8": 0.8,
}


def parity(reference: Array, candidate: Array) -> Parity:
    """Distance between two sets of outputs of the same inputs.

    Args:
        reference: (n, classes) float.
        candidate: (n, classes) float.

    >>> parity(np.eye(2), np.eye(2) * 3).agreement
    1.0
    """
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(np.mean(np.sum(a * b, axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)))
    same = float(np.mean(a.argmax(1) == b.argmax(1)))
    return Parity(float(np.abs(a - b).max()), cosine, same, len(a))


def tolerance(reference: Array, precision: Precision) -> float:
    """Largest |difference| from `reference` (n, classes) that an artifact of `precision` may show."""
    return TOLERANCE[precision] * max(1.0, float(np.abs(reference).max()))


def check_parity(reference: Array, candidate: Array, precision: Precision, where: str) -> Parity:
    """Parity of `candidate`, which must be finite, alive, and close enough to be the same network.

    Args:
        reference: (n, classes) outputs of the model.
        candidate: (n, classes) outputs of the artifact on the same inputs.
        precision: of the artifact; sets what "close enough" is.
        where: named in the error.

    Raises:
        ParityError: outputs are not finite, are the same for every input, or disagree.
    """
    hint = "The runtime computes something else; report it with the build log."
    if candidate.shape != reference.shape:
        raise ParityError(f"{where}: outputs must have shape {reference.shape}, got {candidate.shape}.", hint=hint)
    if not np.isfinite(candidate).all():
        raise ParityError(f"{where}: outputs must be finite, got NaN or infinity.", hint=hint)
    if len(candidate) > 1 and np.ptp(reference, axis=0).max() > 0 and np.ptp(candidate, axis=0).max() == 0:
        raise ParityError(
            f"{where}: outputs must depend on the input, got the same for {len(candidate)} images.", hint=hint
        )
    result = parity(reference, candidate)
    limit = tolerance(reference, "fp32")
    if precision == "fp32" and result.max_abs > limit:
        raise ParityError(
            f"{where}: outputs must be within {limit:.2g} of the model's, got {result.max_abs:.3g}.", hint=hint
        )
    # One flip in a handful of images proves nothing: judge the share only beyond what its own interval allows.
    if proportion_interval(round(result.agreement * result.count), result.count)[1] < AGREEMENT_FLOOR[precision]:
        floor = AGREEMENT_FLOOR[precision]
        raise ParityError(
            f"{where}: at least {floor:.0%} of the classes must be the model's, got {result.agreement:.1%} of {result.count}.",
            hint=hint,
        )
    return result


def accuracy(logits: Array, labels: Array | None, reference: Array | None = None) -> dict[str, object]:
    """The `eval` JSON: accuracy in percent with 95 % interval, agreement with the reference and flips against it.

    Args:
        logits: (n, classes).
        labels: (n,) class indices, or None when unknown (accuracies are then None).
        reference: (n, classes) logits of the reference, or None (agreement, flips and cosine are then None).

    Returns:
        n, top1, top1_ci95, top5, agreement, flips, mean_cosine. `flips` counts images whose class changed;
        `flips_right_to_wrong` and `flips_wrong_to_right` split them where labels are known.
    """
    n, predicted = len(logits), logits.argmax(1)
    result: dict[str, object] = {"n": n, "top1": None, "top1_ci95": None, "top5": None}
    if labels is not None:
        right = predicted == labels
        k = min(5, logits.shape[1])
        top = np.argpartition(-logits, k - 1, axis=1)[:, :k]
        low, high = proportion_interval(int(right.sum()), n)
        result |= {"top1": 100 * float(right.mean()), "top1_ci95": [100 * low, 100 * high]}
        result["top5"] = 100 * float((top == labels[:, None]).any(1).mean())
    result |= {"agreement": None, "flips": None, "mean_cosine": None}
    if reference is not None:
        p, changed = parity(reference, logits), predicted != reference.argmax(1)
        result |= {"agreement": 100 * p.agreement, "flips": int(changed.sum()), "mean_cosine": p.cosine}
        if labels is not None:
            was_right = reference.argmax(1) == labels
            result["flips_right_to_wrong"] = int((was_right & (predicted != labels)).sum())
            result["flips_wrong_to_right"] = int((~was_right & (predicted == labels)).sum())
    return result
