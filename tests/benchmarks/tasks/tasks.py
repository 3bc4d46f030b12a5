"""What is measured: a function for each task, from a model and a seed to one number, larger is better.

The seed draws the images, the weights of the heads, and the weights of the random backbone.
"""

import random
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import anomaly  # noqa: E402
import depth  # noqa: E402
import detection  # noqa: E402
import discovery  # noqa: E402
import foreground  # noqa: E402
import masks  # noqa: E402
import matching  # noqa: E402
import normals  # noqa: E402
import retrieval  # noqa: E402
import sets  # noqa: E402
import tracking  # noqa: E402
import video  # noqa: E402
from common import layer_features, maps  # noqa: E402
from heads import layers_of  # noqa: E402
from metrics import (  # noqa: E402
    average_precision,
    depth_errors,
    epipolar_inliers,
    iou,
    mean_iou,
    panoptic_quality,
    region_and_contour,
)
from models import model_of  # noqa: E402

from dinov3_infer import Features  # noqa: E402
from dinov3_infer.tasks import KNN, AttentiveProbe, LinearProbe, OneShotSegmenter, SegmentationHead, nearest  # noqa: E402

SEEN, SMALL = 224, 112  # pixels
SCENES, HELD_OUT, SIDE = 240, 48, 168  # images, images, pixels as the model sees them
COUNT, ASKED = 600, 300  # images of CIFAR-10 for a seed
STEPS = {"linear": 400, "dpt": 100, "queries": 300}  # of training


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- features, computed once -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def cifar(model: str, seed: int) -> dict[str, Tensor]:
    """Class tokens, patch tokens and classes of a set of images that depends on the seed."""
    train, classes, test, truth = sets.cifar10()
    here, there = slice(seed * COUNT, (seed + 1) * COUNT), slice(seed * ASKED, (seed + 1) * ASKED)
    found: dict[str, Tensor] = {"classes": classes[here], "truth": truth[there]}
    for name, images in (("train", train[here]), ("test", test[there])):
        each = list(model_of(model, seed).iter_features(list(images), size=SMALL, fit="squash"))
        found[f"{name} cls"] = torch.cat([f.embedding for f in each])
        found[f"{name} patches"] = torch.cat([f.patch_tokens for f in each])
    return found


@lru_cache(maxsize=1)
def scenes(seed: int) -> tuple[list[sets.Scene], list[sets.Scene]]:
    options = dict(count=(1, 3), sizes=(0.3, 0.6))
    return sets.scenes(SCENES, seed, False, **options), sets.scenes(HELD_OUT, seed, True, **options)


@lru_cache(maxsize=1)
def scene_features(model: str, seed: int) -> tuple[list[Features], list[Features]]:
    """Features of the scenes, from four layers."""
    bb = model_of(model, seed)
    train, test = (
        list(
            bb.iter_features([s.image for s in part], size=SIDE, fit="squash", layers=layers_of("dpt", bb.config.depth))
        )
        for part in scenes(seed)
    )
    return train, test


def scene_maps(model: str, seed: int) -> tuple[Tensor, Tensor]:
    """The concatenated maps of the four layers, [N, 4 * C, h, w]."""
    train, test = (
        torch.cat([torch.cat([layer.feature_map for layer in f.layers], dim=1) for f in part])
        for part in scene_features(model, seed)
    )
    return train, test


# --- images as a whole ---------------------------------------------------------------------------------------------


def knn(model: str, seed: int) -> float:
    f = cifar(model, seed)
    return KNN().fit(f["train cls"], f["classes"]).score(f["test cls"], f["truth"])


def linear(model: str, seed: int) -> float:
    f = cifar(model, seed)
    return LinearProbe(steps=1000, seed=seed).fit(f["train cls"], f["classes"]).score(f["test cls"], f["truth"])


def attentive(model: str, seed: int) -> float:
    f = cifar(model, seed)
    return AttentiveProbe(seed=seed).fit(f["train patches"], f["classes"]).score(f["test patches"], f["truth"])


def retrieved(model: str, seed: int) -> float:
    """Share of 40 images for which one of the 5 nearest shows the same object in another view."""
    draw = random.Random(seed)
    chosen = draw.sample(sets.stamps(False) + sets.stamps(True), 40)
    gallery, queries = (
        [sets.scene(draw, False, (1, 1), (0.6, 0.9), [stamp]).image for stamp in chosen] for _ in range(2)
    )
    bank, asked = (retrieval.embed(model_of(model, seed), images, SEEN) for images in (gallery, queries))
    return float((nearest(asked, bank, 5)[1] == torch.arange(len(chosen))[:, None]).any(dim=1).float().mean())


