"""Views of an image for self-supervised training: random crops, their augmentations, and masks of patches.

The augmentations are those of DINOv2 and DINOv3, with the probabilities that trained the released models.  All random
draws come from the generator that the caller gives.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..system import keep_freed_memory

__all__ = ["Batch", "ViewConfig", "Views", "block_mask", "collate", "make_views", "masked_counts"]

Region: TypeAlias = tuple[int, int, int, int]  # top, left, height, width in pixels
Range: TypeAlias = tuple[float, float]

ASPECT = (3 / 4, 4 / 3)  # width / height of a crop
SIGMA = (0.1, 2.0)  # standard deviation of the blur, in pixels
SOLARIZE_FROM = 128
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
TAPS = 4  # of the blur on each side, so a kernel of 9
NEGLIGIBLE = 1e-4  # smallest weight of a tap; below it no pixel changes by a tenth of a grey level

# Of hue h in 0..6, the share of the chroma that each channel gets is clamp(sign * |h - centre| + offset, 0, 1).
_CENTRE, _SIGN, _OFFSET = (
    torch.tensor(v, dtype=torch.float32, device="cpu").view(3, 1, 1)
    for v in ((3.0, 2.0, 4.0), (1.0, -1.0, -1.0), (-1.0, 2.0, 2.0))
)


@dataclass(frozen=True)
class ViewConfig:
    """Settings of the views of an image.  Defaults: DINOv2's and DINOv3's recipe for a ViT-L on ImageNet.

    The published code inverts its blur probabilities, and the released models were trained so; these are the
    probabilities in effect.

    Raises:
        InputError: a side is no multiple of the patch size, or a range or probability is wrong.
    """

    global_px: int = 224  # side of the two global crops
    local_px: int = 96
    gram_px: int | None = None  # second size of the global crops, for a teacher with another input size
    num_local: int = 8
    global_scale: Range = (0.32, 1.0)  # share of the image's area in a global crop
    local_scale: Range = (0.05, 0.32)  # in a local crop
    flip: float = 0.5  # probability, like each number below without another comment
    jitter_probability: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    grey: float = 0.2
    global_blur: tuple[float, float] = (0.0, 0.9)  # crop 1, crop 2
    local_blur: float = 0.5
    solarize: float = 0.2  # crop 2
    gram_distortions: bool = False  # augment the colours of the Gram crops as those of the global crops
    patch_size: int = 16  # of the student, in pixels
    mask_probability: float = 0.5  # share of the global crops of a step that are masked
    mask_ratio: Range = (0.1, 0.5)  # share of the patches of a masked crop
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("global_px", "local_px") if self.num_local else ("global_px",):
            if (side := getattr(self, name)) < 1 or side % self.patch_size:
                nearest = max(1, round(side / self.patch_size)) * self.patch_size
                raise InputError(
                    f"{name}={side} is not a multiple of the patch size {self.patch_size}; the nearest is {nearest}"
                )
        for name in ("global_scale", "local_scale", "mask_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InputError(f"{name}={(low, high)} is no range of shares; give 0 < low <= high <= 1")
        chances = {"global_blur": max(self.global_blur, key=lambda p: abs(p - 0.5))} | {
            name: getattr(self, name)
            for name in ("flip", "jitter_probability", "grey", "local_blur", "solarize", "mask_probability")
        }
        for name, value in chances.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value} is no probability; give a number from 0 to 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a global crop, (rows, columns)."""
        side = self.global_px // self.patch_size
        return side, side

    @property
    def image_px(self) -> int:
        """Shortest side, in pixels, of an image whose smallest crops are not enlarged."""
        largest = max(self.global_px, self.gram_px or 0) / math.sqrt(self.global_scale[0])
        local = self.local_px / math.sqrt(self.local_scale[0]) if self.num_local else 0.0
        return math.ceil(max(largest, local))

    @property
    def image_bytes(self) -> int:
        """Bytes of all views of one image."""
        return 3 * (2 * self.global_px**2 + self.num_local * self.local_px**2 + 2 * (self.gram_px or 0) ** 2)


class Views(NamedTuple):
    """The views of one image, uint8 and not normalised: a quarter of the bytes of float32 on the way from a worker."""

    global_crops: Tensor  # [2, 3, S, S]
    local_crops: Tensor  # [L, 3, s, s]
    gram_crops: Tensor | None  # [2, 3, g, g]


class Batch(NamedTuple):
    """The views of B images, crop-major: crop 1 of all images, then crop 2 of all images, and so on."""

    global_crops: Tensor  # [2*B, 3, S, S] float32, normalised
    local_crops: Tensor  # [L*B, 3, s, s] float32, normalised
    gram_crops: Tensor | None  # [2*B, 3, g, g] float32, normalised
    masks: Tensor  # [2*B, P] bool, True for patches hidden from the student
    indices: Tensor  # [B] int64, numbers of the images


