"""`dinov3-infer embed search`: the pictures most like a given one."""

import argparse
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import Dinov3Error, InputError
from ..features.disk.lists import write_list
from ..features.disk.store import Store
from ..images.decode import ImageLike
from ..images.levels import Levels, as_levels
from ..images.opening import open_names
from ..images.paths import is_collection, list_images
from ..images.preprocess import Preprocess
from ..system import whole
from ..tasks.neighbours import search
from ..tasks.overlay import panel, sheet
from .inputs import check_file, load_backbone
from .main import OK, say, tell

__all__ = ["run"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def run(args: argparse.Namespace) -> int:
    outs = [check_file(out, args.overwrite, (*PICTURES, ".txt")) for out in args.out or ()]
    store = Store(args.vectors)
    queries = list_images(args.query) if is_collection(args.query) else [args.query]
    vectors = _embedded(store, queries, args)
    levels = as_levels(store.recipe.preprocess.get("levels"))
    scores, numbers = search(store, vectors, args.count, _device())
    best = torch.full((len(store),), -torch.inf, dtype=torch.float32, device="cpu").scatter_reduce(
        0, numbers.flatten(), scores.flatten(), "amax"
    )
    top = best.topk(min(args.count, int(best.isfinite().sum())))
    names = [store.paths[int(number)] for number in top.indices]
    for score, name in zip(top.values.tolist(), names, strict=True):
        say(f"{score:.4f}", name)
    for out in outs:
        if out.suffix == ".txt":
            write_list(out, names)
        else:
            captions = ["query"] * len(queries) + [f"{score:.3f}" for score in top.values.tolist()]
            shown = [panel(query, levels) for query in queries] + _panels(names, levels)
            with whole(out) as path:
                sheet([_square(picture) for picture in shown], captions).save(path)
        tell(f"wrote '{out}'")
    return OK


def _embedded(
    store: Store, queries: list[str], args: argparse.Namespace
) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """Vectors of the queries, made as those of the store were."""
    recipe = store.recipe
    if args.model is None and recipe.model is None:
        raise InputError(f"the model behind '{args.vectors}' has no name; give it with -m")
    args.model = args.model or recipe.model
    bb = load_backbone(args)
    if bb.fingerprint() != recipe.fingerprint:
        raise InputError(f"'{args.vectors}' was made with other weights than '{args.model}' holds; give those with -m")
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in recipe.preprocess.items()}
    bb.preprocess = Preprocess(**settings)
    return bb.embed(queries, pooling=recipe.pooling, decode=recipe.decode)


def _panels(names: list[str], levels: Levels | None) -> list[Image.Image]:
    """Pictures that have gone since are left grey."""
    source = open_names(names, "the results")
    found = []
    for i in range(len(source)):
        try:
            picture: ImageLike = source.load(i, levels=levels).image
            found.append(panel(picture))
        except Dinov3Error:
            found.append(Image.new("RGB", (512, 512), "grey"))
    return found


def _square(picture: Image.Image, side: int = 320) -> Image.Image:
    """Small, and in the middle of a square, so that rows are even."""
    made = Image.new("RGB", (side, side), "white")
    picture.thumbnail((side, side))
    made.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return made


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
