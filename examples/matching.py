"""Matches between two images, dense and sparse, and points transferred from one to the other.

    python examples/matching.py A.jpg B.jpg --out matches.jpg
    python examples/matching.py A.jpg B.jpg --point 120,80 --point 200,90     # transfers these points

Above: pairs of patches that are nearest neighbours of each other, spread over the image, or the given points and their
matches.  Below: A coloured by position, and each patch of B in the colour of its nearest patch in A.
"""

import numpy as np
import torch
import torch.nn.functional as F
from common import centres, layer_features, load, numbers, parser, run, save, tied, upright
from PIL import Image
from torch import Tensor

from dinov3_infer import Features, InputError
from dinov3_infer.tasks import sheet


def dense(a: Features, b: Features) -> tuple[Tensor, Tensor, Tensor]:
    """For each patch of `a`: its nearest in `b` [P], their cosine [P], and whether the match is mutual [P]."""
    cosines = F.normalize(a.patch_tokens[0], dim=-1) @ F.normalize(b.patch_tokens[0], dim=-1).T
    best, there = cosines.max(dim=1)
    return there, best, cosines.argmax(dim=0)[there] == torch.arange(len(there))


def sparse(a: Features, b: Features, count: int = 40) -> tuple[Tensor, Tensor]:
    """The best mutual match of each of `count` cells of the first image, (x, y) in both images, [n, 2] each."""
    there, best, mutual = dense(a, b)
    places, (height, width) = centres(a), a.original_sizes[0]
    side = (height * width / count) ** 0.5  # side of a cell in pixels
    cells = (places // side).long()
    cell = cells[:, 1] * int(cells[:, 0].max() + 1) + cells[:, 0]
    order = best.masked_fill(~mutual, -1).argsort(descending=True)[: int(mutual.sum())]
    kept = list({int(cell[i]): int(i) for i in order.flip(0)}.values())  # the best stays
    return places[kept], centres(b)[there[kept]]


def transfer(a: Features, b: Features, points: Tensor) -> Tensor:
    """Positions [n, 2] in the second image of points (x, y) [n, 2] of the first.  Raises: InputError outside it."""
    size = torch.tensor(a.original_sizes[0][::-1])
    if ((points < 0) | (points >= size)).any():
        raise InputError(f"points lie inside an image of {size[0]} x {size[1]} pixels, got {points.tolist()}")
    grid = (points / size * 2 - 1)[None, None].float()
    asked = F.grid_sample(a.feature_map, grid, align_corners=False, padding_mode="border")[0, :, 0].T
    cosines = F.normalize(asked, dim=-1) @ F.normalize(b.patch_tokens[0], dim=-1).T
    places, patch = centres(b), b.original_sizes[0][0] / b.grid[0]  # pixels
    near = torch.cdist(places[cosines.argmax(dim=1)], places) < 1.5 * patch  # the best patch and its neighbours
    return (cosines / 0.02).masked_fill(~near, -torch.inf).softmax(dim=-1) @ places


def placed(a: Features, b: Features, images: list[Image.Image]) -> list[Image.Image]:
    """The first image coloured by position, and the second by the position of the nearest patch in the first."""
    x, y = np.meshgrid(np.linspace(0, 1, a.grid[1]), np.linspace(0, 1, a.grid[0]))
    tints = (np.stack((x, y, 1 - (x + y) / 2), axis=-1) * 255).astype(np.uint8)
    back = tints.reshape(-1, 3)[dense(b, a)[0]].reshape(*b.grid, 3)
    shown = [Image.fromarray(t).resize(p.size) for t, p in zip((tints, back), images, strict=True)]
    return [Image.blend(image, tint, 0.75) for image, tint in zip(images, shown, strict=True)]


def main() -> None:
    options = parser(__doc__, "matches.jpg", "first", "second", layer=True)
    options.add_argument("--point", action="append", default=[], metavar="X,Y", help="pixel of the first image")
    options.add_argument("--count", type=int, default=40, help="number of matches to draw (default: %(default)s)")
    args = options.parse_args()
    a, b = layer_features(load(args), (args.first, args.second), args.layer, args.size)
    if args.point:
        here = torch.tensor([numbers("--point", point, "X,Y") for point in args.point])
        there = transfer(a, b, here)
    else:
        here, there = sparse(a, b, args.count)
    for start, end in zip(here.tolist(), there.tolist(), strict=True):
        print("({:.0f}, {:.0f}) -> ({:.0f}, {:.0f})".format(*start, *end))
    images = [upright(image) for image in (args.first, args.second)]
    save(sheet([tied(*images, here, there), sheet(placed(a, b, images), columns=2)], columns=1), args.out)


if __name__ == "__main__":
    run(main)
