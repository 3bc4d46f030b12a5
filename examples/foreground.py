"""Cuts out the main object of each image, without training and without a mark.

    python examples/foreground.py A.jpg [B.jpg ...] --out foreground.jpg

The first principal component of all patches splits them in two; the object is the side that touches the borders less.
A pixel is foreground if its features are nearer to the mean of that side than to the mean of the other.  Several images
of one kind of object make the split more reliable.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from common import load, parser, run, save, with_progress
from PIL import Image

from dinov3_infer import Features, load_image
from dinov3_infer.tasks import at_pixels, foreground, sheet


def split(features: Sequence[Features]) -> list[np.ndarray]:
    """The pixels of the main object of each image, bool [height, width] at the original size."""
    sides = torch.cat([torch.from_numpy(mask).flatten() for mask in foreground(features)])
    tokens = F.normalize(torch.cat([patches for f in features for patches in f.patch_tokens]), dim=-1)
    thing, rest = (F.normalize(tokens[side].mean(dim=0), dim=0) for side in (sides, ~sides))
    masks = []
    for f in features:
        scores = torch.einsum("bchw,c->bhw", F.normalize(f.feature_map, dim=1), thing - rest)
        masks += [
            at_pixels(score[None], placement, placement.original)[0].numpy() > 0  # False for padding, which is NaN
            for score, placement in zip(scores, f.placements, strict=True)
        ]
    return masks


def cut_out(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The object on white, from pixels [height, width, 3] uint8 and a mask [height, width] bool."""
    return Image.fromarray(np.where(mask[..., None], image, 255).astype(np.uint8))


def main() -> None:
    options = parser(__doc__, "foreground.jpg")
    options.add_argument("images", nargs="+", metavar="IMAGE")
    args = options.parse_args()
    found = load(args).iter_features(args.images, size=args.size, fit="native")
    features = list(with_progress(found, len(args.images)))
    shown = []
    for name, mask in zip(args.images, split(features), strict=True):
        pixels = load_image(name).permute(1, 2, 0).numpy()
        shown += [Image.fromarray(pixels), cut_out(pixels, mask)]
        print(f"{name}: {mask.mean():.0%} foreground")
    save(sheet(shown, columns=2 if len(args.images) < 3 else 4), args.out)


if __name__ == "__main__":
    run(main)
