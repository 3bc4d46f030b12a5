"""Surface normals from one image: a head on frozen features, trained on your own images with depth.

    python examples/normals.py IMAGES DEPTHS PHOTO.jpg --focal 0.8 --out normals.jpg

DEPTHS is as in depth.py.  The normals for training come from planes fitted to the inverse depth around each pixel.
Red, green and blue show how far a surface faces right, up and towards the camera.
"""

import numpy as np
import torch
import torch.nn.functional as F
from common import fit, load, maps, parser, read_depths, run, save, upright
from heads import DPT, Linear, layers_of
from PIL import Image
from torch import Tensor

from dinov3_infer import InputError, list_images
from dinov3_infer.tasks import sheet


def normals_of(depths: Tensor, focal: float, radius: int = 6) -> tuple[Tensor, Tensor]:
    """Unit normals [N, 3, H, W] (right, up, to the camera) of depths [N, H, W], and where they are known.

    The inverse depth of a plane is linear in the image: r = a u + b v + c with (u, v) in focal lengths from the centre;
    (a, b, c) is its normal, known where the plane fits a window to 1 %.  Raises: InputError for a focal length <= 0.
    """
    if not focal > 0:
        raise InputError(f"the focal length must be above 0, in image widths, got {focal}; give for example --focal 1")
    height, width = depths.shape[1:]
    v, u = torch.meshgrid(*((torch.arange(n) - (n - 1) / 2) / (focal * width) for n in (height, width)), indexing="ij")
    known = (depths > 0).float()
    inverse = torch.where(depths > 0, 1 / depths.clamp(min=1e-6), 0)

    def mean(x: Tensor) -> Tensor:  # over the known pixels of the window
        window = 2 * radius + 1
        share = F.avg_pool2d(known, window, 1, radius).clamp(min=1e-6)
        return F.avg_pool2d((x * known).double(), window, 1, radius) / share

    uu, uv, vv = (mean(x * y) - mean(x) * mean(y) for x, y in ((u, u), (u, v), (v, v)))
    ur, vr, rr = (mean(x * inverse) - mean(x) * mean(inverse) for x in (u, v, inverse.double()))
    scale = uu * vv - uv * uv
    a, b = (vv * ur - uv * vr) / scale, (uu * vr - uv * ur) / scale
    c = mean(inverse) - a * mean(u) - b * mean(v)
    fits = rr - a * ur - b * vr < (0.01 * mean(inverse)) ** 2
    sure = fits & (F.avg_pool2d(known, 2 * radius + 1, 1, radius) * known > 0.5)
    return F.normalize(torch.stack((-a, b, c), dim=1), dim=1).float().nan_to_num(), sure  # the camera looks along +z


def train(features: Tensor, normals: Tensor, known: Tensor, head: str = "dpt", steps: int = 400) -> Linear | DPT:
    """Trains a head on cached maps [N, C, h, w] and normals [N, 3, H, W] where `known` [N, H, W] is True."""
    model = (Linear if head == "linear" else DPT)(features.shape[1], 3)

    def loss(i: Tensor) -> Tensor:
        cosine = (at_size(model(features[i]), normals.shape[2:]) * normals[i]).sum(dim=1)
        return (1 - cosine)[known[i]].mean()

    fit(model, loss, len(features), steps)
    return model


def at_size(found: Tensor, size: tuple[int, ...]) -> Tensor:
    """Unit normals [N, 3, *size] of a map [N, 3, h, w], interpolated."""
    return F.normalize(F.interpolate(found, size=size, mode="bilinear"), dim=1)


def main() -> None:
    options = parser(__doc__, "normals.jpg", "images", "depths", "photo", size=448, steps=400)
    options.add_argument("--focal", type=float, default=1.0, help="focal length in image widths (default: %(default)s)")
    args = options.parse_args()
    names, bb, shown = list_images(args.images), load(args), upright(args.photo)
    layers, truth = layers_of("dpt", bb.config.depth), normals_of(read_depths(args.depths, names, 128), args.focal)
    model = train(maps(bb, names, args.size, layers), *truth, steps=args.steps)
    with torch.no_grad():
        found = at_size(model(maps(bb, [shown], args.size, layers)), (shown.height, shown.width))[0]
    colours = ((found.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
    save(sheet([shown, Image.fromarray(colours)], columns=2), args.out)


if __name__ == "__main__":
    run(main)
