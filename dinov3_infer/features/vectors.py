"""Vectors of many images in one array."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..errors import Dinov3Error, InputError, check_choice
from ..images.levels import Levels, as_levels
from ..images.preprocess import Fit, PixelBatch
from ..model.network import as_map
from .extractor import Extractor
from .result import Failure, Features, Kind, OutDtype, Pooling
from .stream import Decode, Result, count_of

__all__ = ["Array", "EmbedOptions", "Vector", "collect", "vectors_of"]

log = logging.getLogger("dinov3_infer")

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """The options of `embed`, shared by the method, the command, the Ray functions and the record on disk.

    Raises: InputError, InputTypeError for a wrong value, before an image is read.
    """

    # options that change the vectors
    kind: Kind = "embedding"
    pooling: Pooling = "cls"
    normalize: bool = False
    out_dtype: OutDtype = "float32"
    size: int | tuple[int, int] | None = None  # pixels
    fit: Fit | None = None
    levels: Levels | None = None  # for images of more than 8 bits
    decode: Decode = "exact"
    # options that do not
    batch_size: int | None = None  # images; None: 32 for an array, measured for files
    shard_size: int | None = None  # images; None: 10,000, or as many as have 256 MiB of rows
    num_workers: int | None = None  # threads that read images
    on_error: Literal["raise", "skip"] = "raise"
    overwrite: bool = False
    trust_names: bool = False  # a rerun takes a file of the same name for the same image
    progress: bool | None = None  # None: if stderr is a terminal

    def __post_init__(self) -> None:
        for name, kind in (("pooling", Pooling), ("kind", Kind), ("out_dtype", OutDtype), ("decode", Decode)):
            check_choice(name, getattr(self, name), kind)
        object.__setattr__(self, "levels", as_levels(self.levels))
        check_choice("on_error", self.on_error, ("raise", "skip"))
        for name, least in (("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
            if (value := getattr(self, name)) is not None:
                count_of(name, value, least)


class Vector(NamedTuple):
    """The row of one image."""

    array: Array  # float32 [C], [P, C] or [C, h, w]
    grid: tuple[int, int]  # (h, w) in patches


def vectors_of(
    extractor: Extractor, batches: list[PixelBatch], options: EmbedOptions
) -> Callable[[], list[Sequence[Vector]]]:
    """Starts a pass and returns a function that waits for one vector per image of each batch; vectors are copies.

    Raises (when waiting): PrecisionError if the features are not finite.
    """
    class_only = options.kind == "embedding" and options.pooling == "cls"
    found, total = extractor.launched(batches, pooling=options.pooling, class_only=class_only)
    tensors = [(_kept(features, options).to("cpu", non_blocking=True), features.grid) for features in found]
    total = total.to("cpu", non_blocking=True)  # torch uses pinned memory for both copies
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
    width: int,  # length of an embedding
    total: int | None = None,  # images, if known
) -> Array:
    """Collects rows in input order: [N, C], [N, P, C] for patches, [N, C, h, w] for maps; NaN for images that failed.

    Raises: InputError if rows differ in shape or no image could be read; with on_error="raise" the error of the first
    image that cannot be read.
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
                f"item {row} gives {options.kind} of shape {list(vector.shape)}, and the items before give "
                f"{list(array.shape[1:])}; use fit='squash', or iter_features()"
            )
        while row >= len(array):
            array = np.concatenate((array, _rows(len(array), vector.shape, options.out_dtype)))
        array[row] = vector
    if array is None:
        if options.kind != "embedding" and count:
            raise InputError(f"none of the {count} images could be read; the first error: {failures[0].error}")
        array = _rows(0, (width,), options.out_dtype)
    if len(array) < count:
        array = np.concatenate((array, _rows(count - len(array), array.shape[1:], options.out_dtype)))
    say_failures(failures, count)
    return array[:count]


def say_failures(failures: list[Failure], count: int) -> None:
    """Logs one line if any image failed."""
    if failures:
        log.warning(
            "%d of %d images could not be read and have a row of NaN: %s%s",
            len(failures), count, "; ".join(f.error for f in failures[:3]), "; ..." if len(failures) > 3 else "",
        )  # fmt: skip


def _rows(count: int, shape: tuple[int, ...], dtype: str) -> Array:
    return np.full((count, *shape), np.nan, dtype)
