"""Follows marked objects from the first frame through a video: labels propagate from frame to frame.

    python examples/tracking.py VIDEO MASK.png --out tracked.gif        # 0 is background, 1, 2, ... are objects
    python examples/tracking.py VIDEO --box 40,30,200,180               # left, top, right, bottom of one object

VIDEO is a folder of frames, a GIF, or, with PyAV, a video file.  Each patch takes the labels of its 5 most similar
patches nearby, in the first frame and in the 7 frames before it.  Source: arXiv 2006.14613; numbers as for DINOv3.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from common import layer_features, load, numbers, paint, parser, read_frames, run, save
from PIL import Image
from torch import Tensor

from dinov3_infer import Features, InputError
from dinov3_infer.tasks import patch_weights

CONTEXT, RADIUS, NEIGHBOURS, TEMPERATURE = 7, 12.0, 5, 0.2  # frames, patches, patches, cosine


def track(frames: Iterable[Features], mask: np.ndarray) -> Iterator[np.ndarray]:
    """The labels of every frame, [height, width], from the mask [height, width] of the first frame.

    Raises: InputError for a mask of another size than the frames, or an empty mask, and for frames of different sizes.
    """
    if mask.ndim != 2 or not mask.any():
        raise InputError(
            f"the mask is empty or of shape {list(mask.shape)}; give a grey image that marks objects with 1, 2, ..."
        )
    values = np.unique(mask)
    masks = torch.from_numpy(mask[None] == values[:, None, None])
    context: list[tuple[Tensor, Tensor]] = []  # of the first and the last frames: tokens [P, C], labels [P, K]
    near = torch.ones(1, 1, dtype=torch.bool)
    for features in frames:
        tokens = F.normalize(features.patch_tokens[0], dim=-1)
        if context and len(tokens) != len(near):
            raise InputError("the frames differ in size; give the frames of one video")
        if not context:
            weights = [patch_weights(m, features.placements[0], features.grid) for m in masks]
            labels = torch.stack(weights, dim=-1).flatten(0, 1)
            rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in features.grid), indexing="ij")
            places = torch.stack((rows, columns), dim=-1).flatten(0, 1)
            near = torch.cdist(places, places) <= RADIUS
        else:
            cosines = [(tokens @ known.T).masked_fill(~near, -1) for known, _ in context]
            best = torch.cat(cosines, dim=1).topk(NEIGHBOURS)
            every = torch.cat([found for _, found in context])
            labels = ((best.values / TEMPERATURE).softmax(dim=-1)[..., None] * every[best.indices]).sum(dim=1)
        context = [*context[:1], *context[1:][-CONTEXT + 1 :], (tokens, labels)] if context else [(tokens, labels)]
        maps = labels.T.unflatten(1, features.grid)[None]
        pixels = F.interpolate(maps, size=features.original_sizes[0], mode="bilinear", antialias=False)
        yield values[pixels[0].argmax(dim=0).numpy()]


def main() -> None:
    options = parser(__doc__, "tracked.gif", "video", size=448, layer=True)
    options.add_argument("mask", nargs="?", help="grey image of the size of a frame, whose values are labels")
    options.add_argument("--box", metavar="L,T,R,B", help="box of one object, instead of a mask")
    options.add_argument("--fps", type=float, default=8, help="frames per second of the output (default: %(default)s)")
    args = options.parse_args()
    frames = read_frames(args.video)
    if (args.mask is None) == (args.box is None):
        raise InputError("nothing marks the objects of the first frame, or two options do; give either a mask or --box")
    if args.mask is not None:
        mask = np.array(Image.open(args.mask))
    else:
        left, top, right, bottom = (int(v) for v in numbers("--box", args.box, "L,T,R,B"))
        mask = np.zeros((frames[0].height, frames[0].width), np.uint8)
        mask[top:bottom, left:right] = 1
    features = layer_features(load(args), frames, args.layer, args.size)
    shown = [paint(frame, labels) for frame, labels in zip(frames, track(features, mask), strict=True)]
    save(shown, args.out, args.fps)


if __name__ == "__main__":
    run(main)
