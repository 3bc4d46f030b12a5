"""Vectors of many pictures in one array."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..errors import Dinov3Error, InputError, check_choice
from ..images.levels import Levels, as_levels
from ..images.preprocess import Fit, PixelBatch
from ..model.network import as_map
from .extractor import Extractor
from .result import Features, Pooling
from .stream import Decode, Result, count_of

__all__ = ["Array", "EmbedOptions", "EmbedReport", "Failure", "Kind", "OutDtype", "Vector", "collect", "vectors_of"]

log = logging.getLogger("dinov3_infer")

Array: TypeAlias = np.ndarray[Any, Any]
Kind = Literal["embedding", "patches", "map"]
OutDtype = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """The options of `embed`, for the method, the command, a Ray cluster and the record beside the vectors.

    Raises: InputError, InputTypeError for a wrong one, before an image is read.
    """

    # what vectors depend on
    kind: Kind = "embedding"
    pooling: Pooling = "cls"
    normalize: bool = False
    out_dtype: OutDtype = "float32"
    size: int | tuple[int, int] | None = None  # pixels
    fit: Fit | None = None
    levels: Levels | None = None  # of images of more than 8 bits
    decode: Decode = "exact"
    # how they are made
    batch_size: int | None = None  # images; None for what is found to be fastest
    shard_size: int | None = None  # images; None for 10,000, or as many as have 256 MiB
    num_workers: int | None = None  # threads that read images
    on_error: Literal["raise", "skip"] = "raise"
    overwrite: bool = False
    trust_names: bool = False  # a rerun does not look whether images are those that had their names
    progress: bool | None = None  # None: where stderr is a terminal

    def __post_init__(self) -> None:
        for name, kind in (("pooling", Pooling), ("kind", Kind), ("out_dtype", OutDtype), ("decode", Decode)):
            check_choice(name, getattr(self, name), kind)
        object.__setattr__(self, "levels", as_levels(self.levels))
        check_choice("on_error", self.on_error, ("raise", "skip"))
        for name, least in (("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
            if (value := getattr(self, name)) is not None:
                count_of(name, value, least)


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
    changed: int = 0  # rows computed again, because their source is another one now
    retried: int = 0  # rows that had failed before, and were tried again


class Vector(NamedTuple):
    """What is kept of one picture."""

    array: Array  # float32 [C], [P, C] or [C, h, w]
    grid: tuple[int, int]  # (h, w) in patches


def vectors_of(
    extractor: Extractor, batches: list[PixelBatch], options: EmbedOptions
) -> Callable[[], list[Sequence[Vector]]]:
    """For each batch one vector per image, with memory of its own; what is returned waits for them."""
    class_only = options.kind == "embedding" and options.pooling == "cls"
    found, total = extractor.launched(batches, pooling=options.pooling, class_only=class_only)
    tensors = [(_kept(features, options).to("cpu", non_blocking=True), features.grid) for features in found]
    total = total.to("cpu", non_blocking=True)  # torch takes pinned memory for both
    landed = extractor.landing()

    def wait() -> list[Sequence[Vector]]:
        landed()
        extractor.check_finite(total)
        return [[Vector(row.copy(), grid) for row in tensor.numpy()] for tensor, grid in tensors]

    return wait


def _kept(features: Features, options: EmbedOptions) -> Tensor:
    tensor = features.embedding if options.kind == "embedding" else features.patch_tokens
    tensor = F.normalize(tensor, dim=-1) if options.normalize else tensor
    return tensor if options.kind != "map" else as_map(tensor, features.grid)


def collect(
    results: Iterable[Result[Vector]],
    options: EmbedOptions,
    width: int,  # numbers of an embedding
    total: int | None = None,  # images, where that is known
) -> Array:
    """Rows in the order of the input: [N, C], or [N, P, C] of patches, or [N, C, h, w] of maps; NaN for failures.

    Raises: with on_error="raise" the error of the first image that cannot be read.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    array: Array | None = None
    count = 0
    failures: list[Failure] = []
    for row, result in enumerate(
        tqdm(results, total=total, unit="img", disable=None if options.progress is None else not options.progress)
    ):
        count = row + 1
        if isinstance(result.found, Dinov3Error):
            if options.on_error == "raise":
                raise result.found
            failures.append(Failure(row, result.path, str(result.found)))
            continue
        vector = result.found.array
        if array is None:
            array = _rows(total or 64, vector.shape, options.out_dtype)
        if vector.shape != array.shape[1:]:
            raise InputError(
                f"item {row} gives {options.kind} of shape {list(vector.shape)} where those before have "
                f"{list(array.shape[1:])}; use fit='squash', or iter_features()"
            )
        while row >= len(array):
            array = np.concatenate((array, _rows(len(array), vector.shape, options.out_dtype)))
        array[row] = vector
    if array is None:
        if options.kind != "embedding" and count:
            raise InputError(f"none of the {count} pictures could be read; the first says: {failures[0].error}")
        array = _rows(0, (width,), options.out_dtype)
    if len(array) < count:
        array = np.concatenate((array, _rows(count - len(array), array.shape[1:], options.out_dtype)))
    say_failures(failures, count)
    return array[:count]


def say_failures(failures: list[Failure], count: int) -> None:
    """One line in the log, if there are any."""
    if failures:
        log.warning(
            "%d of %d pictures could not be read, their rows are NaN: %s%s",
            len(failures), count, "; ".join(f.error for f in failures[:3]), "; ..." if len(failures) > 3 else "",
        )  # fmt: skip


def _rows(count: int, shape: tuple[int, ...], dtype: str) -> Array:
    return np.full((count, *shape), np.nan, dtype)