def happening(model: str, seed: int) -> float:
    """Accuracy for four events from 6 frames of unseen objects: comes, goes, passes or stays."""
    draw = random.Random(seed)
    bb, made = model_of(model, seed), {}
    for held_out, count in ((False, 120), (True, 60)):
        events = [i % len(sets.EVENTS) for i in range(count)]
        clips = [sets.event(draw, held_out, number, 6) for number in events]
        made[held_out] = torch.stack([video.tokens(bb, c, 6, SMALL) for c in clips]), torch.tensor(events)
    return video.train(*made[False], seed=seed).score(*made[True])


# --- things without training -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def single(seed: int) -> list[sets.Scene]:
    """Photographs with one large object."""
    return sets.scenes(32, seed, True, count=(1, 1), sizes=(0.4, 0.7))


def split(model: str, seed: int) -> float:
    features = list(model_of(model, seed).iter_features([s.image for s in single(seed)], size=SEEN, fit="squash"))
    found = [foreground.split([f])[0] for f in features]
    return mean([float(iou(torch.from_numpy(m), s.numbers > 0)) for m, s in zip(found, single(seed), strict=True)])


def discovered(model: str, seed: int) -> float:
    """Share of objects whose box has an IoU of at least 0.5 with the box found."""
    hits = []
    for s in single(seed):
        thing = discovery.discover(model_of(model, seed).extract_features(s.image, size=SEEN, fit="squash"))[0]
        box = torch.tensor([discovery.box_of(thing, (1, 1))])
        hits.append(float(iou(box, s.boxes)[0, 0] >= 0.5))
    return mean(hits)


def one_shot(model: str, seed: int) -> float:
    """IoU of an object that is marked in one image and found in another view on another photograph."""
    draw, found, bb = random.Random(seed), [], model_of(model, seed)
    for stamp in draw.sample(sets.stamps(True), 16):
        first, second = (sets.scene(draw, True, (1, 1), (0.4, 0.7), [stamp]) for _ in range(2))
        a, b = (bb.extract_features(s.image, size=SEEN, fit="squash") for s in (first, second))
        labels = OneShotSegmenter().fit(a, [first.numbers > 0]).predict(b)[0]
        found.append(float(iou(labels > 0, second.numbers > 0)))
    return mean(found)


def transferred(model: str, seed: int) -> float:
    """Share of 200 points of graf, Aloe and Motorcycle each that arrive within 3 % of the longer side."""
    found = []
    for pair in sets.pairs().values():
        a, b = layer_features(model_of(model, seed), (pair.first, pair.second), size=448)
        known = (~pair.there.isnan().any(dim=-1)).nonzero()
        y, x = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:200]].T
        arrived = matching.transfer(a, b, torch.stack((x, y), dim=1))
        far = (arrived - pair.there[y, x]).norm(dim=1) / max(pair.second.size)
        found.append(float((far < 0.03).float().mean()))
    return mean(found)


def matched(model: str, seed: int) -> float:
    """Share of 100 sparse matches of leuven that one geometry explains to 1 % of the longer side."""
    first, second = sets.leuven()
    a, b = layer_features(model_of(model, seed), (first, second), size=448)
    return epipolar_inliers(*matching.sparse(a, b, 100), within=0.01 * max(second.size), seed=seed)


def tracked(model: str, seed: int) -> float:
    """J&F of two objects over 10 frames without the first, mean of 5 clips."""
    draw, found = random.Random(seed), []
    for clip in (sets.clip(draw, True, 10, 2) for _ in range(5)):
        features = layer_features(model_of(model, seed), clip.frames, size=SEEN)
        for labels, truth in list(zip(tracking.track(features, clip.labels[0]), clip.labels, strict=True))[1:]:
            found += [region_and_contour(torch.from_numpy(labels == i), torch.from_numpy(truth == i)) for i in (1, 2)]
    return mean(found)


def odd(model: str, seed: int) -> float:
    """Average precision of pixels: grey objects on grey textures, with a bank of 8 crops of each texture."""
    draw, found = random.Random(seed), []
    for texture in sets.textures():
        good, bad, truth = [], [], []
        for number in range(12):
            left, top = (draw.randint(0, n - 256) for n in texture.size)
            part = texture.crop((left, top, left + 256, top + 256)).resize((sets.SIDE, sets.SIDE))
            labels = torch.zeros(sets.SIDE, sets.SIDE).long().numpy()
            if number >= 8:
                cut = sets.cut_out(draw.choice(sets.stamps(True))[0], draw, draw.uniform(0.15, 0.3))
                place = tuple(draw.randint(0, sets.SIDE - n) for n in cut.size)
                sets.paste(part, labels, cut.convert("LA").convert("RGBA"), place, 1)
            (good if number < 8 else bad).append(part)
            truth += [torch.from_numpy(labels) > 0] if number >= 8 else []
        bb = model_of(model, seed)
        bank = anomaly.MemoryBank(list(layer_features(bb, good, size=SEEN)))
        scores = [bank.distances(f) for f in layer_features(bb, bad, size=SEEN)]
        size = (sets.SIDE, sets.SIDE)
        shown = [F.interpolate(s[None, None], size=size, mode="bilinear").flatten() for s in scores]
        hits = torch.stack(truth).flatten()[torch.cat(shown).argsort(descending=True)].double()
        found.append(float((hits * hits.cumsum(0) / torch.arange(1, len(hits) + 1)).sum() / hits.sum()))
    return mean(found)


