"""Compares layers, sizes and poolings on labelled images.

    python tests/benchmarks/choosing.py MODEL [--train 500 --test 400 --pairs 12]
    python tests/benchmarks/choosing.py --render

Measures the cells that the record lacks for this model and these numbers, one at a time, so that it can be stopped and
restarted, and writes the tables of examples/CHOOSING.md from the record.  CIFAR-10: 20-NN and a linear probe.  One-shot
segmentation with `OneShotSegmenter`: cut-outs pasted on photographs, each searched in another view on another
photograph.  The images are those of tests/benchmarks/tasks/sets.py.
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT), str(ROOT / "tests" / "benchmarks" / "tasks")]

from metrics import iou  # noqa: E402

import dinov3_infer  # noqa: E402
from dinov3_infer import Backbone, Features  # noqa: E402
from dinov3_infer.features.result import pool  # noqa: E402
from dinov3_infer.images.decode import load_image  # noqa: E402
from dinov3_infer.images.preprocess import Placement  # noqa: E402
from dinov3_infer.tasks import KNN, LinearProbe, OneShotSegmenter, dense_features  # noqa: E402

RECORD = Path(__file__).parent / "records" / "choosing.json"
PAGE = ROOT / "examples" / "CHOOSING.md"
POOLINGS = ("cls", "mean", "cls_mean")
GRIDS = (8, 16)  # patches per side of a CIFAR-10 image
SEEN = 32  # patches per side of an image to segment, by default


def layers_of(bb: Backbone) -> list[int]:
    """The upper half of the layers."""
    return list(range(bb.config.depth // 2, bb.config.depth))


# --- images as a whole ---------------------------------------------------------------------------------------------


def classification(bb: Backbone, grid: int, train: int, test: int) -> dict[str, Any]:
    """Accuracy of both probes by layer and pooling."""
    import sets

    known, classes, asked, truth = sets.cifar10()
    x, answers = vectors(bb, known[:train], grid), classes[:train]
    z, right = vectors(bb, asked[:test], grid), truth[:test]
    found: dict[str, Any] = {}
    for layer in layers_of(bb):
        found[str(layer)] = {}
        for pooling in POOLINGS:
            a, b = x[layer, pooling], z[layer, pooling]
            probes = {"knn": KNN(), "linear": LinearProbe(steps=500)}
            found[str(layer)][pooling] = {n: p.fit(a, answers).score(b, right) for n, p in probes.items()}
    return found


def vectors(bb: Backbone, pictures: np.ndarray, grid: int) -> dict[tuple[int, str], Tensor]:
    """[N, C] by layer and pooling, in one pass."""
    rows: dict[tuple[int, str], list[Tensor]] = {}
    for one in bb.iter_features(list(pictures), size=grid * bb.patch_size, fit="squash", layers=layers_of(bb)):
        for number, layer in zip(layers_of(bb), one.layers, strict=True):
            for pooling in POOLINGS:
                rows.setdefault((number, pooling), []).append(pool(layer.cls_token, layer.patch_tokens, pooling))
    return {key: torch.cat(many) for key, many in rows.items()}


# --- one-shot segmentation -------------------------------------------------------------------------------------------


def plain(grid: int = SEEN, **options: Any) -> Callable[[Backbone, Any, list[int]], list[Features]]:
    return lambda bb, image, layers: [dense_features(bb, image, size=grid * bb.patch_size, layers=layers, **options)]


def shifted(bb: Backbone, image: Any, layers: list[int]) -> list[Features]:
    """The features of an image, and of the image shifted by half a patch; their scores are averaged per pixel."""
    half, side = bb.patch_size // 2, SEEN * bb.patch_size
    pixels = torch.nn.functional.interpolate(
        load_image(image)[None].float(), size=(side, side), mode="bilinear", antialias=True
    ).round()  # fmt: skip
    moved = torch.nn.functional.pad(pixels, (half, half, half, half), mode="replicate")[0].to(torch.uint8)
    found = dense_features(bb, moved, size=None, layers=layers)
    original = tuple(load_image(image).shape[1:])
    place = Placement((original[0], original[1]), (side, side), (-half, -half, side + 2 * half, side + 2 * half))
    return [*plain()(bb, image, layers), replace(found, placements=(place,))]


PLAIN = f"{SEEN} patches a side"
WAYS: dict[str, Callable[[Backbone, Any, list[int]], list[Features]]] = {
    PLAIN: plain(),
    "16 patches a side": plain(16),
    "32, and moved by half a patch": shifted,
    "64 patches a side (doubled)": plain(64),
    "48 patches a side": plain(48),
    "32, and mirrored": plain(flip=True),
    "32 and 48, averaged": plain(scales=(1.0, 1.5)),
    "32, in tiles of 16": lambda bb, p, layers: plain(tile=16 * bb.patch_size)(bb, p, layers),
}


def segmentation(bb: Backbone, way: str, pairs: int) -> dict[str, Any]:
    """The IoU of each pair by layer; "last 4" concatenates the last four layers."""
    import sets

    draw, each = random.Random(0), dict[str, list[float]]()
    stamps = sets.stamps(True) + sets.stamps(False)
    for stamp in draw.sample(stamps, min(pairs, len(stamps))):
        first, second = (sets.scene(draw, True, (1, 1), (0.35, 0.7), [stamp]) for _ in range(2))
        known, asked = (WAYS[way](bb, s.picture, layers_of(bb)) for s in (first, second))
        for name, part in parts(bb):
            taken, found = [with_channels(f, part) for f in known[:1]], [with_channels(f, part) for f in asked]
            segmenter = OneShotSegmenter().fit(taken, [first.numbers > 0])
            labels = torch.stack(segmenter.scores(found)).mean(dim=0).argmax(dim=0)
            each.setdefault(name, []).append(round(float(iou(labels > 0, second.numbers > 0)), 3))
    return each


def parts(bb: Backbone) -> Iterator[tuple[str, slice]]:
    """Names of layers, and their slices of the concatenated channels."""
    count, width = len(layers_of(bb)), bb.embed_dim
    for i, layer in enumerate(layers_of(bb)):
        yield str(layer), slice(i * width, (i + 1) * width)
    yield "last 4", slice((count - 4) * width, count * width)


def with_channels(features: Features, part: slice) -> Features:
    return replace(features, patch_tokens=features.patch_tokens[..., part])


# --- the record and the page -----------------------------------------------------------------------------------------


def measure(model: str, train: int, test: int, pairs: int) -> None:
    bb = Backbone.from_pretrained(model)
    cells: dict[str, Callable[[], Any]] = {
        f"segmentation, {way}": lambda way=way: segmentation(bb, way, pairs) for way in WAYS
    }
    cells |= {f"classification, {g} patches a side": lambda g=g: classification(bb, g, train, test) for g in GRIDS}
    known = {
        "model": bb.info.name if bb.info else "own architecture", "fingerprint": bb.fingerprint(),
        "train": train, "test": test, "pairs": pairs,
        "versions": {"dinov3_infer": dinov3_infer.__version__, "torch": torch.__version__},
    }  # fmt: skip
    record = recorded()
    if any(record.get(name) != value for name, value in known.items()):
        record = known | {"cells": {}}
    for name, run in cells.items():
        if name not in record["cells"]:
            print(name, flush=True)
            record["cells"][name] = run()
            text = json.dumps(record, indent=1) + "\n"
            RECORD.write_text(re.sub(r"(?<=[\[\d,])\s+(?=[\d\]])", " ", text))  # one line per list of numbers


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def filled(text: str, record: dict[str, Any]) -> str:
    """The page, with the tables of the record between its marks."""
    for mark, table in (("classification", classification_table), ("segmentation", segmentation_table)):
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + table(record) + end + rest.partition(end)[2]
    return text


def classification_table(record: dict[str, Any]) -> str:
    lines = ["| patches a side | layer | " + " | ".join(f"k-NN `{p}` | linear `{p}`" for p in POOLINGS) + " |"]
    lines += ["| --- " * (2 + 2 * len(POOLINGS)) + "|"]
    for name, layers in cells(record, "classification").items():
        for layer, row in layers.items():
            values = " | ".join(f"{row[p]['knn']:.3f} | {row[p]['linear']:.3f}" for p in POOLINGS)
            lines.append(f"| {name.split()[0]} | {layer} | {values} |")
    error = 0.5 / math.sqrt(record.get("test", 1))
    return told(record, f"{{train:,}} + {{test:,}} images of CIFAR-10, accuracy ± {error:.3f} at most", lines)


def segmentation_table(record: dict[str, Any]) -> str:
    found = cells(record, "segmentation")
    names = next(iter(found.values()), {})
    lines = ["| input | " + " | ".join(f"layer {n}" if n.isdigit() else n for n in names) + " |"]
    lines += ["| --- " * (1 + len(names)) + "|"]
    for way, row in found.items():
        shown = [mean_and_error(values) for values in row.values()]
        if plain := found.get(PLAIN) if way != PLAIN else None:  # the same pairs: smaller errors
            shown = [
                f"{text} ({mean_and_error(np.subtract(v, plain[n]), '+')})"
                for text, (n, v) in zip(shown, row.items(), strict=True)
            ]
        lines.append(f"| {way} | " + " | ".join(shown) + " |")
    return told(record, "{pairs} pairs, IoU ± standard error, and against " + PLAIN, lines)


def mean_and_error(values: Any, sign: str = "") -> str:
    return f"{np.mean(values):{sign}.3f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def cells(record: dict[str, Any], kind: str) -> dict[str, Any]:
    return {n.partition(", ")[2]: v for n, v in record.get("cells", {}).items() if n.startswith(kind)}


def told(record: dict[str, Any], what: str, lines: list[str]) -> str:
    """A table with a heading that names the model and the numbers of images."""
    if len(lines) < 3:
        return "Not measured yet.\n"
    return f"`{record['model']}` ({record['fingerprint'][:12]}), {what.format(**record)}.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "model", nargs="?", help="model to measure: name, folder or file (default: only write the page)"
    )
    for name, default in (("train", 500), ("test", 400), ("pairs", 12)):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"number of {name} images (default: {default})"
        )
    parser.add_argument("--render", action="store_true", help="only write the page, from the record")
    args = parser.parse_args()
    if args.model and not args.render:
        measure(args.model, args.train, args.test, args.pairs)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), recorded()), encoding="utf-8")


if __name__ == "__main__":
    main()
