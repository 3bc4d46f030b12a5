"""`dinov3-infer show`: what the features hold, beside the photographs, as one picture."""

import argparse
from collections.abc import Callable

import numpy as np
from PIL import Image

from ..backbone import Backbone
from ..errors import InputError
from ..features.result import Features
from ..images.decode import ImageLike, load_image
from ..images.levels import as_levels
from ..images.opening import find_images
from ..system import whole
from ..tasks.overlay import attention_picture, overlay, panel, sheet
from ..tasks.pca import foreground, pca_picture, pca_rgb
from ..tasks.similarity import region_vector, similarity_map
from .inputs import check_file, geometry, load_backbone
from .main import OK, tell

__all__ = ["run"]

MOST = 64  # pictures on one sheet


def run(args: argparse.Namespace) -> int:
    images = find_images(args.sources)
    paths = [images.picture(i) for i in range(min(len(images), MOST))]
    if len(images) > MOST:
        raise InputError(f"{len(images)} pictures do not fit on one sheet; give {MOST} at most")
    out = check_file(args.out, args.overwrite, (".png", ".jpg", ".jpeg", ".webp"))
    if args.levels is not None:  # so that what is shown is what the model sees
        paths = [load_image(path, levels=as_levels(args.levels)) for path in paths]
    rows = _KINDS[args.kind](load_backbone(args), paths, args)
    with whole(out) as path:
        _together(rows).save(path, quality=92)
    tell(f"wrote '{out}'")
    return OK


def _features(bb: Backbone, paths: list[ImageLike], args: argparse.Namespace) -> list[Features]:
    return list(bb.iter_features(paths, **geometry(args)))


def _pca(bb: Backbone, paths: list[ImageLike], args: argparse.Namespace) -> list[Image.Image]:
    features = _features(bb, paths, args)
    colours = pca_rgb(features, foreground(features) if args.foreground else None)
    return [
        pca_picture(path, one, found.placements[0]) for path, one, found in zip(paths, colours, features, strict=True)
    ]


def _attention(bb: Backbone, paths: list[ImageLike], args: argparse.Namespace) -> list[Image.Image]:
    rows = []
    for path in paths:
        found = bb.attention_maps(path, layer=args.layer, query=args.point or "cls", **geometry(args))[0].cpu()
        placement = bb.preprocess.with_options(**geometry(args)).plan(*load_image(path).shape[1:])
        if args.heads:
            rows.append(attention_picture(path, found, placement, args.point))
            continue
        mean = found.mean(dim=0)
        limits = float(mean.min()), float(np.quantile(mean, 0.995))
        rows.append(_pair(path, overlay(path, mean, placement, limits=limits, mark=args.point)))
    return rows


def _similarity(bb: Backbone, paths: list[ImageLike], args: argparse.Namespace) -> list[Image.Image]:
    features = _features(bb, paths, args)
    vector = region_vector(features[0], point=args.point)
    maps = [similarity_map(found, vector)[0] for found in features]
    seen = [m if f.valid is None else m[f.valid[0]] for m, f in zip(maps, features, strict=True)]
    limits = min(float(m.min()) for m in seen), max(float(m.max()) for m in seen)  # one scale, so that they compare
    return [
        _pair(path, overlay(path, one, found.placements[0], limits=limits, mark=args.point if i == 0 else None))
        for i, (path, one, found) in enumerate(zip(paths, maps, features, strict=True))
    ]


def _pair(path: ImageLike, shown: Image.Image) -> Image.Image:
    return sheet([panel(path), shown], columns=2)


def _together(rows: list[Image.Image]) -> Image.Image:
    """Rows of one width below each other, in columns where they are many; each goes to the column that is shortest."""
    if len(rows) == 1:
        return rows[0]
    width = min(row.width for row in rows)
    heights = [0] * max(1, round((len(rows) / 3) ** 0.5))  # of the columns; a row is about three times as wide as high
    places = []
    for row in rows:
        column = heights.index(min(heights))
        size = (width, round(row.height * width / row.width))
        places.append((row.resize(size, Image.Resampling.LANCZOS), (column * width, heights[column])))
        heights[column] += size[1]
    made = Image.new("RGB", (len(heights) * width, max(heights)), "white")
    for row, place in places:
        made.paste(row, place)
    return made


_KINDS: dict[str, Callable[[Backbone, list[ImageLike], argparse.Namespace], list[Image.Image]]] = {
    "pca": _pca,
    "attention": _attention,
    "similarity": _similarity,
}
