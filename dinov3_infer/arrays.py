"""Converts arrays of users to tensors, on their device and independent of torch's defaults."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, InputTypeError

__all__ = ["PLAIN", "as_tensor", "check_unmasked"]

PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}  # for new tensors, independent of torch's defaults


def as_tensor(given: Any, what: str) -> Tensor:
    """Convert an array, a PIL image or a list of numbers to a CPU tensor of the same shape and dtype.

    Args:
        given: An array of any shape, or a tensor, which is returned unchanged on its device.
        what: Name of the argument in errors.

    Returns: A tensor of the shape of `given`.

    Raises:
        InputTypeError: `given` holds no numbers.
        InputError: `given` has a mask.
    """
    check_unmasked(given, what)
    if isinstance(given, Tensor):
        return given
    if isinstance(given, (list, tuple)) and any(isinstance(one, Tensor) for one in given):
        given = [one.tolist() if isinstance(one, Tensor) else one for one in given]
    try:
        array = np.array(given, order="C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError):
        raise InputTypeError(f"{what} is an array or tensor of numbers; got {type(given).__name__}") from None


def check_unmasked(given: Any, what: str) -> None:
    """Refuse an array or tensor with masked values.

    Raises: InputError.
    """
    hides = np.ma.is_masked(given) if isinstance(given, np.ndarray) else type(given).__name__ == "MaskedTensor"
    if hides:
        raise InputError(f"{what} has masked values; fill them first, as in a.filled(0)")