def collate(
    views: Sequence[Views], masks: Tensor, indices: Tensor, config: ViewConfig, device: torch.device | str = "cpu"
) -> Batch:
    """Joins the views of B images into a batch on the device, and normalises the pixels there.

    Args:
        views: each holds several images: global_crops [n, 2, 3, S, S], local_crops [n, L, 3, s, s], gram_crops
            [n, 2, 3, g, g] or None; the n add up to B.
        masks: [B, 2, P] bool.
        indices: [B], numbers of the images.
        config: settings with the mean and std of the normalisation.
        device: where the batch is put.
    """
    mean, std = (
        255.0 * torch.tensor(v, dtype=torch.float32, device=device).view(1, 3, 1, 1) for v in (config.mean, config.std)
    )

    def gather(parts: Sequence[Tensor]) -> Tensor:
        together = torch.cat([part.to(device, non_blocking=True) for part in parts])
        return together.transpose(0, 1).flatten(0, 1).float().sub_(mean).div_(std)

    gram = [part.gram_crops for part in views if part.gram_crops is not None]
    return Batch(
        gather([part.global_crops for part in views]),
        gather([part.local_crops for part in views]),
        gather(gram) if gram else None,
        masks.transpose(0, 1).flatten(0, 1).to(device),
        indices,
    )


def make_views(image: Tensor, config: ViewConfig, generator: torch.Generator) -> Views:
    """Draws the crops of an image, uint8 [3, H_px, W_px]."""
    keep_freed_memory()
    draw = _uniform(generator)
    image = torch.stack(image.unbind(0), -1).permute(2, 0, 1) if image.stride(0) != 1 else image
    large = max(config.global_px, config.gram_px or 0) if config.gram_distortions else config.global_px
    crops = torch.empty(2, 3, config.global_px, config.global_px, dtype=torch.uint8, device="cpu")
    gram = None
    if config.gram_px is not None:
        gram = torch.empty(2, 3, config.gram_px, config.gram_px, dtype=torch.uint8, device="cpu")
    for k in range(2):
        region, flip = _region(image, config.global_scale, draw), next(draw) < config.flip
        crop = _cut(image, region, flip, large)
        distorted = _distort(crop, config, draw, config.global_blur[k], config.solarize if k else 0.0)
        crops[k] = _resize(distorted, config.global_px)
        if gram is not None:
            seen = distorted if config.gram_distortions else _cut(image, region, flip, gram.shape[-1])
            gram[k] = _resize(seen, gram.shape[-1])
    local = torch.empty(config.num_local, 3, config.local_px, config.local_px, dtype=torch.uint8, device="cpu")
    for k in range(config.num_local):
        region, flip = _region(image, config.local_scale, draw), next(draw) < config.flip
        local[k] = _distort(_cut(image, region, flip, config.local_px), config, draw, config.local_blur, 0.0)
    return Views(crops, local, gram)


def _uniform(generator: torch.Generator) -> Iterator[float]:
    """Random numbers in [0, 1); one call of torch draws many of them."""
    while True:
        yield from torch.rand(256, generator=generator, dtype=torch.float32, device="cpu").tolist()


def _between(low: float, high: float, draw: Iterator[float]) -> float:
    return low + (high - low) * next(draw)


def _region(image: Tensor, scale: Range, draw: Iterator[float]) -> Region:
    """A random region of random area and aspect; if ten draws do not fit, the largest one in the middle."""
    height, width = image.shape[1:]
    for _ in range(10):
        area = height * width * _between(*scale, draw)
        aspect = math.exp(_between(math.log(ASPECT[0]), math.log(ASPECT[1]), draw))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(next(draw) * (height - h + 1)), int(next(draw) * (width - w + 1)), h, w
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def _cut(image: Tensor, region: Region, flip: bool, size: int) -> Tensor:
    top, left, height, width = region
    crop = _resize(image[:, top : top + height, left : left + width], size)
    return crop.flip(-1) if flip else crop


def _resize(image: Tensor, size: int) -> Tensor:
    """Resizes uint8 [3, H, W] to uint8 [3, size, size]."""
    if image.shape[1:] == (size, size):
        return image
    packed = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(packed, size=(size, size), mode="bicubic", antialias=True)[0].contiguous()


def _distort(crop: Tensor, config: ViewConfig, draw: Iterator[float], blurred: float, solarized: float) -> Tensor:
    """Colour jitter in random order, greyscale, blur (probability `blurred`), solarisation; uint8 to uint8."""
    pixels = crop.float()
    if next(draw) < config.jitter_probability:
        amounts = [_between(-strength, strength, draw) for strength in config.jitter]
        for turn in sorted(range(4), key=[next(draw) for _ in range(4)].__getitem__):
            JITTERS[turn](pixels, amounts[turn])
    if next(draw) < config.grey:
        greyscale(pixels)
    if next(draw) < blurred:
        pixels = blur(pixels, _between(*SIGMA, draw))
    if next(draw) < solarized:
        solarize(pixels, SOLARIZE_FROM)
    return pixels.add_(0.5).to(torch.int16).to(torch.uint8)  # three times as fast as without int16


# --- augmentations of one crop, float32 RGB [3, H, W] in 0..255, changed in place; fast on one core for small crops --


