"""`dinov3-infer show`: what the features hold, or what a released head makes of them, beside the photographs."""

import argparse
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from ..backbone import Backbone
from ..errors import InputError, UnsupportedError
from ..features.result import Features
from ..images.decode import ImageLike, load_image
from ..images.levels import as_levels
from ..images.opening import find_images
from ..system import whole
from ..tasks.legend import depth_picture, segments_picture
from ..tasks.overlay import attention_picture, overlay, panel, sheet
from ..tasks.pca import foreground, pca_picture, pca_rgb
from ..tasks.similarity import region_vector, similarity_map
from .inputs import check_file, geometry, given_labels, load_backbone, load_released
from .main import OK, tell

__all__ = ["run"]

MOST = 64  # images on one sheet, or frames of an animation
_ANIMATED, _VIDEO = (".gif", ".webp", ".png", ".apng"), (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
_MILLISECONDS = 120  # of a frame
LONG_SIDE = 768  # pixels that a depth head sees unless another size is asked for


def run(args: argparse.Namespace) -> int:
    frames = _frames(args.sources[0]) if len(args.sources) == 1 else []
    moving = bool(frames) and args.out.lower().endswith((".gif", ".webp"))
    out = check_file(args.out, args.overwrite, (".png", ".jpg", ".jpeg", ".webp", *((".gif",) if frames else ())))
    paths: list[ImageLike] = [*frames] if frames else _images(args.sources)
    if args.levels is not None:  # so that what is shown is what the model sees
        paths = [load_image(path, levels=as_levels(args.levels)) for path in paths]
    if args.kind in _OF_HEADS:
        rows = _OF_HEADS[args.kind](paths, args)
    else:
        rows = _KINDS[args.kind](load_backbone(args), paths, args)
    with whole(out) as path:
        if moving:
            rows = _of_one_size(rows)
            rows[0].save(path, save_all=True, append_images=rows[1:], duration=_MILLISECONDS, loop=0)
        else:
            _together(rows).save(path, quality=92)
    tell(f"wrote '{out}'")
    return OK


def _images(sources: list[str]) -> list[ImageLike]:
    images = find_images(sources)
    if len(images) > MOST:
        raise InputError(f"{len(images)} images do not fit on one sheet; give {MOST} at most")
    return [images.image(i) for i in range(len(images))]


def _frames(source: str) -> list[Image.Image]:
    """At most MOST frames of an animation or a video, evenly spread; none of anything else."""
    suffix = os.path.splitext(source)[1].lower()
    if not os.path.isfile(source) or suffix not in (*_ANIMATED, *_VIDEO):
        return []
    frames = _decoded(source) if suffix in _VIDEO else _animated(source)
    if not frames:
        return []
    return [frames[i] for i in np.linspace(0, len(frames) - 1, min(MOST, len(frames))).round().astype(int)]


def _animated(source: str) -> list[Image.Image]:
    """None of a still image, nor of what is no image: the one who loads it says so."""
    try:
        with Image.open(source) as stream:
            if getattr(stream, "n_frames", 1) < 2:
                return []
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(stream)]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return []


def _decoded(source: str) -> list[Image.Image]:
    try:
        import av
    except ImportError:
        raise UnsupportedError(f"'{source}' is a video, which needs PyAV; pip install 'dinov3-infer[video]'") from None
    try:
        stream: Any = av.open(source)
        with stream as video:
            frames: list[Image.Image] = [frame.to_image() for frame in video.decode(video=0)]
    except (av.FFmpegError, IndexError):
        frames = []
    if not frames:
        raise InputError(f"'{source}' holds no frames that can be read; check it, or give its frames as images")
    return frames


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


def _depth(paths: list[ImageLike], args: argparse.Namespace) -> list[Image.Image]:
    head = load_released(args, "depth", args.dataset)
    maps = [found.depth for path in paths for found in head.predict([path], _size_of(path, head, args.size))]
    limits = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)  # one scale, so that they compare
    return [depth_picture(path, one, limits) for path, one in zip(paths, maps, strict=True)]


def _size_of(path: ImageLike, head: Any, asked: Any) -> Any:
    """DINOv2's heads learnt from images of about this size, and a photograph at its own would take minutes."""
    if asked is None and head.info.backbone.startswith("dinov2_"):
        return min(LONG_SIDE, max(load_image(path).shape[1:]))
    return None if asked == "own" else asked


def _segments(paths: list[ImageLike], args: argparse.Namespace) -> list[Image.Image]:
    if args.labels is None:
        head = load_released(args, "segments")
        return [segments_picture(path, found) for path in paths for found in head.predict([path], args.size)]
    head = load_released(args, "text")
    labels = head.encode_labels(given_labels(args), args.template)
    return [segments_picture(path, found) for path in paths for found in head.segment([path], labels, size=args.size)]


def _pair(path: ImageLike, shown: Image.Image) -> Image.Image:
    return sheet([panel(path), shown], columns=2)


def _of_one_size(rows: list[Image.Image]) -> list[Image.Image]:
    """With white below those whose legend is short."""
    size = max(row.width for row in rows), max(row.height for row in rows)
    made = [Image.new("RGB", size, "white") for _ in rows]
    for frame, row in zip(made, rows, strict=True):
        frame.paste(row, (0, 0))
    return made


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
_OF_HEADS: dict[str, Callable[[list[ImageLike], argparse.Namespace], list[Image.Image]]] = {
    "depth": _depth,
    "segments": _segments,
}
