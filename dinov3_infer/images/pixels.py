"""Arrays and tensors as images: RGB or grey, 8 bits or floats, or more bits with levels."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..arrays import PLAIN, check_unmasked
from ..errors import ImageError
from .levels import Levels, ask_for_levels, scaled

__all__ = ["RGB", "as_floats", "from_array", "from_hwc", "from_pixels", "from_tensor", "no_rgb", "own"]

T = TypeVar("T")

_REMEDY = "drop an alpha channel, or give a PIL image, which is converted"
RGB = 3  # channels
_CHANNELS = (1, 2, 3, 4)  # a 2D array with so few columns is most likely a row of pixels


def own(image: T) -> T:
    """Copy an array or tensor, so that its owner may overwrite it; other images are returned unchanged."""
    copied: Any = image
    if isinstance(image, np.ndarray):
        copied = image.copy()  # with its mask, if it has one
    elif isinstance(image, Tensor):
        copied = image.detach().clone()
    return copied  # type: ignore[no-any-return]


def as_floats(image: Tensor) -> Tensor:
    """Scale uint8 to float32 in 0..1.  Dividing by a Python number would give torch's default dtype."""
    return image / torch.tensor(255.0, **PLAIN)


def from_hwc(array: np.ndarray) -> Tensor:
    """Copy [H_px, W_px, C] to a tensor [C, H_px, W_px] that stays channels last in memory."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def from_pixels(image: np.ndarray | Tensor, label: str, levels: Levels | None = None, channels: int = RGB) -> Tensor:
    """Convert an array or a tensor to [channels, H_px, W_px], see `from_array` and `from_tensor`.

    Raises: ImageError, as there.
    """
    if isinstance(image, Tensor):
        return from_tensor(image, label, levels, channels)
    return from_array(image, label, levels, channels)


def from_array(array: np.ndarray, label: str, levels: Levels | None = None, channels: int = RGB) -> Tensor:
    """Convert an array to [channels, H_px, W_px] uint8, or float32 in 0..1.

    Args:
        array: [H_px, W_px, 3], or grey: [H_px, W_px] or [H_px, W_px, 1].  With other `channels`:
            [H_px, W_px, channels], and [H_px, W_px] for one channel.
        label: Name of the image in errors.
        levels: See `load_image`.
        channels: Channels of the model.

    Raises:
        ImageError: The shape, dtype or range is wrong.
        InputError: The array has a mask.
    """
    shape = f"{label} has shape {list(array.shape)} {array.dtype}"
    check_unmasked(array, label)
    if channels != RGB:
        layered = array[..., None] if array.ndim == 2 and channels == 1 else array
        if layered.ndim != 3 or layered.shape[2] != channels or not layered.size:
            raise ImageError(f"this model takes an array [height, width, {channels}]; {shape}")
        return from_hwc(_in_range(layered, label, shape, levels))
    grey = array[..., None] if array.ndim == 2 and array.shape[1] not in _CHANNELS else array
    if grey.ndim != 3 or grey.shape[2] not in (1, 3) or not grey.size:
        swapped = array.ndim == 3 and array.shape[0] in (1, 3)
        hint = "channels first? use a tensor, or arr.transpose(1, 2, 0)" if swapped else _remedy(array.shape)
        raise ImageError(f"an array is [height, width, 3] RGB, or [height, width] grey; {shape}; {hint}")
    found = _in_range(grey, label, shape, levels)
    return from_hwc(np.repeat(found, 3, axis=2) if found.shape[2] == 1 else found)


def from_tensor(tensor: Tensor, label: str, levels: Levels | None = None, channels: int = RGB) -> Tensor:
    """Convert a tensor to [channels, H_px, W_px] uint8, or float32 in 0..1, on the CPU.

    Args:
        tensor: [3, H_px, W_px], or grey: [H_px, W_px] or [1, H_px, W_px].  With other `channels`:
            [channels, H_px, W_px], and [H_px, W_px] for one channel.
        label: Name of the image in errors.
        levels: See `load_image`.
        channels: Channels of the model.

    Raises:
        ImageError: The shape, dtype or range is wrong, or the tensor is sparse, quantised, nested or on "meta".
        InputError: The tensor has a mask.
    """
    shape = f"{label} has shape {list(tensor.shape)} {tensor.dtype}"
    check_unmasked(tensor, label)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise ImageError(f"{shape} and is sparse, quantised, nested or on 'meta'; give a dense tensor of pixel values")
    grey = tensor[None] if tensor.ndim == 2 and (channels == 1 or tensor.shape[1] not in _CHANNELS) else tensor
    if channels != RGB and (grey.ndim != 3 or grey.shape[0] != channels or not grey.numel()):
        raise ImageError(f"this model takes a tensor [{channels}, height, width]; {shape}")
    if channels == RGB and (grey.ndim != 3 or grey.shape[0] not in (1, 3) or not grey.numel()):
        swapped = tensor.ndim == 3 and tensor.shape[2] in (1, 3)
        hint = "channels last? use an array, or t.permute(2, 0, 1)" if swapped else _remedy(tensor.shape)
        raise ImageError(f"a tensor is [3, height, width] RGB, or [height, width] grey; {shape}; {hint}")
    grey = grey.detach().cpu()
    grey = grey.float() if grey.dtype in (torch.bfloat16, torch.float16) else grey  # numpy has no bfloat16
    found = grey
    if grey.dtype != torch.uint8:
        found = torch.from_numpy(np.ascontiguousarray(_in_range(grey.numpy(), label, shape, levels)))
    return found[0, :, :, None].repeat(1, 1, 3).permute(2, 0, 1) if len(found) == 1 and channels == RGB else found


def no_rgb(label: str, channels: int) -> ImageError:
    """The error for a file where the model takes other channels than RGB."""
    return ImageError(
        f"{label} would be read as RGB, and this model takes {channels} channels; give an array "
        f"[height, width, {channels}] or a tensor [{channels}, height, width]"
    )


def _remedy(shape: Sequence[int]) -> str:
    if 0 in shape:
        return "it has no pixels; check where it comes from"
    if len(shape) == 2:
        return "is it a row of an image? give the image"
    return "give a batch of four dimensions alone, not in a list" if len(shape) > 3 else _REMEDY


def _in_range(values: np.ndarray, label: str, shape: str, levels: Levels | None) -> np.ndarray:
    """uint8 unchanged, other dtypes as float32 in 0..1."""
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
    guess = "if it is 0 to 255, give uint8, else give levels=(low, high)"
    guess = "if it is normalised already, call the model itself, else give levels=(low, high)" if low < 0.0 else guess
    raise ImageError(f"float pixels lie in 0 to 1; {label} reaches from {low:.3g} to {high:.3g}; {guess}")
