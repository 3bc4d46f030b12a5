"""One-shot segmentation of cut-outs pasted on photographs: the alpha of a cut-out is its exact mask.

A cut-out that is marked in one image is searched on another photograph: the same object in another view ("thing"), or
another object of its kind ("kind").  "prototype" scores a patch by the mean of the marked patches minus the mean of the
others, "nearest" by the share of marked patches among its 5 nearest.  The threshold is the best one on the first image.
"""

import fnmatch
import io
import math
import random
import tempfile
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fetch_pictures import Source, contents, download
from PIL import Image, ImageEnhance
from torch import Tensor

from dinov3_infer import Backbone

# fmt: off
STAMPS = Source("stamps", "apt-get download tuxpaint-stamps-default=2022.06.04-1",
                "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
                "*/stamps/animals/* */stamps/food/* */stamps/vehicles/* */stamps/plants/*",
                "GPL-2 (debian/copyright)", "the artists of Tux Paint")
PHOTOGRAPHS = Source("photographs", "pip download --no-deps --only-binary=:all: --platform=manylinux_2_28_x86_64"
                     " --python-version=3.11 --implementation=cp --abi=cp311 scikit-image==0.26.0",
                     "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
                     "*/chelsea.png */coffee.png */astronaut.png */rocket.jpg",
                     "CC0, public domain", "Stefan van der Walt, Rachel Michetti, NASA, SpaceX")
KINDS = (  # photographs of objects of one kind
    "little-penguin magellanic_penguin penguin", "hen rooster chicken_profile", "duck drake", "seagull silver-gull",
    "guineafowl helmeted_guineafowl", "frog frog-1", "chimp gorilla", "bear european-bear", "bull cow cow_white zebu",
    "gnu-baby gnu-baby-stand gnu-stand", "sheep sheep_lamb ram", "camel dromedary", "lion lion-2", "dog dingo fox",
    "tiger tiger_sumatran", "deer doe caribou wapiti", "donkey horse zebra", "pig pig_golden pig_golden2 wildboar",
    "rabbit rabbit-2 rabbit_little", "beetle sedan sportscar2", "cep-1 cep-2",
    "apple_fuji apple_granny_smith apple_red apple_green",
)
# fmt: on
SIDE, PATCH_OF_COLOURS = 448, 8  # pixels: 28 x 28 patches of 16, 32 x 32 of 14
Pair = tuple[Image.Image, Tensor, Image.Image, Tensor]  # image and mask to learn from, image and mask to find


def fetch(source: Source) -> dict[str, bytes]:
    """Contents of the files to use, by file name; checks the sha256 of the package."""
    globs = source.members.split()
    with tempfile.TemporaryDirectory() as scratch:
        packed = contents(download(source, Path(scratch)))
        return {Path(name).name: data for name, data in packed if any(fnmatch.fnmatchcase(name, g) for g in globs)}


def pasted(stamp: bytes, photo: Image.Image, draw: random.Random, other_view: bool) -> tuple[Image.Image, Tensor]:
    """A cut-out on a part of a photograph, and its mask [SIDE, SIDE] bool."""
    cut = Image.open(io.BytesIO(stamp)).convert("RGBA")
    cut = cut.crop(cut.getchannel("A").getbbox())
    if other_view:  # with another brightness, mirrored, rotated
        cut = ImageEnhance.Brightness(cut).enhance(draw.uniform(0.7, 1.3))
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cut = cut.rotate(draw.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    scale = draw.uniform(0.35, 0.7) * SIDE / max(cut.size)
    cut = cut.resize([max(1, round(length * scale)) for length in cut.size], Image.Resampling.LANCZOS)
    side = draw.randint(min(photo.size) // 2, min(photo.size))
    left, top = (draw.randint(0, length - side) for length in photo.size)
    canvas = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    place = tuple(draw.randint(0, SIDE - length) for length in cut.size)
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(cut.getchannel("A"), place)
    canvas.paste(cut, place, cut)
    return canvas, torch.from_numpy(np.array(mask) > 127)


def pairs(count: int) -> dict[str, list[Pair]]:
    """`count` pairs with the same object, and as many with two objects of a kind; the pairs are fixed."""
    stamps, draw, found = fetch(STAMPS), random.Random(0), dict[str, list[Pair]]()
    photographs = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in sorted(fetch(PHOTOGRAPHS).items())]
    kinds = [kind.split() for kind in KINDS]
    for task, names in (
        ("thing", [(name, name) for kind in kinds for name in kind]),
        ("kind", [two for kind in kinds for two in permutations(kind, 2)]),
    ):
        draw.shuffle(names)
        found[task] = []
        for first, second in (names * count)[:count]:
            here, there = draw.sample(photographs, 2)
            learn = pasted(stamps[f"{first}.png"], here, draw, other_view=False)
            found[task].append((*learn, *pasted(stamps[f"{second}.png"], there, draw, other_view=first == second)))
    return found


def patches(pair: Pair, model: Backbone | None) -> Tensor:
    """Vectors of length 1 for the patches of both images, [2, C, h, w]: features, or colours and their spread."""
    if model is not None:
        return F.normalize(model.extract_features([pair[0], pair[2]], size=SIDE).feature_map, dim=1)
    pixels = torch.stack([torch.from_numpy(np.array(p)) for p in (pair[0], pair[2])]).permute(0, 3, 1, 2) - 128.0
    mean = F.avg_pool2d(pixels, PATCH_OF_COLOURS)
    spread = (F.avg_pool2d(pixels**2, PATCH_OF_COLOURS) - mean**2).clamp(min=0).sqrt()
    return F.normalize(torch.cat((mean, spread, torch.full_like(mean[:, :1], 128)), dim=1), dim=1)


def scores(maps: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Similarity of each pixel to the marked object, [2, SIDE, SIDE], by both methods."""
    tokens, share = maps.flatten(2).mT, F.adaptive_avg_pool2d(mask[None].float(), maps.shape[2:]).flatten()
    thing, rest = (F.normalize(weights @ tokens[0], dim=0) for weights in (share, 1 - share))
    cosines = tokens @ tokens[0].T
    cosines[0].fill_diagonal_(-1)  # excludes the patch itself
    found = {"prototype": tokens @ (thing - rest), "nearest": share[cosines.topk(5).indices].mean(-1)}
    grids = {method: score.unflatten(1, maps.shape[2:])[None] for method, score in found.items()}
    return {method: F.interpolate(grid, size=(SIDE, SIDE), mode="bilinear")[0] for method, grid in grids.items()}


def iou(found: Tensor, mask: Tensor) -> float:
    return float((found & mask).sum() / (found | mask).sum())


def segmentation(many: list[Pair], model: Backbone | None) -> dict[str, list[float]]:
    """Mean IoU in the second images with its 95 % interval, by method; without a model, of colours."""
    each: dict[str, list[float]] = {}
    for pair in many:
        for method, (first, second) in scores(patches(pair, model), pair[1]).items():
            steps = np.quantile(first, np.linspace(0.4, 0.999, 60))
            best = max(steps, key=lambda step: iou(first > step, pair[1]))
            each.setdefault(method, []).append(iou(second > best, pair[3]))
    half = {method: 1.96 * float(np.std(v, ddof=1)) / math.sqrt(len(v)) for method, v in each.items()}
    return {m: [round(float(np.mean(v)) + side * half[m], 4) for side in (0, -1, 1)] for m, v in each.items()}
