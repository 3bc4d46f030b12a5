"""Measures curation: a balanced sample of a long-tailed set, and the removal of planted near-duplicates.

    pip install onnx
    python tests/benchmarks/curation.py

The set is CIFAR-10 with 100 times as many images of the first class as of the last, embedded by a real ViT-S/14.  The
record holds the entropy of the classes in balanced and in random samples, with one level and with two, for the class
token (plain, centred, whitened), the mean of the patches, and both.  "labelled" is an upper bound for any sampling of
these vectors: equal numbers of each class as a linear classifier predicts it, trained with the labels of the others.

Then copies of some images are planted, enlarged to 128 pixels and saved as JPEG, cropped, lightened, darkened or
scaled; dedup should find these copies only.  CIFAR-10 itself holds near-duplicates, also mirrored and shifted ones, so
a pair counts as correct if its pixels correlate after alignment.  The record goes to records/curation.json.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE), str(ROOT), str(ROOT / "kernels"), str(HERE / "nano")]

from dinov3_infer import Backbone  # noqa: E402
from dinov3_infer.features.disk.store import Store  # noqa: E402
from dinov3_infer.tasks.clusters import default_clusters, hierarchy  # noqa: E402
from dinov3_infer.tasks.neighbours import duplicates  # noqa: E402

WAYS = ("JPEG", "crop", "light", "size")
SIDE = 128  # side of a copy before it is changed, in pixels
ALIKE = 0.8  # smallest correlation of the pixels of a correct pair


def long_tail(labels: np.ndarray, most: int, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the chosen images: `most` of class 0, down to most / factor of class 9."""
    sizes = np.geomspace(most, most / factor, 10).round().astype(int)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(sizes)]
    return rng.permutation(np.concatenate(chosen))


# --- near-duplicates -----------------------------------------------------------------------------------------------


