"""From an image to normalised pixels, and the geometry that maps the pixels back to the image.

torch or Pillow resizes.  `engine="uint8"` gives the values of torchvision's v2 transforms on a uint8 tensor (Meta's
DINOv3 code), `"float"` those on a float tensor (transformers' DINOv3), `"pil"` those on PIL images (Meta's and
transformers' DINOv2, timm).
"""

import math
import reprlib
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..arrays import PLAIN
from ..errors import InputError, check_choice
from .decode import ImageLike, load_image
from .levels import Levels, as_levels
from .pixels import as_floats, from_hwc

__all__ = ["Fit", "PixelBatch", "Placement", "Preprocess"]

Fit = Literal["squash", "crop", "pad", "native"]
Engine = Literal["uint8", "float", "pil"]
Filter = Literal["bilinear", "bicubic"]
Rounding = Literal["down", "even"]  # crop offsets of half a pixel: transformers rounds down, torchvision to even

MAX_PIXELS = 2**26  # largest image after resizing: 768 MiB in float32
MAX_SIDE = 4096  # longest side in pixels without an explicit size: 65,536 patches of 16


@dataclass(frozen=True)
class Placement:
    """The geometry of one image: it was resized to `resized`, and the model saw the window (top, left, height, width).

    All values are in pixels.  A window larger than the resized image is padded at the bottom and on the right.
    """

    original: tuple[int, int]  # height, width, after EXIF rotation
    resized: tuple[int, int]
    window: tuple[int, int, int, int]

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """Map (x, y) of the original image to (x, y) of the model's input, in pixels."""
        (height, width), (top, left, _, _) = self.original, self.window
        return x * self.resized[1] / width - left, y * self.resized[0] / height - top

    def to_patch(self, x: float, y: float, grid: tuple[int, int]) -> tuple[int, int]:
        """Find the patch that covers pixel (x, y) of the original image.

        Args:
            grid: (h, w) of the input in patches.

        Returns: (row, column) of the patch.

        Raises:
            InputError: The point is outside the image, or in a part that was cropped away.
        """
        height, width = self.original
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"point (x={x:g}, y={y:g}) is outside the image, which is {width} wide and {height} high")
        across, down = self.to_input(x, y)
        row, column = int(down * grid[0] // self.window[2]), int(across * grid[1] // self.window[3])
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise InputError(f"point (x={x:g}, y={y:g}) was cropped away; use fit='squash', 'pad' or 'native'")
        return row, column


@dataclass(frozen=True)
class PixelBatch:
    """A batch for the model."""

    pixels: Tensor  # [B, 3, H_px, W_px] float32 and normalised, or uint8 if requested
    placements: tuple[Placement, ...]
    valid: Tensor | None  # [B, h, w] bool: False for patches of padding; None without padding


@dataclass(frozen=True)
class Preprocess:
    """Turns images into normalised float32 pixels [3, H_px, W_px]; picklable, so usable as a Dataset's transform.

    Args:
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel.
        patch_size: Side of a patch in pixels.
        size: Side in pixels, or (height, width); multiples of `patch_size`.
        fit: "squash" resizes to `size`.  "crop" resizes the short side to `resize_to` (default: `size`) and crops the
            centre.  "pad" resizes the long side to `size` and pads with the mean colour.  "native" keeps the aspect
            ratio with the long side at `size` (None: unchanged), and rounds each side to whole patches.
        filter: "bilinear" or "bicubic".
        engine: Whose arithmetic is reproduced, see above.
        resize_to: Short side in pixels before a centre crop.
        crop_rounds: Rounding of crop offsets.
        levels: Black and white of images with more than 8 bits per channel, see `load_image`.

    Raises:
        InputError: A value is out of range, or the values do not fit each other.

    Example:
        >>> Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), patch_size=16)("photo.jpg")  # [3, 224, 224]
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int
    size: int | tuple[int, int] | None = 224
    fit: Fit = "squash"
    filter: Filter = "bilinear"
    engine: Engine = "uint8"
    resize_to: int | None = None
    crop_rounds: Rounding = "even"
    levels: Levels | None = None

    def __post_init__(self) -> None:
        for name, known in (("fit", Fit), ("filter", Filter), ("engine", Engine), ("crop_rounds", Rounding)):
            check_choice(name, getattr(self, name), known)
        object.__setattr__(self, "levels", as_levels(self.levels))
        for name in ("mean", "std"):
            values = getattr(self, name)
            low = 1e-6 if name == "std" else -1e6
            if (
                not isinstance(values, (tuple, list))
                or not values
                or not all(isinstance(v, (int, float)) and low <= v <= 1e6 for v in values)
            ):
                raise InputError(
                    f"{name} is three numbers, of red, green and blue in 0 to 1{', above 0' if name == 'std' else ''}, "
                    f"or one number per channel; got {reprlib.repr(values)}"
                )
        if len(self.mean) != len(self.std):
            other = "std" if len(self.mean) == 3 else "mean"
            raise InputError(
                f"{other} is three numbers, or one number per channel; got {len(self.mean)} for mean and "
                f"{len(self.std)} for std"
            )
        if not isinstance(self.patch_size, (int, np.integer)) or self.patch_size < 1:
            raise InputError(f"patch_size is a whole number of pixels above 0; got {self.patch_size!r}")
        if self.size is None:
            if self.fit != "native":
                raise InputError(
                    f"fit={self.fit!r} needs a size in pixels; give size=, or fit='native' to keep the image's size"
                )
            return
        sides: tuple[int, ...] = tuple(self.size) if isinstance(self.size, (tuple, list)) else (self.size,)
        if len(sides) not in (1, 2) or not all(isinstance(s, (int, np.integer)) and s > 0 for s in sides):
            raise InputError(
                f"size is a number of pixels or (height, width), got {self.size!r}; give whole numbers above 0"
            )
        sides = tuple(int(s) for s in sides)
        object.__setattr__(self, "size", sides if len(sides) == 2 else sides[0])
        if self.fit == "native":
            if len(sides) == 2:
                raise InputError(
                    f"fit='native' takes one size, the long side; got {self.size!r}, which needs fit='squash'"
                )
            return
        if any(s % self.patch_size for s in sides):
            nearest = tuple(max(1, round(s / self.patch_size)) * self.patch_size for s in sides)
            raise InputError(
                f"size {self.size} is not a multiple of the patch size {self.patch_size}; "
                f"the nearest is {nearest[0] if len(nearest) == 1 else nearest}"
            )
        if self.resize_to is not None and self.resize_to < max(sides):
            raise InputError(f"resize_to {self.resize_to} is below the crop size {self.size}; give a larger value")

    @property
    def channels(self) -> int:
        """Channels of an image; 3 means RGB, and other numbers accept only arrays and tensors."""
        return len(self.mean)

    def with_options(
        self, size: int | tuple[int, int] | None = None, fit: Fit | None = None, levels: Levels | None = None
    ) -> "Preprocess":
        """A copy with another size, fit or levels; None keeps a value, but a new fit "native" without size keeps each
        image's size.

        Raises: InputError, as in the constructor.
        """
        if levels is not None and (levels := as_levels(levels)) != self.levels:
            return replace(self, levels=levels).with_options(size, fit)
        fit = self.fit if fit is None else fit
        if fit == self.fit and (size is None or size == self.size):
            return self
        if size is None:
            size = None if fit == "native" else self.size
        return replace(self, size=size, fit=fit, resize_to=None)

    def __call__(self, image: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Preprocess one image or a list of images.

        Args:
            image: Anything that `load_image` accepts, or a list of these.

        Returns: Float32 pixels [3, H_px, W_px] of one image, or [B, 3, H_px, W_px] of a list.

        Raises:
            ImageError, MissingFileError: An image cannot be read.
            InputError: The images of a list get different sizes.

        Example:
            >>> bb.preprocess("cat.jpg").shape, bb.preprocess(["cat.jpg", "dog.jpg"]).shape
            (torch.Size([3, 256, 256]), torch.Size([2, 3, 256, 256]))
        """
        if isinstance(image, list | tuple):
            return self.batch(image).pixels
        return self.place(load_image(image, levels=self.levels, channels=self.channels))[0]  # type: ignore[arg-type]  # str and bytes are Sequences too

    def batch(self, images: Iterable[ImageLike], for_gpu: bool = False) -> PixelBatch:
        """Preprocess images that get one size as a batch [B, 3, H_px, W_px]; for `for_gpu` see `place`.

        Raises: InputError if the sizes differ or there are no images; ImageError, MissingFileError.
        """
        several = not isinstance(images, Sized) or len(images) > 1
        placed = []
        for i, image in enumerate(images):  # one by one: a stream may reuse one array
            label = f"item {i}" if several else "the image"
            placed.append(self.place(load_image(image, label, self.levels, self.channels), label, for_gpu=for_gpu))
        if not placed:
            raise InputError("got no images; give at least one")
        return self.collate(placed, for_gpu)

    def collate(self, placed: Sequence[tuple[Tensor, Placement]], for_gpu: bool = False) -> PixelBatch:
        """Stack results of `place`, [3, H_px, W_px] each, to a batch [B, 3, H_px, W_px].

        `for_gpu` uses pinned memory, from which a GPU copies while the host goes on.

        Raises: InputError if the sizes differ.
        """
        grids = {tuple(side // self.patch_size for side in pixels.shape[1:]): None for pixels, _ in placed}
        if len(grids) > 1:
            shown = ", ".join(f"{h}x{w}" for h, w in list(grids)[:3])
            raise InputError(f"the images give different grids ({shown} patches); use iter_features(), or fit='squash'")
        placements = tuple(placement for _, placement in placed)
        each = [pixels for pixels, _ in placed]
        if len({pixels.dtype for pixels in each}) > 1:
            each = [self._normalised(pixels) if pixels.dtype == torch.uint8 else pixels for pixels in each]
        # torch caches pinned memory, and reuses it once all copies from it are done
        pin = for_gpu and torch.cuda.is_available()
        whole = torch.empty((len(each), *each[0].shape), dtype=each[0].dtype, device="cpu", pin_memory=pin)
        pixels = torch.stack(each, out=whole)
        return PixelBatch(pixels, placements, self._valid(placements))

    def place(
        self,
        image: Tensor,  # [3, H_px, W_px]
        label: str = "the image",
        original: tuple[int, int] | None = None,  # (height, width) before the decoder reduced it
        for_gpu: bool = False,
    ) -> tuple[Tensor, Placement]:
        """Resize, crop or pad, and normalise one image; returns pixels [3, H_px, W_px] and their placement.

        With `for_gpu` an 8-bit image without padding stays uint8, a quarter of the bytes, and the GPU normalises it.
        Padding needs floats, since the mean colour is no whole number.

        Raises: InputError if the image is too large for this transform.
        """
        placement = self.plan(*(original or (image.shape[1], image.shape[2])), label)
        resized = self._resize(image, placement.resized)
        top, left, height, width = placement.window
        resized = resized[:, top : top + height, left : left + width].contiguous()
        if for_gpu and resized.dtype == torch.uint8 and tuple(resized.shape[1:]) == (height, width):
            return resized, placement
        pixels = self._normalised(resized)
        return F.pad(pixels, (0, width - pixels.shape[2], 0, height - pixels.shape[1])), placement

    def _normalised(self, image: Tensor) -> Tensor:
        """Normalise [3, H_px, W_px] uint8, or floats in 0..1, to float32."""
        mean, std = (torch.tensor(v, **PLAIN).view(-1, 1, 1) for v in (self.mean, self.std))
        pixels = as_floats(image).sub_(mean) if image.dtype == torch.uint8 else image - mean
        return pixels.div_(std)

    def plan(self, height: int, width: int, label: str = "the image") -> Placement:
        """The placement of an image of this size in pixels.

        Raises: InputError if the result is too large.
        """
        placement = self._plan((height, width), label)
        if math.prod(placement.resized) > MAX_PIXELS:
            shown = "x".join(str(side) for side in placement.resized)
            other = "" if self.fit == "squash" else ", or fit='squash'"
            raise InputError(
                f"{label} is {height}x{width} pixels and would become {shown}; give a smaller size={other}"
            )
        return placement

    def _plan(self, original: tuple[int, int], label: str) -> Placement:
        height, width = original
        if isinstance(self.size, int):
            target = (self.size, self.size)
        else:
            target = self.size or (height, width)
        if self.fit == "squash":
            return Placement(original, target, (0, 0, *target))
        if self.fit == "crop":
            if target[0] == target[1]:
                short = self.resize_to or target[0]
                resized = (
                    (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
                )
            else:
                cover = max(want / have for have, want in zip(original, target, strict=True))
                resized = (max(target[0], round(height * cover)), max(target[1], round(width * cover)))
            spare = [have - want for have, want in zip(resized, target, strict=True)]
            top, left = (s // 2 if self.crop_rounds == "down" else round(s / 2) for s in spare)
            return Placement(original, resized, (top, left, *target))
        if self.size is None and max(original) > MAX_SIDE:
            patches = math.prod(max(1, round(side / self.patch_size)) for side in original)
            raise InputError(
                f"{label} is {height}x{width} pixels, which gives {patches:,} patches; pass size= for its long side"
            )
        factor = min(t / o for t, o in zip(target, original, strict=True))
        rounded = [max(1, round(side * factor / self.patch_size)) * self.patch_size for side in original]
        if self.fit == "native":
            return Placement(original, (rounded[0], rounded[1]), (0, 0, rounded[0], rounded[1]))
        fitted = (min(rounded[0], target[0]), min(rounded[1], target[1]))
        return Placement(original, fitted, (0, 0, *target))

    def _resize(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize [3, H_px, W_px]; uint8 stays uint8 unless the engine is "float", and torch resizes float images."""
        if self.engine == "float" and image.dtype == torch.uint8:  # by channel, since a large image would take 1 GiB
            return torch.cat([self._resize(as_floats(channel[None]), size) for channel in image])
        if tuple(image.shape[1:]) == size:
            return image
        if self.engine == "pil" and image.dtype == torch.uint8:
            resample = Image.Resampling[self.filter.upper()]
            if image.shape[0] != 3:  # channel by channel, since Pillow has no mode for so many
                return torch.cat([self._pil_grey(channel, size) for channel in image])
            found = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((size[1], size[0]), resample)
            return from_hwc(np.asarray(found))
        return F.interpolate(image[None], size=size, mode=self.filter, antialias=True)[0]

    def _pil_grey(self, channel: Tensor, size: tuple[int, int]) -> Tensor:
        image = Image.fromarray(channel.contiguous().numpy())
        resized = image.resize((size[1], size[0]), Image.Resampling[self.filter.upper()])
        return torch.from_numpy(np.array(resized))[None]

    def _valid(self, placements: Sequence[Placement]) -> Tensor | None:
        if self.fit != "pad":
            return None
        height, width = (side // self.patch_size for side in placements[0].window[2:])
        valid = torch.zeros(len(placements), height, width, dtype=torch.bool, device="cpu")
        for mask, placement in zip(valid, placements, strict=True):
            mask[: placement.resized[0] // self.patch_size, : placement.resized[1] // self.patch_size] = True
        return valid
