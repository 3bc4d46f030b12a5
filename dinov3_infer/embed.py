"""Vectors of many pictures in one array, or in files that appear whole or not at all."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch.nn.functional as F

from .batching import OnError, Result
from .errors import Dinov3Error, InputError, MissingFileError
from .features import Features

__all__ = ["EmbedReport", "Failure", "Kind", "Vectors", "check_kind", "check_target", "collect"]

log = logging.getLogger("dinov3_infer")

Kind = Literal["embedding", "patches", "map"]


@dataclass(frozen=True)
class Failure:
    """A picture that could not be read."""

    row: int
    path: str | None  # None for a picture that came as an object
    error: str


@dataclass(frozen=True)
class EmbedReport:
    """What `embed` wrote."""

    path: Path  # of the array, one row per picture; beside it .jsonl with row, path and error of each
    shape: tuple[int, ...]  # of the array
    failures: tuple[Failure, ...]  # whose rows are NaN
    batch_size: int  # in the end: smaller than asked for where the memory did not do


@dataclass(frozen=True)
class Vectors:
    """One row per picture, float32: [N, C], or [N, P, C] of patches, or [N, C, h, w] of maps; NaN for failures."""

    array: np.ndarray[Any, Any]
    paths: list[str | None]
    failures: tuple[Failure, ...]

    def save(self, out: Path) -> None:
        """Writes the array to `out` and its list beside it: both, or neither."""
        errors = {failure.row: failure.error for failure in self.failures}
        lines = (dict(row=row, path=path, error=errors.get(row, "")) for row, path in enumerate(self.paths))
        targets = (out.with_suffix(".jsonl"), out)
        temporary = [target.with_name(f"{target.name}.{os.getpid()}.tmp") for target in targets]
        try:
            with open(temporary[0], "x", encoding="utf-8") as listing, open(temporary[1], "xb") as rows:
                listing.writelines(json.dumps(line) + "\n" for line in lines)
                np.save(rows, self.array)
            for source, target in zip(temporary, targets, strict=True):
                os.replace(source, target)
        finally:
            for source in temporary:
                source.unlink(missing_ok=True)


def check_target(out: str | os.PathLike[str]) -> Path:
    """Raises InputError for a file of another kind or one that exists, MissingFileError for one in no folder."""
    path = Path(out)
    if path.suffix != ".npy":
        raise InputError(f"'{path}' does not end in .npy, which is the format that embed writes; rename it")
    for existing in (path, path.with_suffix(".jsonl")):
        if existing.exists():
            raise InputError(f"'{existing}' exists already; give another name, or remove it")
    if not path.parent.is_dir():
        raise MissingFileError(f"no folder '{path.parent.absolute()}' to write '{path.name}' to; make it first")
    return path


def collect(
    results: Iterable[Result],
    kind: Kind,
    width: int,  # numbers of an embedding
    *,
    normalize: bool = False,
    on_error: OnError = "raise",
    total: int | None = None,  # pictures, where that is known
    progress: bool | None = None,
) -> Vectors:
    """Rows in the order of the input.  Raises the first error, unless on_error is "skip"."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    array: np.ndarray[Any, Any] | None = None
    paths: list[str | None] = []
    failures: list[Failure] = []
    for result in tqdm(results, total=total, unit="img", disable=None if progress is None else not progress):
        row = len(paths)
        paths.append(result.path)
        if isinstance(result.features, Dinov3Error):
            if on_error == "raise":
                raise result.features
            failures.append(Failure(row, result.path, str(result.features)))
            continue
        vector = _vector(result.features, kind, normalize)
        if array is None:
            array = _rows(total or 64, vector.shape)
        if vector.shape != array.shape[1:]:
            raise InputError(
                f"item {row} gives {kind} of shape {list(vector.shape)} where those before have "
                f"{list(array.shape[1:])}; use fit='squash', or iter_features()"
            )
        while row >= len(array):
            array = np.concatenate((array, _rows(len(array), vector.shape)))
        array[row] = vector
    if array is None:
        if kind != "embedding" and paths:
            raise InputError(f"none of the {len(paths)} pictures could be read; the first says: {failures[0].error}")
        array = _rows(0, (width,))
    if len(array) < len(paths):
        array = np.concatenate((array, _rows(len(paths) - len(array), array.shape[1:])))
    if failures:
        log.warning(
            "%d of %d pictures could not be read, their rows are NaN: %s%s",
            len(failures), len(paths), "; ".join(f.error for f in failures[:3]), "; ..." if len(failures) > 3 else "",
        )  # fmt: skip
    return Vectors(array[: len(paths)], paths, tuple(failures))


def check_kind(kind: str) -> None:
    """Raises InputError for a kind of vectors that does not exist."""
    if kind not in get_args(Kind):
        raise InputError(f"kind is one of {', '.join(get_args(Kind))}; got {kind!r}")


def _vector(features: Features, kind: Kind, normalize: bool) -> np.ndarray[Any, Any]:
    """Of the one picture."""
    tensor = features.embedding if kind == "embedding" else features.patch_tokens
    tensor = (F.normalize(tensor, dim=-1) if normalize else tensor)[0]
    if kind == "map":
        tensor = tensor.unflatten(0, features.grid).permute(2, 0, 1)
    return tensor.numpy()


def _rows(count: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.full((count, *shape), np.nan, np.float32)
