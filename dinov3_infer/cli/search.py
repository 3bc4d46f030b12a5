"""`dinov3-infer embed search`: finds the images most similar to a given one."""

import argparse
import os
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

SHEETS = (".png", ".jpg", ".jpeg", ".webp")


def run(args: argparse.Namespace) -> int:
    """Prints the most similar images with their cosines; returns the exit status."""
    outs = [check_file(out, args.overwrite, (*SHEETS, ".txt")) for out in args.out or ()]
    store = Store(args.vectors)
    queries = list_images(args.query) if is_collection(args.query) else [args.query]
    vectors = _embedded(store, queries, args)
    levels = as_levels(store.recipe.preprocess.get("levels"))
    most = args.count + len(queries)  # the queries may be in the store, and are not results
    scores, numbers = search(store, vectors, most, _device())
    best = torch.full((len(store),), -torch.inf, dtype=torch.float32, device="cpu").scatter_reduce(
        0, numbers.flatten(), scores.flatten(), "amax"
    )
    top = best.topk(min(most, int(best.isfinite().sum())))
    asked = {os.path.abspath(query) for query in queries}
    pairs = [
        (score, store.paths[number]) for score, number in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    found = [(score, name) for score, name in pairs if os.path.abspath(name) not in asked][: args.count]
    names = [name for _, name in found]
    for score, name in found:
        say(f"{score:.4f}", name)
    for out in outs:
        if out.suffix == ".txt":
            write_list(out, names)
        else:
            captions = [f"query {os.path.basename(query)}" for query in queries]
            captions += [f"{score:.3f} {os.path.basename(name)}" for score, name in found]
            shown = [panel(query, levels) for query in queries] + _panels(names, levels)
            with whole(out) as path:
                sheet([_square(image) for image in shown], captions).save(path)
        tell(f"wrote '{out}'")
    return OK


def _embedded(
    store: Store, queries: list[str], args: argparse.Namespace
) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """Vectors [n, C] of the queries, made in the same way as those of the store."""
    recipe = store.recipe
    made = recipe.origin or recipe.model or f"a model without a name (fingerprint {recipe.fingerprint[:16]})"
    if args.model is None and recipe.origin is None and recipe.model is None:
        raise InputError(f"'{args.vectors}' was made with {made}; add it as -m")
    try:
        bb = load_backbone(argparse.Namespace(**vars(args) | dict(model=args.model or made)))
    except Dinov3Error as error:
        if args.model is not None:
            raise
        raise InputError(f"'{args.vectors}' was made with '{made}', which cannot be loaded: {error}") from None
    if bb.fingerprint() != recipe.fingerprint:
        raise InputError(
            f"'{args.vectors}' was made with other weights (fingerprint {recipe.fingerprint[:16]}"
            f"{f', from {made!r}' if args.model else ''}) than '{args.model or made}' now has; give the same weights "
            "with -m"
        )
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in recipe.preprocess.items()}
    try:
        bb.preprocess = Preprocess(**settings)
    except TypeError:
        raise InputError(f"'{args.vectors}' does not record how images were prepared; embed again") from None
    return bb.embed(queries, pooling=recipe.pooling, decode=recipe.decode)


def _panels(names: list[str], levels: Levels | None) -> list[Image.Image]:
    """The images of the results; a missing one is grey."""
    source = open_names(names, "the results")
    found = []
    for i in range(len(source)):
        try:
            image: ImageLike = source.load(i, levels=levels).image
            found.append(panel(image))
        except Dinov3Error:
            found.append(Image.new("RGB", (512, 512), "grey"))
    return found


def _square(image: Image.Image, side: int = 320) -> Image.Image:
    """A small copy in the middle of a white square."""
    made = Image.new("RGB", (side, side), "white")
    image.thumbnail((side, side))
    made.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return made


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
