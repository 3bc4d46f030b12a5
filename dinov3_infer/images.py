"""From anything that is a picture to RGB pixels."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError, InputTypeError, MissingFileError

__all__ = ["ImageLike", "from_hwc", "load_image", "split_batch"]

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | Tensor

_DIRECT = ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV")
_ALPHA = ("RGBA", "LA", "PA", "RGBa")
_REMEDY = "repeat a grey channel three times, drop an alpha channel, or give a PIL image, which is converted"


def split_batch(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """One picture, a 4-dimensional batch, or any iterable of pictures -> a list."""
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (str, os.PathLike, bytes, Image.Image, Tensor, np.ndarray)) or hasattr(images, "read"):
        return [images]  # type: ignore[list-item]
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise InputTypeError(
            f"a picture is a path, PIL image, array, tensor or a list of these; got {type(images).__name__}"
        )
    return list(images)


def load_image(source: ImageLike, label: str = "the picture") -> Tensor:
    """Any picture as RGB, [3, H_px, W_px]: uint8 in 0..255, or float32 in 0..1 if it came as float.

    Files are turned upright by their EXIF tag, transparency is laid over white, of an animation the first frame counts.
    Arrays are [H_px, W_px, 3], tensors [3, H_px, W_px], RGB, uint8 or float in 0..1.

    Raises: MissingFileError, ImageError (damaged, 16-bit or float modes, wrong shape or range), InputTypeError.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source, label)
    if isinstance(source, np.ndarray):
        return _from_array(source, label)
    if isinstance(source, Image.Image):
        return _decoded(lambda: _from_pil(source, label), label)
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), f"{label} ({len(source)} bytes)")
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if "://" in path:
            raise ImageError(f"'{path.split('?')[0]}' is an address; download the picture and give its path or bytes")
        if os.path.isdir(path) or not path:
            raise ImageError(f"'{path}' is a folder; give the pictures in it as a list of paths")
        if not os.path.isfile(path):
            raise MissingFileError(f"no picture at '{os.path.abspath(path)}'; check the path")
        return _from_file(path, f"'{path}'")
    if hasattr(source, "read"):
        return _from_file(io.BytesIO(source.read()), label)
    raise InputTypeError(f"a picture is a path, bytes, PIL image, array or tensor; {label} is {type(source).__name__}")


def _from_file(file: str | io.BytesIO, label: str) -> Tensor:
    def read() -> Tensor:
        with contextlib.ExitStack() as opened:  # Pillow leaves a file of its own open where it fails
            stream = opened.enter_context(open(file, "rb")) if isinstance(file, str) else file
            return _from_pil(opened.enter_context(Image.open(stream)), label)

    return _decoded(read, label)


def _decoded(read: Callable[[], Tensor], label: str) -> Tensor:
    """What Pillow says of a bad picture, in our words."""
    try:
        return read()
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            f"{label} has more pixels than Pillow trusts; raise PIL.Image.MAX_IMAGE_PIXELS if you do"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{label} is not a picture that Pillow can read; convert it to PNG or JPEG") from None
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        reason = str(error).split("<")[0].strip() or type(error).__name__  # Pillow prints addresses of objects in <>
        raise ImageError(f"cannot decode {label}: {reason}; the file is damaged or cut short") from None


def _from_pil(picture: Image.Image, label: str) -> Tensor:
    if 0 in picture.size:
        raise ImageError(f"{label} has no pixels, it is {picture.width} wide and {picture.height} high")
    if picture.mode not in (*_DIRECT, *_ALPHA):
        raise ImageError(
            f"{label} has mode {picture.mode}, whose range is not 0 to 255; convert it yourself, e.g. scale to 8 bit"
        )
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in _ALPHA or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return from_hwc(np.asarray(picture.convert("RGB")))


def from_hwc(array: np.ndarray) -> Tensor:
    """[H_px, W_px, 3] -> [3, H_px, W_px], contiguous and its own."""
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def _from_array(array: np.ndarray, label: str) -> Tensor:
    shape = f"{label} has shape {list(array.shape)} {array.dtype}"
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        swapped = array.ndim == 3 and array.shape[0] == 3
        hint = "channels first? use a tensor, or arr.transpose(1, 2, 0)" if swapped else _REMEDY
        raise ImageError(f"an array is [height, width, 3] RGB; {shape}; {hint}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ImageError(f"pixels are uint8, or float in 0 to 1; {shape}; scale it to 0 to 255 and convert it to uint8")
    return _in_range(from_hwc(array if array.dtype == np.uint8 else array.astype(np.float32)), label)


def _from_tensor(tensor: Tensor, label: str) -> Tensor:
    shape = f"{label} has shape {list(tensor.shape)} {tensor.dtype}"
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not tensor.numel():
        swapped = tensor.ndim == 3 and tensor.shape[2] == 3
        hint = "channels last? use an array, or t.permute(2, 0, 1)" if swapped else _REMEDY
        raise ImageError(f"a tensor is [3, height, width] RGB; {shape}; {hint}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"pixels are uint8, or float in 0 to 1; {shape}; scale it to 0 to 255 and convert it to uint8")
    return _in_range(tensor.detach().cpu(), label)


def _in_range(image: Tensor, label: str) -> Tensor:
    """uint8 as it is, float as float32 if it lies in 0..1."""
    if image.dtype == torch.uint8:
        return image
    image = image.float()
    low, high = (float(v) for v in image.aminmax())
    if low >= 0.0 and high <= 1.0:
        return image
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{label} holds values that are not finite; float pixels lie in 0 to 1")
    guess = "is it normalised already? then call the model itself" if low < 0.0 else "is it 0 to 255? then give uint8"
    raise ImageError(f"float pixels lie in 0 to 1; {label} reaches from {low:.3g} to {high:.3g}: {guess}")
