"""Depth from one image: a head on frozen features, trained on your own images with depth.

    python examples/depth.py IMAGES DEPTHS PHOTO.jpg --head dpt --out depth.jpg

DEPTHS holds one file per image, with its name: .npy in metres, or a 16-bit PNG in millimetres; 0 is unknown.  Both
heads predict weights of 64 depths for each pixel, and the depth is their weighted mean.  "linear" is one layer on the
last features; "dpt" fuses a pyramid over four layers of the backbone from coarse to fine.

Source: bins and loss as in AdaBins (arXiv 2011.14141) and DINOv2 (arXiv 2304.07193), section 7.4.
"""

import torch
import torch.nn.functional as F
from common import fit, load, maps, parser, read_depths, run, save, upright
from heads import Depth, layers_of
from torch import Tensor

from dinov3_infer import InputError, list_images
from dinov3_infer.tasks import overlay, sheet


def loss(found: Tensor, true: Tensor) -> Tensor:
    """Scale-invariant error [] of depth [B, h, w], over pixels whose true depth [B, H, W] is above 0."""
    found = F.interpolate(found[:, None], size=true.shape[1:], mode="bilinear")[:, 0]
    g = found[true > 0].log() - true[true > 0].log()
    return (g.var() + 0.15 * g.mean() ** 2 + 1e-6).sqrt()


def train(features: Tensor, depths: Tensor, head: str = "dpt", steps: int = 400) -> Depth:
    """Trains a head on cached maps [N, C, h, w] and depths [N, H, W].

    Raises: InputError if no depth is known.
    """
    known = depths[depths > 0]
    if not len(known):
        raise InputError("no depth is above 0, so none is known; give depths with known pixels")
    model = Depth(features.shape[1], head, float(known.min()), float(known.max()))
    fit(model, lambda i: loss(model(features[i]), depths[i]), len(features), steps)
    return model


def main() -> None:
    options = parser(__doc__, "depth.jpg", "images", "depths", "photo", size=448, steps=400)
    options.add_argument("--head", choices=("linear", "dpt"), default="dpt", help="kind of head (default: %(default)s)")
    args = options.parse_args()
    names, bb = list_images(args.images), load(args)
    layers = layers_of(args.head, bb.config.depth)
    model = train(maps(bb, names, args.size, layers), read_depths(args.depths, names, 128), args.head, args.steps)
    with torch.no_grad():
        found = model(maps(bb, [args.photo], args.size, layers))[0]
    print(f"{found.min():.2f} to {found.max():.2f} metres")
    save(sheet([upright(args.photo), overlay(args.photo, -found)], columns=2), args.out)


if __name__ == "__main__":
    run(main)
