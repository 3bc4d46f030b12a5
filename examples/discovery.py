"""Boxes around the main objects of an image, without training, by a normalised cut of its patches.

    python examples/discovery.py IMAGE.jpg --out boxes.jpg --count 3

Patches are the nodes of a graph; an edge joins two patches with similar features.  The second eigenvector of the
normalised Laplacian splits the graph and cuts few edges.  The object is the connected region around the patch with the
largest value.  Further objects are found among the remaining patches.

Source: TokenCut (arXiv 2202.11539), section 3.2; further objects as in CutLER (arXiv 2301.11320), section 3.1.
"""

import torch
import torch.nn.functional as F
from common import colours, load, parser, run, save, upright
from PIL import ImageDraw
from torch import Tensor

from dinov3_infer import Features

TIED, LOOSE = 0.2, 1e-5  # cosine above which an edge has weight 1, and the weight of all other edges


def discover(features: Features, count: int = 1, tied: float = TIED) -> list[Tensor]:
    """The patches of up to `count` objects of one image, bool [h, w] each, in the order found."""
    tokens = F.normalize(features.patch_tokens[0], dim=-1)
    left, found = torch.ones(len(tokens), dtype=torch.bool), list[Tensor]()
    while len(found) < count and int(left.sum()) > 8:
        weights = torch.where(tokens @ tokens.T > tied, 1.0, LOOSE).double() * (left[:, None] & left)
        weights = weights[left][:, left]
        degree = weights.sum(dim=1).rsqrt()
        _, vectors = torch.linalg.eigh(torch.eye(len(weights)) - degree[:, None] * weights * degree)
        second = torch.zeros(len(tokens), dtype=torch.double)
        second[left] = degree * vectors[:, 1] - (degree * vectors[:, 1]).mean()
        second *= second[second.abs().argmax()].sign()
        if (second.view(features.grid)[[0, 0, -1, -1], [0, -1, 0, -1]] > 0).sum() > 2:
            second *= -1  # the side that reaches three corners is the background
        seed = F.one_hot(second.argmax(), len(tokens)).bool()
        thing = connected(seed.view(features.grid), (second > 0).view(features.grid))
        found.append(thing)
        left &= ~thing.flatten()
    return found


def connected(seed: Tensor, part: Tensor) -> Tensor:
    """The region of `part` [h, w] bool that is connected with `seed` [h, w] bool."""
    while True:
        grown = (F.max_pool2d(seed[None].float(), 3, stride=1, padding=1)[0] > 0) & part
        if torch.equal(grown, seed):
            return seed
        seed = grown


def box_of(mask: Tensor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a mask [h, w], in pixels of an image of `size` (height, width)."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    down, across = size[0] / mask.shape[0], size[1] / mask.shape[1]
    left, right = int(columns[0]) * across, (int(columns[-1]) + 1) * across
    return left, int(rows[0]) * down, right, (int(rows[-1]) + 1) * down


def main() -> None:
    options = parser(__doc__, "boxes.jpg", "image", size=448)
    options.add_argument("--count", type=int, default=1, help="number of objects (default: %(default)s)")
    options.add_argument(
        "--tied", type=float, default=TIED, help="cosine above which patches are joined (default: %(default)s)"
    )
    args = options.parse_args()
    features = load(args).extract_features(args.image, size=args.size, fit="native")
    shown = upright(args.image)
    things = discover(features, args.count, args.tied)
    for thing, colour in zip(things, colours(len(things)), strict=True):
        box = box_of(thing, features.original_sizes[0])
        ImageDraw.Draw(shown).rectangle(box, outline=tuple(colour), width=max(3, shown.width // 150))
        print("box {:.0f}, {:.0f}, {:.0f}, {:.0f}".format(*box))
    save(shown, args.out)


if __name__ == "__main__":
    run(main)
