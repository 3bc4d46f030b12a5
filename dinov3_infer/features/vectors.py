"""Vectors of many pictures in one array."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.nn.functional as F

from ..errors import Dinov3Error, InputError, check_choice
from ..images.preprocess import Fit
from .result import Features, Pooling
from .stream import Decode, Result, count_of

__all__ = ["Asked", "EmbedReport", "Failure", "Kind", "OutDtype", "Vector", "collect", "vectors_of"]

log = logging.getLogger("dinov3_infer")

Kind = Literal["embedding", "patches", "map"]
OutDtype = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How vectors are made, as `embed` takes it; wrong options are refused before a picture is read."""

    kind: Kind = "embedding"
    pooling: Pooling = "cls"
    normalize: bool = False
    out_dtype: OutDtype = "float32"
    size: int | tuple[int, int] | None = None
    fit: Fit | None = None
    decode: Decode = "exact"
    batch_size: int | None = None
    shard_size: int | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, Pooling)
        check_choice("kind", self.kind, Kind)
        check_choice("out_dtype", self.out_dtype, OutDtype)
        for name, value in (("batch_size", self.batch_size), ("shard_size", self.shard_size)):
            if value is not None:
                count_of(name, value, 1)


@dataclass(frozen=True)
class Failure:
    """A picture that could not be read."""

    row: int
    path: str | None  # None for a picture that came as an object
    error: str


@dataclass(frozen=True)
class EmbedReport:
    """What `embed` wrote."""

    path: Path  # of the file, one row per picture, or of the folder of shards
    shape: tuple[int, ...]  # of all rows together; of unequal ones their number alone
    failures: tuple[Failure, ...]  # whose rows are NaN
    batch_size: int  # in the end: smaller than asked for where the memory did not do
    resumed: int  # rows that were there before


class Vector(NamedTuple):
    """What is kept of one picture."""

    array: np.ndarray[Any, Any]  # float32 [C], [P, C] or [C, h, w]
    grid: tuple[int, int]  # (h, w) in patches


def vectors_of(features: Features, kind: Kind, normalize: bool) -> list[Vector]:
    """One per picture, with memory of its own."""
    tensor = features.embedding if kind == "embedding" else features.patch_tokens
    tensor = F.normalize(tensor, dim=-1) if normalize else tensor
    if kind == "map":
        tensor = tensor.unflatten(1, features.grid).permute(0, 3, 1, 2)
    return [Vector(array.copy(), features.grid) for array in tensor.cpu().numpy()]


def collect(
    results: Iterable[Result[Vector]],
    kind: Kind,
    width: int,  # numbers of an embedding
    *,
    out_dtype: OutDtype = "float32",
    raises: bool = True,
    total: int | None = None,  # pictures, where that is known
    progress: bool | None = None,
) -> np.ndarray[Any, Any]:
    """Rows in the order of the input: [N, C], or [N, P, C] of patches, or [N, C, h, w] of maps; NaN for failures.

    With `raises` the first error is raised.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    array: np.ndarray[Any, Any] | None = None
    count = 0
    failures: list[Failure] = []
    for row, result in enumerate(
        tqdm(results, total=total, unit="img", disable=None if progress is None else not progress)
    ):
        count = row + 1
        if isinstance(result.found, Dinov3Error):
            if raises:
                raise result.found
            failures.append(Failure(row, result.path, str(result.found)))
            continue
        vector = result.found.array
        if array is None:
            array = _rows(total or 64, vector.shape, out_dtype)
        if vector.shape != array.shape[1:]:
            raise InputError(
                f"item {row} gives {kind} of shape {list(vector.shape)} where those before have "
                f"{list(array.shape[1:])}; use fit='squash', or iter_features()"
            )
        while row >= len(array):
            array = np.concatenate((array, _rows(len(array), vector.shape, out_dtype)))
        array[row] = vector
    if array is None:
        if kind != "embedding" and count:
            raise InputError(f"none of the {count} pictures could be read; the first says: {failures[0].error}")
        array = _rows(0, (width,), out_dtype)
    if len(array) < count:
        array = np.concatenate((array, _rows(count - len(array), array.shape[1:], out_dtype)))
    say_failures(failures, count)
    return array[:count]


def say_failures(failures: list[Failure], count: int) -> None:
    """One line in the log, if there are any."""
    if failures:
        log.warning(
            "%d of %d pictures could not be read, their rows are NaN: %s%s",
            len(failures), count, "; ".join(f.error for f in failures[:3]), "; ..." if len(failures) > 3 else "",
        )  # fmt: skip


def _rows(count: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    return np.full((count, *shape), np.nan, dtype)