def changed(pixels: np.ndarray, way: str, rng: np.random.Generator) -> Image.Image:
    """A near-duplicate: JPEG of quality 60 to 95, up to 3 % cropped at each border, 5 to 20 % lighter or darker, or
    resized to 64 to 192 pixels.
    """
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if way == "JPEG":
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(60, 96)))
        return Image.open(stream).convert("RGB")
    if way == "crop":
        left, top, right, bottom = (int(v) for v in rng.integers(0, 5, 4))
        return image.crop((left, top, SIDE - right, SIDE - bottom))
    if way == "light":
        return ImageEnhance.Brightness(image).enhance(1 + float(rng.choice([1, -1]) * rng.uniform(0.05, 0.2)))
    side = int(rng.integers(SIDE // 2, SIDE * 3 // 2 + 1))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two images [32, 32, 3], the best over mirroring, scales and shifts."""
    best = -1.0
    for turned in (other, other[:, ::-1]):
        for side in (32, 36, 40, 45):
            for fixed, moved in ((one, turned), (turned, one)) if side > 32 else ((one, turned),):
                large = np.asarray(Image.fromarray(np.ascontiguousarray(moved)).resize((side, side)), np.float32)
                large = np.pad(large, ((4, 4), (4, 4), (0, 0)), "edge")
                small = fixed.astype(np.float32)
                small = small - small.mean((0, 1))
                for top in range(0, side - 32 + 9, 2 if side > 32 else 1):
                    for left in range(0, side - 32 + 9, 2 if side > 32 else 1):
                        part = large[top : top + 32, left : left + 32]
                        part = part - part.mean((0, 1))
                        length = np.sqrt((small * small).sum() * (part * part).sum()) + 1e-6
                        best = max(best, float((small * part).sum() / length))
    return best


def dedup(
    store: Any,
    pixels: np.ndarray,
    planted: dict[int, int],
    thresholds: list[float],
    whiten: bool = True,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """For each threshold, the share of planted copies that are removed, and the share of correct removals.

    A removal is correct if the kept image is a copy, or its pixels correlate; every removal of a group must be.
    `most`: largest number of removals to check, chosen at random.
    """
    found, known = [], dict[tuple[int, int], bool]()
    count = len(pixels)

    def alike(a: int, b: int) -> bool:
        a, b = sorted((planted.get(a, a), planted.get(b, b)))
        if a != b and (a, b) not in known:
            known[a, b] = correlation(pixels[a], pixels[b]) >= ALIKE
        return a == b or known[a, b]

    for threshold in thresholds:
        group = duplicates(store, threshold, whiten=whiten).group
        hit = [group[copy] == group[original] for copy, original in planted.items()]
        dropped = np.flatnonzero(group != np.arange(len(group))).tolist()
        looked = np.random.default_rng(1).permutation(dropped)[:most].tolist()
        wrong = [
            a for a in looked if not any(alike(a, int(b)) for b in np.flatnonzero(group == group[a])[:50] if b != a)
        ]
        by_way = {way: float(np.mean(hit[i :: len(WAYS)])) for i, way in enumerate(WAYS)}
        found.append(
            dict(
                threshold=threshold, recall=float(np.mean(hit)), recall_by_way=by_way, dropped=len(dropped),
                of_the_set_itself=sum(a < count for a in dropped),
                precision=1 - len(wrong) / max(1, len(looked)), looked_at=len(looked),
                wrong=[[a, int(group[a])] for a in wrong[:50]],
            )
        )  # fmt: skip
        print(found[-1], flush=True)
    return found


# --- a balanced sample ---------------------------------------------------------------------------------------------


class Part:
    """A store with some columns of another store's vectors: plain, centred or whitened."""

    def __init__(self, store: Store, columns: slice, change: str = "as they are", count: int | None = None) -> None:
        rows = np.concatenate([block for _, block in store.blocks()])[:count, columns]
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        if change != "as they are":
            rows = rows - rows.mean(0)
        if change == "whitened":  # 64 directions, since more are noise
            values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
            rows = rows @ (vectors[:, -64:] / np.sqrt(values[-64:] + 0.1 * values[-64:].mean()))
        self.rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        self.good, self.width = store.good[:count], self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, rows: int = 16384) -> Iterator[tuple[int, np.ndarray]]:
        return ((first, self.rows[first : first + rows]) for first in range(0, len(self.rows), rows))


def entropy(shares: np.ndarray) -> float:
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def entropy_of(labels: np.ndarray) -> float:
    return entropy(np.bincount(labels, minlength=10) / len(labels))


def labelled(rows: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Entropy of a sample with equal shares of each predicted class, and mean recall; class-balanced least squares."""
    rows, fold = np.pad(rows, ((0, 0), (0, 1)), constant_values=1.0), np.arange(len(rows)) % 5
    predicted, weight = np.zeros(len(rows), int), 1 / np.bincount(labels)[labels, None]
    for part in range(5):
        known = fold != part
        products = rows[known].T @ (rows[known] * weight[known])
        ridge = 1e-3 * np.trace(products) / len(products) * np.eye(len(products))
        answer = np.linalg.solve(products + ridge, rows[known].T @ (np.eye(10)[labels[known]] * weight[known]))
        predicted[~known] = (rows[~known] @ answer).argmax(1)
    table = np.zeros((10, 10))
    np.add.at(table, (predicted, labels), 1)
    shares = (table / np.maximum(1, table.sum(1, keepdims=True)))[table.sum(1) > 0].mean(0)
    return entropy(shares), float((np.diag(table) / table.sum(0)).mean())


def balance(store: Store, labels: np.ndarray, counts: list[int], seeds: int) -> dict[str, Any]:
    levels, width = default_clusters(len(labels)), store.width // 2
    parts = {"class token": slice(width), "mean of patches": slice(width, None), "both": slice(None)}
    drawn = {c: [entropy_of(np.random.default_rng(s).permutation(labels)[:c]) for s in range(seeds)] for c in counts}
    record: dict[str, Any] = dict(needed=0.9 * np.log(10), of_all=entropy_of(labels), random=drawn, variants=[])
    for name, columns in parts.items():
        for change in ("as they are", "centred", "whitened") if name == "class token" else ("as they are",):
            part = Part(store, columns, change, len(labels))
            for clusters in (levels, levels[-1:]):
                trees = [hierarchy(part, clusters, seed=s, iterations=15) for s in range(seeds)]  # type: ignore[arg-type]
                found = {c: [entropy_of(labels[t.sample(c, s)]) for s, t in enumerate(trees)] for c in counts}
                means = {c: float(np.mean(found[c])) for c in counts}
                record["variants"].append(
                    dict(vectors=name, change=change, clusters=clusters, mean=means, entropies=found)
                )
                print(name, change, clusters, means, flush=True)
        bound, recall = labelled(Part(store, columns, "centred", len(labels)).rows, labels)
        record[f"labelled, {name}"] = dict(entropy=bound, mean_recall=recall)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=5000, help="images of the most frequent class (default: 5000)")
    parser.add_argument("--planted", type=int, default=500, help="near-duplicates to plant (default: 500)")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[100, 500], help="images per sample (default: 100 500)"
    )
    parser.add_argument(
        "--classes",
        type=int,
        nargs=10,
        default=range(10),
        help="order of the classes, most frequent first (default: 0 to 9)",
    )
    parser.add_argument("--size", type=int, default=112, help="input size in pixels (default: 112)")
    parser.add_argument("--seeds", type=int, default=5, help="random seeds (default: 5)")
    parser.add_argument("--weights", type=Path, help="weights (default: those that the tests download)")
    parser.add_argument(
        "--plain", metavar="NAME", help="measure only near-duplicates without whitening; add them to the record as NAME"
    )
    parser.add_argument("--folder", type=Path, help="folder that keeps images and vectors for the next run")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "curation.json", help="record to write")
    args = parser.parse_args()
    from evaluate import cifar10

    images, targets, *_ = cifar10(50_000, 1)
    labels = np.argsort(args.classes)[targets.numpy()]
    rng = np.random.default_rng(0)
    chosen = long_tail(labels, args.most, 100, rng)
    pixels = np.asarray(images)[chosen]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        weights = args.weights
        if weights is None:
            from fetch import write_dinov2_vits14

            weights = write_dinov2_vits14(Path(temporary))[0]
        bb = Backbone.from_pretrained(weights)
        originals = rng.choice(len(chosen), args.planted, replace=False).tolist()
        planted = {len(chosen) + i: number for i, number in enumerate(originals)}
        album = folder / "album"
        if not album.is_dir():
            album.mkdir(parents=True)
            pictures = [Image.fromarray(one) for one in pixels]
            pictures += [changed(pixels[n], WAYS[i % len(WAYS)], rng) for i, n in enumerate(originals)]
            for i, one in enumerate(pictures):
                one.save(album / f"{i:06d}.png")
        bb.embed(album, folder / "vectors.npy", size=args.size, pooling="cls_mean", shard_size=1000, progress=True)
        store = Store(folder / "vectors.npy")
        width = store.width // 2
        record: dict[str, Any] = dict(pictures=len(chosen), planted=args.planted, size=args.size)
        plain = [0.97, 0.98, 0.985, 0.99]
        if args.plain is not None:
            record = json.loads(args.out.read_text())
            found = dedup(Part(store, slice(width)), pixels, planted, plain, whiten=False, most=40)
            record.setdefault("dedup, plain", {})[args.plain] = found
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            return
        thresholds = [0.7, 0.75, 0.8]
        record["dedup"] = {
            name: dedup(Part(store, columns), pixels, planted, thresholds)
            for name, columns in (("class token", slice(width)), ("both", slice(None)))
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        record["balance"] = balance(store, labels[chosen], args.counts, args.seeds)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