def brightness(pixels: Tensor, amount: float) -> None:
    """Multiplies the brightness of a crop [3, H, W] by 1 + amount."""
    pixels.mul_(1 + amount).clamp_(0, 255)


def contrast(pixels: Tensor, amount: float) -> None:
    """Multiplies the distance of a crop [3, H, W] from its mean grey by 1 + amount."""
    mean = float(_luma(pixels).mean())
    pixels.mul_(1 + amount).sub_(amount * mean).clamp_(0, 255)


def saturation(pixels: Tensor, amount: float) -> None:
    """Multiplies the distance of each pixel of a crop [3, H, W] from its grey by 1 + amount."""
    grey = _luma(pixels)
    pixels.mul_(1 + amount).sub_(grey, alpha=amount).clamp_(0, 255)


def hue(pixels: Tensor, amount: float) -> None:
    """Rotates the hue of a crop [3, H, W] by a share of the full circle; HSV value and saturation stay."""
    red, green, blue = pixels
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = high.sub_(low)
    # The hue from -3 to 3, with red at 0 and green at 2.  Its absolute value is (chroma - red + green + blue - low) /
    # chroma, for each largest channel; it is negative if there is more blue than green.
    turned = torch.add(chroma, green).sub_(red).add_(blue).sub_(low).div_(chroma.clamp_min(1e-6))
    turned = turned.copysign_(green - blue).add_(6 * amount)
    turned.sub_(torch.floor(turned / 6), alpha=6)
    share = (turned - _CENTRE).abs_()
    share.mul_(_SIGN).add_(_OFFSET).clamp_(0, 1)
    torch.addcmul(low, chroma, share, out=pixels)


def greyscale(pixels: Tensor) -> None:
    """Sets all channels of a crop [3, H, W] to its luma."""
    pixels.copy_(_luma(pixels).expand_as(pixels))


def solarize(pixels: Tensor, threshold: float) -> None:
    """Inverts the values of a crop [3, H, W] from the threshold upwards."""
    torch.where(pixels >= threshold, 255 - pixels, pixels, out=pixels)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """A crop [3, H, W] blurred by a Gaussian of `sigma` pixels, with a kernel of 9 and mirrored borders; a new tensor.

    Uses shifted additions, which on one core are faster than a convolution or Pillow's filter.
    """
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(TAPS + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [weight / total for weight in weights if weight > NEGLIGIBLE * total]
    reach = len(weights) - 1
    pixels = F.pad(pixels[None], (reach,) * 4, mode="reflect")[0]
    for dim in (-1, -2):
        size = pixels.shape[dim] - 2 * reach
        blurred = pixels.narrow(dim, reach, size) * weights[0]
        for i in range(1, reach + 1):
            blurred.add_(pixels.narrow(dim, reach - i, size), alpha=weights[i])
            blurred.add_(pixels.narrow(dim, reach + i, size), alpha=weights[i])
        pixels = blurred
    return pixels


def _luma(pixels: Tensor) -> Tensor:  # [H, W]
    return torch.mul(pixels[0], LUMA[0]).add_(pixels[1], alpha=LUMA[1]).add_(pixels[2], alpha=LUMA[2])


JITTERS = (brightness, contrast, saturation, hue)  # in the order of ViewConfig.jitter

# --- masks -------------------------------------------------------------------------------------------------------


def masked_counts(
    crops: int, patches: int, generator: torch.Generator, probability: float = 0.5, ratio: Range = (0.1, 0.5)
) -> list[int]:
    """Number of masked patches of each crop of a step, in random order.

    A share `probability` of the crops gets evenly spaced shares of its patches, from low to high; the others get 0.
    """
    masked = int(crops * probability)
    low, high = ratio
    ladder = [int(patches * (high - (high - low) * i / masked)) for i in range(masked)] + [0] * (crops - masked)
    return [ladder[i] for i in torch.randperm(crops, generator=generator, device="cpu").tolist()]


def block_mask(grid: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """A mask [P] bool with exactly `count` patches: random rectangles, then single patches for the rest.

    Source: BEiT (arXiv 2106.08254), section 2.3, with the bounds of DINOv2 and DINOv3.
    """
    rows, columns = grid
    draw = _uniform(generator)
    mask = torch.zeros(rows, columns, dtype=torch.bool, device="cpu").numpy()
    left = count
    tries = 0
    while left > 0 and tries < 10:
        tries += 1
        area, aspect = _between(4, left, draw), math.exp(_between(math.log(0.3), -math.log(0.3), draw))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < rows and 0 < w < columns):
            continue
        y, x = int(next(draw) * (rows - h + 1)), int(next(draw) * (columns - w + 1))
        block = mask[y : y + h, x : x + w]
        new = h * w - int(block.sum())
        if 0 < new <= left:
            block[:] = True
            left -= new
            tries = 0
    flat = torch.from_numpy(mask.reshape(-1))
    free = (~flat).nonzero().flatten()
    flat[free[torch.randperm(len(free), generator=generator, device="cpu")[:left]]] = True
    return flat
