"""What the commands that run a model share."""

import argparse
from collections.abc import Iterable
from typing import TypedDict

from tqdm import tqdm  # type: ignore[import-untyped]

from ..backbone import Backbone
from ..errors import Dinov3Error, InputError, ModelNotFoundError
from ..features.result import Features
from ..images.preprocess import Fit
from .main import FAILED, OK, SKIPPED

__all__ = ["Geometry", "geometry", "load_backbone", "results", "status"]

DEFAULT_MODEL = "nano"


class Geometry(TypedDict):
    """How pictures become pixels, as the methods of a Backbone take it."""

    size: int | tuple[int, int] | None
    fit: Fit | None


def geometry(args: argparse.Namespace) -> Geometry:
    """Raises InputError for the picture's own size where the fit needs another."""
    if args.size == "own" and args.fit != "native":
        raise InputError(f"--size own goes with --fit native; with --fit {args.fit or 'of the model'} give pixels")
    return Geometry(size=None if args.size == "own" else args.size, fit=args.fit)


def load_backbone(args: argparse.Namespace) -> Backbone:
    """The model of the command line."""
    if args.model is not None:
        return Backbone.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    try:
        return Backbone.from_pretrained(DEFAULT_MODEL, device=args.device, dtype=args.dtype)
    except ModelNotFoundError:
        raise InputError(
            "no model was named, and this release holds no weights of its own; give -m with a name (dinov3-infer "
            "models lists them), a folder or a weights file"
        ) from None


def results(
    bb: Backbone, paths: list[str], args: argparse.Namespace, layers: list[int] | None = None
) -> Iterable[Features | Dinov3Error]:
    """One per picture, in order, under a bar where stderr is a terminal.  Wrong options are refused at once."""
    found = bb.iter_features(
        paths, **geometry(args), layers=layers, batch_size=args.batch_size, num_workers=args.workers, on_error="return"
    )
    return tqdm(found, total=len(paths), unit="img", disable=None)  # type: ignore[no-any-return]


def status(count: int, skipped: int) -> int:
    """Exit status after `skipped` of `count` pictures could not be read."""
    return OK if not skipped else FAILED if skipped == count else SKIPPED
