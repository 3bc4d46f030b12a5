"""Which values of an image with more than 8 bits are black and white; the image alone does not tell."""

import math
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import ImageError, InputError

__all__ = ["Levels", "as_levels", "ask_for_levels", "scaled"]

Levels: TypeAlias = tuple[float, float] | Literal["full", "percentile"]
PERCENTILES = (0.5, 99.5)  # of the values of an image


def as_levels(given: Any) -> Levels | None:
    """Parse levels: (low, high), "full", "percentile", None, or the text "LOW,HIGH".

    Raises:
        InputError: The value is none of these.
    """
    if given is None or given in ("full", "percentile"):
        return given  # type: ignore[no-any-return]
    try:
        low, high = (float(v) for v in (given.split(",") if isinstance(given, str) else given))
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return low, high
    except (AttributeError, TypeError, ValueError):
        pass
    raise InputError(
        f"levels are the values of black and white, (low, high) with low below high, 'full' or 'percentile'; "
        f"got {given!r}"
    )


def ask_for_levels(what: str) -> ImageError:
    """The error for an image of unknown range; `what` is the first half of its message."""
    return ImageError(
        f"{what}; say which values are black and white with levels=(low, high) (on the command line --levels "
        "LOW,HIGH), such as (0, 4095), or 'full' or 'percentile'"
    )


def scaled(
    values: np.ndarray,
    levels: Levels,
    label: str,
    full: float | None = None,  # largest possible value, if the file states it
) -> np.ndarray:
    """Map values to float32 in 0..1 and clip them.

    Args:
        values: An array of any shape, integers or floats.
        levels: (low, high) become 0 and 1.  "full" uses the range of the dtype (floats: 0 to 1), "percentile" the 0.5th
            and 99.5th percentile of these values.

    Returns:
        An array of the shape of `values`.

    Raises:
        ImageError: Values are not finite or not numbers, or "full" is used with integers of 32 bits or more.
    """
    if values.dtype.kind not in "iuf":
        raise ImageError(f"{label} holds {values.dtype}, and levels are for whole numbers and floats; convert it")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageError(f"{label} holds values that are not finite; replace them, as with numpy.nan_to_num")
    if levels == "full" and values.dtype.kind != "f" and values.itemsize > 2 and full is None:
        raise ask_for_levels(f"{label} holds {values.dtype}, and no image fills its whole range")
    if levels == "percentile":
        low, high = (float(v) for v in np.percentile(values, PERCENTILES))
    elif levels != "full":
        low, high = levels
    elif full is not None or values.dtype.kind == "f":
        low, high = 0.0, full or 1.0
    else:
        low, high = float(np.iinfo(values.dtype).min), float(np.iinfo(values.dtype).max)
    # 16-bit integers are exact in float32
    found: np.ndarray[Any, Any] = values.astype(np.float64 if values.itemsize > 2 else np.float32)
    found = np.clip((found - low) / (high - low or 1.0), 0.0, 1.0)  # an image of one value is black
    return found.astype(np.float32)
