"""Boxes and classes by set prediction on frozen features, without anchors and without non-maximum suppression.

    python examples/detection.py IMAGES annotations.json PHOTO.jpg --out boxes.jpg     # annotations in COCO's format

Every patch is a query, with its features of four layers.  A small transformer relates the queries; each predicts class
scores and a box around its position.  Hungarian matching assigns one query to each object, and all other queries are
trained to predict no object.

Source: DETR (arXiv 2005.12872); costs and focal loss as in Deformable DETR (arXiv 2010.04159).
"""

from pathlib import Path

import torch
from common import colours, fit, load, maps, parser, run, save, upright
from heads import Detector, layers_of
from PIL import Image, ImageDraw
from set_prediction import assign, class_cost, class_loss, overlap, read_coco
from torch import Tensor

Things = list[tuple[Tensor, Tensor]]  # per image: boxes [n, 4] (left, top, right, bottom) in 0..1, and classes [n]


def loss(detector: Detector, maps: Tensor, things: Things) -> Tensor:
    """The loss [] of cached maps [B, C, h, w] and the objects of these images."""
    scores, boxes = detector(maps)
    chosen, far = [], scores.new_zeros(())
    for score, box, (true, classes) in zip(scores, boxes, things, strict=True):
        with torch.no_grad():
            distance = 5 * torch.cdist(true, box, p=1) - 2 * overlap(true[:, None], box)
            chosen.append(assign(2 * class_cost(score, classes) + distance))
        near = box[chosen[-1]]
        far = far + 5 * (near - true).abs().sum() + 2 * (1 - overlap(near, true)).sum()
    return 2 * class_loss(scores, [c for _, c in things], chosen) + far / max(1, sum(map(len, chosen)))


def train(features: Tensor, things: Things, classes: int, steps: int = 1000) -> Detector:
    """Trains a detector on cached maps [N, C, h, w]."""
    detector = Detector(features.shape[1], classes)
    fit(detector, lambda i: loss(detector, features[i], [things[k] for k in i.tolist()]), len(features), steps)
    return detector


@torch.no_grad()
def detect(detector: Detector, features: Tensor, most: int = 100) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per image of features [N, C, h, w]: scores [n], best first, boxes [n, 4] in 0..1 and classes [n]."""
    found = []
    for scores, boxes in zip(*detector(features), strict=True):
        best = scores.sigmoid().flatten().topk(min(most, scores.numel()))
        query, name = best.indices // scores.shape[1], best.indices % scores.shape[1]
        found.append((best.values, boxes[query].clamp(0, 1), name))
    return found


def draw(image: Image.Image, scores: Tensor, boxes: Tensor, classes: Tensor, names: list[str]) -> Image.Image:
    """Draws the boxes [n, 4] whose score [n] is above 0.3, with the names of their classes [n]."""
    shown, palette = image.copy(), colours(len(names))
    pen = ImageDraw.Draw(shown)
    for score, box, number in zip(scores.tolist(), boxes, classes.tolist(), strict=True):
        if score > 0.3:
            place, colour = (box.view(2, 2) * torch.tensor(shown.size)).flatten().tolist(), tuple(palette[number])
            pen.rectangle(place, outline=colour, width=4)
            text, corner = f" {names[number]} {score:.2f} ", (place[0], place[1])
            pen.rectangle(pen.textbbox(corner, text, font_size=20), fill=colour)
            pen.text(corner, text, fill="white", font_size=20)
    return shown


def main() -> None:
    args = parser(__doc__, "boxes.jpg", "images", "annotations", "photo", size=448, steps=1000).parse_args()
    files, things, names = read_coco(args.annotations)
    bb, shown = load(args), upright(args.photo)
    layers = layers_of("dpt", bb.config.depth)
    known, asked = (maps(bb, p, args.size, layers) for p in ([Path(args.images, f) for f in files], [shown]))
    found = detect(train(known, things, len(names), args.steps), asked)[0]
    save(draw(shown, *found, names), args.out)


if __name__ == "__main__":
    run(main)
