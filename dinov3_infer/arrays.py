"""Arrays that users give, as tensors: on the device where they lie, and never by torch's defaults."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, InputTypeError

__all__ = ["PLAIN", "as_tensor", "check_unmasked"]

PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}  # of a tensor made here, whatever torch's defaults are


def as_tensor(given: Any, what: str) -> Tensor:
    """A tensor as it is, and an array, a PIL image or a list of numbers as a tensor on the CPU with its own dtype.

    Raises: InputTypeError for what holds no numbers, InputError for an array with a mask.
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
    """Raises InputError for an array whose mask hides values: what lies below a mask is no value."""
    hides = np.ma.is_masked(given) if isinstance(given, np.ndarray) else type(given).__name__ == "MaskedTensor"
    if hides:
        raise InputError(f"{what} has a mask, and what it hides has no value; fill it first, as in a.filled(0)")
