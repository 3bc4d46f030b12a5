"""Distortions of one crop, in place on float32 RGB [3, H, W] in 0..255, written for one core and small crops."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["blur", "brightness", "contrast", "greyscale", "hue", "saturation", "solarize"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
TAPS = 4  # of the blur on each side: a kernel of 9
NEGLIGIBLE = 1e-4  # weight of a tap that moves no pixel by a tenth of a grey level

# Of hue h in 0..6, the share of the chroma that each channel gets is clamp(sign * |h - centre| + offset, 0, 1).
_CENTRE, _SIGN, _OFFSET = (
    torch.tensor(v).view(3, 1, 1) for v in ((3.0, 2.0, 4.0), (1.0, -1.0, -1.0), (-1.0, 2.0, 2.0))
)


def brightness(pixels: Tensor, amount: float) -> None:
    """1 + amount times as bright."""
    pixels.mul_(1 + amount).clamp_(0, 255)


def contrast(pixels: Tensor, amount: float) -> None:
    """1 + amount times as far from the mean grey of the crop."""
    mean = float(_luma(pixels).mean())
    pixels.mul_(1 + amount).sub_(amount * mean).clamp_(0, 255)


def saturation(pixels: Tensor, amount: float) -> None:
    """1 + amount times as far from each pixel's grey."""
    grey = _luma(pixels)
    pixels.mul_(1 + amount).sub_(grey, alpha=amount).clamp_(0, 255)


def hue(pixels: Tensor, amount: float) -> None:
    """Turned by a share of the full circle, at the same HSV value and saturation."""
    red, green, blue = pixels
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = high.sub_(low)
    # The hue from -3 to 3, red at 0 and green at 2: its size is (chroma - red + green + blue - low) / chroma, whichever
    # channel is the largest, and its sign says whether there is more green than blue.
    turned = torch.add(chroma, green).sub_(red).add_(blue).sub_(low).div_(chroma.clamp_min(1e-6))
    turned = turned.copysign_(green - blue).add_(6 * amount)
    turned.sub_(torch.floor(turned / 6), alpha=6)
    share = (turned - _CENTRE).abs_()
    share.mul_(_SIGN).add_(_OFFSET).clamp_(0, 1)
    torch.addcmul(low, chroma, share, out=pixels)


def greyscale(pixels: Tensor) -> None:
    """All three channels become the luma."""
    pixels.copy_(_luma(pixels).expand_as(pixels))


def solarize(pixels: Tensor, threshold: float) -> None:
    """What is as bright as the threshold, or brighter, is inverted."""
    torch.where(pixels >= threshold, 255 - pixels, pixels, out=pixels)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian of that many pixels with a kernel of 9, the border mirrored; gives a new tensor.

    Shifted additions: on one core faster than a convolution and than Pillow's filter.
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
