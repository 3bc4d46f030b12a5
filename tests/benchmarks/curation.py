"""What curation is worth: a balanced sample of a long tail, and near-duplicates that were planted.

    pip install onnx
    python tests/benchmarks/curation.py

CIFAR-10 with 100 times as many pictures of the first class as of the last, embedded by a real ViT-S/14.  Recorded are
the entropies of the classes in the balanced sample and in random ones.  Then copies of some pictures are planted that
were saved as JPEG, cut at the border, made lighter or darker, or scaled: dedup should find them and nothing else.
Pairs of CIFAR-10 itself that are nearly the same picture are counted as found rightly only if their pixels are close
too.  The record goes to records/curation.json.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(ROOT), str(ROOT / "kernels"), str(ROOT / "examples" / "nano")]

from dinov3_infer import Backbone  # noqa: E402
from dinov3_infer.bulk import Store  # noqa: E402
from dinov3_infer.bulk.clusters import hierarchy  # noqa: E402
from dinov3_infer.bulk.neighbours import duplicates  # noqa: E402


def long_tail(labels: np.ndarray, most: int, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the pictures: `most` of class 0, down to most / factor of class 9."""
    sizes = np.geomspace(most, most / factor, 10).round().astype(int)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(sizes)]
    return rng.permutation(np.concatenate(chosen))


def changed(pixels: np.ndarray, way: int) -> np.ndarray:
    """Nearly the same picture."""
    picture = Image.fromarray(pixels)
    if way == 0:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        picture = Image.open(stream)
    elif way == 1:
        picture = picture.crop((1, 0, 32, 31)).resize((32, 32), Image.Resampling.BICUBIC)
    elif way == 2:
        picture = ImageEnhance.Brightness(picture).enhance(1.1)
    elif way == 3:
        picture = ImageEnhance.Brightness(picture).enhance(0.9)
    else:
        picture = picture.resize((40, 40), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def entropy(labels: np.ndarray) -> float:
    shares = np.bincount(labels, minlength=10) / len(labels)
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def balance(store: Store, labels: np.ndarray, count: int, clusters: list[int] | None, seeds: int) -> dict[str, object]:
    balanced, drawn = [], []
    within = np.arange(len(store)) < len(labels)  # without what was planted
    for seed in range(seeds):
        numbers = hierarchy(store, clusters, within, seed).sample(count, seed)
        balanced.append(entropy(labels[numbers]))
        drawn.append(entropy(np.random.default_rng(seed).permutation(labels)[:count]))
    return dict(count=count, needed=0.9 * np.log(10), of_all=entropy(labels), balanced=balanced, random=drawn)


def dedup(store: Store, pixels: list[np.ndarray], planted: dict[int, int], thresholds: list[float]) -> list[object]:
    """For each threshold the share of planted copies that are found, and of pictures that are dropped rightly."""
    found = []
    small = [np.asarray(Image.fromarray(p).resize((8, 8), Image.Resampling.BOX), np.float32) for p in pixels]
    for threshold in thresholds:
        group = duplicates(store, threshold).group
        hit = sum(group[copy] == group[original] for copy, original in planted.items())
        alike = np.flatnonzero(group != np.arange(len(group)))
        right = sum(
            (a in planted and group[planted[a]] == group[a])
            or any(np.abs(small[a] - small[b]).mean() < 12 for b in np.flatnonzero(group == group[a]) if b != a)
            for a in alike.tolist()
        )
        precision = right / max(1, len(alike))
        found.append(dict(threshold=threshold, recall=hit / len(planted), precision=precision, dropped=len(alike)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=5000, help="pictures of the first class")
    parser.add_argument("--planted", type=int, default=500)
    parser.add_argument("--count", type=int, default=500, help="of the sample")
    parser.add_argument("--clusters", type=int, nargs="*")
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weights", type=Path, help="other weights than those that the tests fetch")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "curation.json")
    args = parser.parse_args()
    from evaluate import cifar10

    images, targets, *_ = cifar10(50_000, 1)
    labels = targets.numpy()
    rng = np.random.default_rng(0)
    chosen = long_tail(labels, args.most, 100, rng)
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights
        if weights is None:
            from fetch import write_dinov2_vits14

            weights = write_dinov2_vits14(Path(folder))[0]
        bb = Backbone.from_pretrained(weights)
        originals = rng.choice(len(chosen), args.planted, replace=False)
        pixels = [np.asarray(images[i]) for i in chosen]
        pixels += [changed(pixels[number], i % 5) for i, number in enumerate(originals.tolist())]
        planted = {len(chosen) + i: int(number) for i, number in enumerate(originals)}
        album = Path(folder) / "album"
        album.mkdir()
        for i, one in enumerate(pixels):
            Image.fromarray(one).save(album / f"{i:06d}.png")
        bb.embed(album, Path(folder) / "x.npy", size=args.size, progress=True)
        store = Store(Path(folder) / "x.npy")
        found = dedup(store, pixels, planted, [0.65, 0.7, 0.75, 0.8, 0.85, 0.9])
        sample = balance(store, labels[chosen], args.count, args.clusters, args.seeds)
    record = dict(pictures=len(chosen), size=args.size, dedup=found, balance=sample)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
