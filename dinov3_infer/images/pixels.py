"""Arrays and tensors as images: RGB or grey, 8 bits or floats, or of more bits with the levels that say their range."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..arrays import check_unmasked
from ..errors import ImageError
from .levels import Levels, ask_for_levels, scaled

__all__ = ["from_array", "from_hwc", "from_tensor", "own"]

T = TypeVar("T")

_REMEDY = "drop an alpha channel, or give a PIL image, which is converted"
_CHANNELS = (1, 2, 3, 4)  # what has so few columns is a row of pixels rather than an image


def own(image: T) -> T:
    """An image in memory of its own, where it is one that its giver may fill again; others are as they are."""
    copied: Any = image
    if isinstance(image, np.ndarray):
        copied = image.copy()  # with its mask, if it has one
    elif isinstance(image, Tensor):
        copied = image.detach().clone()
    return copied  # type: ignore[no-any-return]


def from_hwc(array: np.ndarray) -> Tensor:
    """[H_px, W_px, 3] -> [3, H_px, W_px], a copy in which the colours of a pixel stay together."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def from_array(array: np.ndarray, label: str, levels: Levels | None = None) -> Tensor:
    """[H_px, W_px, 3], or grey [H_px, W_px] or [H_px, W_px, 1] -> [3, H_px, W_px] uint8, or float32 in 0..1."""
    shape = f"{label} has shape {list(array.shape)} {array.dtype}"
    check_unmasked(array, label)
    grey = array[..., None] if array.ndim == 2 and array.shape[1] not in _CHANNELS else array
    if grey.ndim != 3 or grey.shape[2] not in (1, 3) or not grey.size:
        swapped = array.ndim == 3 and array.shape[0] in (1, 3)
        hint = "channels first? use a tensor, or arr.transpose(1, 2, 0)" if swapped else _remedy(array.shape)
        raise ImageError(f"an array is [height, width, 3] RGB, or [height, width] grey; {shape}; {hint}")
    found = _in_range(grey, label, shape, levels)
    return from_hwc(np.repeat(found, 3, axis=2) if found.shape[2] == 1 else found)


def from_tensor(tensor: Tensor, label: str, levels: Levels | None = None) -> Tensor:
    """[3, H_px, W_px], or grey [H_px, W_px] or [1, H_px, W_px] -> [3, H_px, W_px] uint8, or float32 in 0..1."""
    shape = f"{label} has shape {list(tensor.shape)} {tensor.dtype}"
    check_unmasked(tensor, label)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise ImageError(f"a tensor holds its pixels one by one; {shape}, which is sparse, quantised, nested or empty")
    grey = tensor[None] if tensor.ndim == 2 and tensor.shape[1] not in _CHANNELS else tensor
    if grey.ndim != 3 or grey.shape[0] not in (1, 3) or not grey.numel():
        swapped = tensor.ndim == 3 and tensor.shape[2] in (1, 3)
        hint = "channels last? use an array, or t.permute(2, 0, 1)" if swapped else _remedy(tensor.shape)
        raise ImageError(f"a tensor is [3, height, width] RGB, or [height, width] grey; {shape}; {hint}")
    grey = grey.detach().cpu()
    grey = grey.float() if grey.dtype in (torch.bfloat16, torch.float16) else grey  # numpy has no bfloat16
    found = grey
    if grey.dtype != torch.uint8:
        found = torch.from_numpy(np.ascontiguousarray(_in_range(grey.numpy(), label, shape, levels)))
    return found[0, :, :, None].repeat(1, 1, 3).permute(2, 0, 1) if len(found) == 1 else found


def _remedy(shape: Sequence[int]) -> str:
    if 0 in shape:
        return "it has no pixels; look where it comes from"
    if len(shape) == 2:
        return "is it a row of an image? give the image"
    return "a batch has four dimensions and is given alone, not in a list" if len(shape) > 3 else _REMEDY


def _in_range(values: np.ndarray, label: str, shape: str, levels: Levels | None) -> np.ndarray:
    """uint8 as it is, others as float32 in 0..1."""
    if values.dtype == np.uint8:
        return values
    if levels is not None:
        return scaled(values, levels, label)
    if values.dtype.kind != "f":
        if values.dtype.kind in "iu":
            raise ask_for_levels(f"pixels are uint8, or float in 0 to 1; {shape}")
        raise ImageError(f"pixels are uint8, or float in 0 to 1; {shape}; scale it to 0 to 255 and convert it to uint8")
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if low >= 0.0 and high <= 1.0:
        return values
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{label} holds values that are not finite; float pixels lie in 0 to 1")
    guess = "is it 0 to 255? then give uint8, else levels=(low, high)"
    guess = "is it normalised already? then call the model itself, else give levels=(low, high)" if low < 0.0 else guess
    raise ImageError(f"float pixels lie in 0 to 1; {label} reaches from {low:.3g} to {high:.3g}: {guess}")
