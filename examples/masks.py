"""Instance and panoptic segmentation by mask queries on frozen features: a mask is the dot product of query and map.

    python examples/masks.py IMAGES SEGMENTS PHOTO.jpg --out masks.jpg

SEGMENTS holds one 16-bit PNG per image, with its name: 1000 * class + object number; regions that are not counted, such
as a background, have object number 0.  Every patch is a query, as in detection.py.  Source: arXiv 2107.06278.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import fit, load, maps, paint, parser, run, save, upright
from heads import MaskQueries, layers_of
from set_prediction import assign, class_cost, class_loss, mask_cost, read_segments
from torch import Tensor

from dinov3_infer import list_images

Segments = tuple[Tensor, Tensor]  # one image: masks [n, height, width] bool, classes [n]


def loss(head: MaskQueries, maps: Tensor, segments: Sequence[Segments]) -> Tensor:
    """The loss [] of cached maps [B, C, h, w] and the segments of these images."""
    scores, masks = head(maps)
    chosen, shape = [], scores.new_zeros(())
    for score, mask, (true, classes) in zip(scores, masks, segments, strict=True):
        share = F.interpolate(true[:, None].float(), size=mask.shape[1:], mode="area").flatten(1)
        with torch.no_grad():
            chosen.append(assign(2 * class_cost(score, classes) + mask_cost(mask.flatten(1), share)))
        shape = shape + mask_cost(mask.flatten(1)[chosen[-1]], share).diagonal().sum()
    return 2 * class_loss(scores, [c for _, c in segments], chosen) + shape / max(1, sum(map(len, chosen)))


def train(features: Tensor, segments: Sequence[Segments], classes: int, steps: int = 1000) -> MaskQueries:
    """Trains mask queries on cached maps [N, C, h, w]."""
    head = MaskQueries(features.shape[1], classes)
    fit(head, lambda i: loss(head, features[i], [segments[k] for k in i.tolist()]), len(features), steps)
    return head


@torch.no_grad()
def instances(head: MaskQueries, features: Tensor, size: tuple[int, int], most: int = 20) -> list[tuple[Tensor, ...]]:
    """Per image: scores [n], masks in 0..1 [n, height, width] and classes [n] of the queries with the best scores."""
    found = []
    for scores, masks in zip(*head(features), strict=True):
        best, names = scores.sigmoid().max(dim=1)
        order = best.argsort(descending=True)[:most]
        chance = F.interpolate(masks[order][None], size=size, mode="bilinear")[0].sigmoid()
        sure = (chance * (chance > 0.5)).sum(dim=(1, 2)) / (chance > 0.5).sum(dim=(1, 2)).clamp(min=1)
        found.append((best[order] * sure, chance, names[order]))
    return found


def panoptic(scores: Tensor, chance: Tensor, names: Tensor, least: float = 0.1) -> tuple[Tensor, Tensor]:
    """The segment number of each pixel [height, width], from 1, 0 for none, and the class of each segment [n]."""
    owner = (scores[:, None, None] * chance).argmax(dim=0)
    labels, kept = torch.zeros_like(owner), list[int]()
    for i in (scores > least).nonzero().flatten().tolist():
        seen = (owner == i) & (chance[i] > 0.5)
        if seen.sum() > 0.5 * (chance[i] > 0.5).sum():  # otherwise another segment covers most of it
            kept.append(i)
            labels[seen] = len(kept)
    return labels, names[kept]


def main() -> None:
    args = parser(__doc__, "masks.jpg", "images", "segments", "photo", size=448, steps=1000).parse_args()
    files, bb, shown = list_images(args.images), load(args), upright(args.photo)
    segments = read_segments(args.segments, files)
    classes = max(int(names.max()) for _, names in segments) + 1
    known, asked = (maps(bb, p, args.size, layers_of("dpt", bb.config.depth)) for p in (files, [shown]))
    head = train(known, segments, classes, args.steps)
    labels, names = panoptic(*instances(head, asked, (shown.height, shown.width))[0])
    print("classes of the segments:", *names.tolist())
    save(paint(shown, labels.numpy()), args.out)


if __name__ == "__main__":
    run(main)
