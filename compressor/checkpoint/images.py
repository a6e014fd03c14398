"""What checkpoints say about their images, as a `Preprocess`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from compressor.errors import CheckpointError, UnsupportedModel

__all__ = ["channels", "crop_ratio", "per_channel"]


def channels(in_chans: int) -> Literal["RGB", "L"]:
    """The colour mode of a network with that many input channels.

    Raises:
        UnsupportedModel: neither 1 nor 3.
    """
    if in_chans not in (1, 3):
        raise UnsupportedModel(f"The patch embedding must read 1 or 3 channels, got {in_chans}.")
    return "RGB" if in_chans == 3 else "L"


def per_channel(values: Sequence[float], in_chans: int, what: str) -> tuple[float, ...]:
    """`values`, one per channel; a single or repeated value stands for all.

    >>> per_channel([0.5, 0.5, 0.5], 1, "mean")
    (0.5,)

    Raises:
        CheckpointError: their number differs, and they differ among themselves.
    """
    if len(values) == in_chans:
        return tuple(values)
    if len(set(values)) == 1:
        return (values[0],) * in_chans
    raise CheckpointError(
        f"{what} must have {in_chans} values, one per input channel, got {list(values)}.",
        hint="Give them in the checkpoint's config.json or preprocessor_config.json.",
    )


def crop_ratio(crop: int, resized: int) -> float:
    """The `Preprocess.crop` that turns a side of `crop` pixels back into exactly ``floor(crop / ratio) == resized``.

    >>> crop_ratio(224, 256), math.floor(224 / crop_ratio(224, 249))
    (0.875, 249)

    Raises:
        CheckpointError: the crop is larger than the image it is cut from.
    """
    if not 0 < crop <= resized:
        raise CheckpointError(f"preprocessor_config.json: crop_size must be in 1..{resized}, got {crop}.")
    ratio = crop / resized
    return ratio if math.floor(crop / ratio) == resized else math.nextafter(ratio, 0.0)
