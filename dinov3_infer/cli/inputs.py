"""Helpers of several commands: loading the model, preparing images, checking outputs."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import Dinov3Error, InputError, MissingFileError, ModelNotFoundError
from ..images.levels import Levels, as_levels
from ..images.paths import read_list
from ..images.preprocess import Fit
from ..images.sources import Source
from .head_options import USUAL
from .main import FAILED, OK, SKIPPED

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..features.result import Features

__all__ = [
    "Geometry", "check_file", "check_folder", "geometry", "given_labels", "load_backbone", "load_released", "results",
    "status",
]  # fmt: skip

DEFAULT_MODEL = "nano"


class Geometry(TypedDict):
    """Options of image preparation, as the methods of `Backbone` take them."""

    size: int | tuple[int, int] | None
    fit: Fit | None
    levels: Levels | None


def geometry(args: argparse.Namespace) -> Geometry:
    """The options --size, --fit and --levels.  Raises: InputError for values that do not fit together."""
    if args.size == "own" and args.fit != "native":
        raise InputError(f"--size own needs --fit native, not {args.fit or 'the default'}; add that, or give pixels")
    return Geometry(size=None if args.size == "own" else args.size, fit=args.fit, levels=as_levels(args.levels))


def load_backbone(args: argparse.Namespace) -> "Backbone":
    """Loads the model of the command line, nano by default.  Raises: InputError if this release lacks nano."""
    from ..backbone import Backbone  # imported here, so that commands without a model start faster

    try:
        return Backbone.from_pretrained(
            DEFAULT_MODEL if args.model is None else args.model,
            device=args.device,
            dtype=args.dtype,
            mode=args.mode,
            preprocessing=args.preprocessing,
            attn_implementation=args.attn_implementation,
            revision=args.revision,
        )
    except ModelNotFoundError:
        if args.model is not None:
            raise
        raise InputError(
            "no model is given and this release contains no weights; add -m with a name ('dinov3-infer models' lists "
            "them), a folder or a weights file"
        ) from None


def load_released(args: argparse.Namespace, kind: str, dataset: str | None = None) -> Any:
    """The released head of the command line.  Raises InputError for one of another kind."""
    from ..backbone import Backbone
    from ..released.attach import load_head
    from ..released.catalogue import HEADS, find_head, variant_of

    info = find_head(args.head or USUAL[kind])
    if info.kind != kind:
        names = " or ".join(sorted({f"'{row.name}'" for row in HEADS if row.kind == kind})[:2])
        labels = "--labels A,B,... or " if info.kind == "text" and hasattr(args, "labels") else ""
        raise InputError(f"{info.name} is of another kind, {info.kind}; give {labels}one for {kind}, such as {names}")
    if kind != "text" and getattr(args, "template", None):
        raise InputError("--template goes with --labels; give both, or neither")
    variant = variant_of(info.name, dataset, getattr(args, "layers", None))
    backbone = None
    if args.backbone is not None:
        backbone = Backbone.from_pretrained(info.backbone, weights=args.backbone, device=args.device)
    return load_head(info.name, backbone, weights=args.weights, variant=variant, device=args.device)


def given_labels(args: argparse.Namespace) -> list[str]:
    """Names with commas between, or the lines of @FILE."""
    text = args.labels
    names = read_list(text[1:]) if text.startswith("@") else text.split(",")
    return [name.strip() for name in names if name.strip()]


def results(
    bb: "Backbone", images: Source, args: argparse.Namespace, layers: list[int] | None = None
) -> Iterable["Features | Dinov3Error"]:
    """Features or an error for each image, in order, with a progress bar if stderr is a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    found = bb.iter_features(
        images,
        **geometry(args),
        layers=layers,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        on_error="return",
    )
    return tqdm(found, total=len(images), unit="img", disable=args.quiet or None)  # type: ignore[no-any-return]


def status(count: int, skipped: int) -> int:
    """Exit status when `skipped` of `count` images could not be read."""
    return OK if not skipped else FAILED if skipped == count else SKIPPED


def check_file(out: str, overwrite: bool, suffixes: tuple[str, ...]) -> Path:
    """The path of an output file.

    Raises:
        InputError: the suffix is wrong, or the file exists or cannot be written.
        MissingFileError: its folder does not exist.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in suffixes:
        raise InputError(f"'{out}' should end in {' or '.join(suffixes)}; rename it")
    _check_place(path.parent, out)
    if path.is_dir():
        raise InputError(f"'{out}' is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise InputError(f"'{out}' exists already; give another name, or --overwrite")
    return path


def check_folder(out: str, overwrite: bool) -> Path:
    """The path of an output folder, which may exist only if it is empty or `overwrite` is set.

    Raises:
        InputError: the path is a file, or the folder is not empty or cannot be written.
        MissingFileError: its parent folder does not exist.
    """
    path = Path(out).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"'{out}' is a file, and a folder is needed; give another name")
    if path.is_dir():
        _check_place(path, out)
        if any(path.iterdir()) and not overwrite:
            raise InputError(f"the folder '{out}' is not empty; give another one, or --overwrite")
        return path
    _check_place(path.parent, out)
    return path


def _check_place(folder: Path, out: str) -> None:
    if not folder.is_dir():
        raise MissingFileError(f"no folder '{folder.absolute()}' to write '{out}' to; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"'{out}' cannot be written: no permission to write to '{folder.absolute()}'; choose another place"
        )