# --- trained heads ---------------------------------------------------------------------------------------------------


def segmented(model: str, seed: int) -> float:
    """mIoU of the background and 4 kinds of objects, with held-out objects and photographs."""
    (train, test), (known, asked) = scenes(seed), scene_features(model, seed)
    head = SegmentationHead(seed=seed).fit(known, [s.labels for s in train])
    return mean_iou(head.predict(asked), [s.labels for s in test], len(sets.KINDS) + 1)


def detected(model: str, seed: int) -> float:
    """AP50 of boxes of 4 kinds of held-out objects."""
    (train, test), (known, asked) = scenes(seed), scene_maps(model, seed)
    torch.manual_seed(seed)
    detector = detection.train(known, [(s.boxes, s.classes) for s in train], len(sets.KINDS), STEPS["queries"])
    return average_precision(detection.detect(detector, asked), [(s.boxes, s.classes) for s in test])


@lru_cache(maxsize=1)
def mask_queries(model: str, seed: int) -> list[tuple[Tensor, ...]]:
    """Predictions of mask queries in held-out scenes; the background is class 0."""
    train, known, asked = scenes(seed)[0], *scene_maps(model, seed)
    torch.manual_seed(seed)
    head = masks.train(known, [segments(s) for s in train], len(sets.KINDS) + 1, STEPS["queries"])
    return masks.instances(head, asked, (SIDE, SIDE))


def segments(scene: sets.Scene) -> tuple[Tensor, Tensor]:
    """Labels of background and objects, at the size of the model's input."""
    small = F.interpolate(scene.numbers[None, None].float(), size=(SIDE, SIDE), mode="nearest-exact")[0, 0]
    classes = torch.cat((torch.zeros(1, dtype=torch.long), scene.classes + 1))
    return small == torch.arange(len(classes))[:, None, None], classes


def cut_out(model: str, seed: int) -> float:
    """AP50 of the masks of held-out objects."""
    found = [(s[c > 0], m[c > 0] > 0.5, c[c > 0]) for s, m, c in mask_queries(model, seed)]
    truth = [(m[1:], c[1:]) for m, c in map(segments, scenes(seed)[1])]
    return average_precision(found, truth)


def panoptic(model: str, seed: int) -> float:
    """PQ of background and held-out objects."""
    found = []
    for scores, chance, names in mask_queries(model, seed):
        labels, classes = masks.panoptic(scores, chance, names)
        found.append((labels == torch.arange(1, len(classes) + 1)[:, None, None], classes))
    return panoptic_quality(found, [segments(s) for s in scenes(seed)[1]])


def depth_of(head: str) -> Callable[[str, int], float]:
    def measure(model: str, seed: int) -> float:
        """delta1: share of pixels of held-out tiles whose depth is right within a quarter."""
        bb, train, test = model_of(model, seed), sets.tiles(seed, False), sets.tiles(seed, True)
        layers = layers_of(head, bb.config.depth)
        known, asked = (maps(bb, [image for image, *_ in part], SEEN, layers) for part in (train, test))
        torch.manual_seed(seed)
        trained = depth.train(known, torch.stack([d for _, d, _ in train]), head, STEPS[head])
        truth = torch.stack([d for _, d, _ in test])
        with torch.no_grad():
            found = F.interpolate(trained(asked)[:, None], size=truth.shape[1:], mode="bilinear")[:, 0]
        return depth_errors(found, truth)["delta1"]

    return measure


def facing(model: str, seed: int) -> float:
    """Share of pixels whose normal is right within 30 degrees; a head of each half of the tiles predicts the other."""
    bb, found = model_of(model, seed), []
    for half in (2 * seed, 2 * seed + 1):
        train, test = sets.tiles(half, False), sets.tiles(half, True)
        layers = layers_of("dpt", bb.config.depth)
        known, asked = (maps(bb, [image for image, *_ in part], SEEN, layers) for part in (train, test))
        each = [[normals.normals_of(d[None], focal) for _, d, focal in part] for part in (train, test)]
        (right, sure), (truth, counted) = (tuple(map(torch.cat, zip(*part, strict=True))) for part in each)
        torch.manual_seed(seed)
        head = normals.train(known, right, sure, "linear", STEPS["linear"])
        with torch.no_grad():
            cosine = (normals.at_size(head(asked), truth.shape[2:]) * truth).sum(dim=1)
        found.append(float((cosine[counted] > 3**0.5 / 2).float().mean()))
    return mean(found)
