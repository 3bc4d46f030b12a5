"""Images to train on, under one numbering: folders, list files, archives, torch Datasets, and mixtures of them."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, MissingFileError
from ..images.levels import Levels, as_levels
from ..images.opening import ARCHIVES, LISTS, as_source
from ..images.paths import image_suffixes
from ..images.sources import Source

__all__ = ["Data", "Spec", "open_data"]

Spec: TypeAlias = Any  # a path, "PATH:PROBABILITY:pure", a torch Dataset, or a pair (one of these, probability)


class Data:
    """Images of several sources under one numbering; `open_data` makes it."""

    def __init__(self, sources: Sequence[Source], pure: Sequence[float], levels: Levels | str | None = None) -> None:
        """
        Args:
            sources: the sources, in order.
            pure: for each source, the probability of a batch from it alone; 0 mixes it with the others.
            levels: for images of more than 8 bits: the values that become black and white, see `load_image`.

        Raises:
            InputError: the probabilities do not add up.
        """
        if sum(pure) > 1 or (not all(pure) and sum(pure) == 1) or (all(pure) and sum(pure) < 1):
            raise InputError(
                f"pure batches have probabilities {', '.join(f'{p:g}' for p in pure if p)}; make their sum less than 1 "
                "if another source has none, else 1"
            )
        self.sources, self.pure, self.levels = tuple(sources), tuple(pure), as_levels(levels)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Tensor:
        """An image, uint8 [3, H_px, W_px].  Raises: ImageError if it cannot be read; IndexError."""
        return self.read(index)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def read(self, index: int, short_px: int = 0) -> Tensor:
        """An image, uint8 [3, H_px, W_px].

        Args:
            index: number of the image.
            short_px: decode a JPEG at a power of two of reduction, as long as no side falls below this; 0 never does.

        Raises:
            ImageError: the image cannot be read.
            MissingFileError: its file is gone.
            IndexError: there is no such number.
        """
        which = self.source_of(index)
        target = (lambda _height, _width: (short_px, short_px)) if short_px else None
        image = self.sources[which].load(index - self.range_of(which)[0], target, self.levels).image
        return image if image.dtype == torch.uint8 else image.mul(255.0).round_().to(torch.uint8)

    def source_of(self, index: int) -> int:
        """Number of the source of an image.  Raises: IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index}; give 0 to {len(self) - 1}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def range_of(self, which: int) -> range:
        """Numbers of the images of source `which`."""
        end = int(self._ends[which])
        return range(end - len(self.sources[which]), end)

    def digest(self) -> str:
        """SHA-256 of the names of all images, relative to their source and in order, and of their file sizes."""
        found = hashlib.sha256()
        for source, pure in zip(self.sources, self.pure, strict=True):
            found.update(f"{len(source)} images, {pure:g}\0".encode())
            above = _above(source)
            for i in range(len(source)):
                name, size = (source.key(i) or "").removeprefix(above), (source.identity(i) or "").split("-")[0]
                found.update(f"{name}\0{size}\0".encode("utf-8", "surrogatepass"))
        return found.hexdigest()

    @property
    def classes(self) -> list[str]:
        """Sorted names of all labels; empty if any image has no label."""
        found: set[str] = set()
        for source in self.sources:
            if source.labels is None:
                return []
            found.update(source.labels)
        return sorted(found)

    @property
    def labels(self) -> Tensor | None:
        """[N] int64, indices into `classes`; None if an image has no label or all have the same."""
        number = {name: i for i, name in enumerate(self.classes)}
        if len(number) < 2:
            return None
        return torch.tensor([number[label] for source in self.sources for label in source.labels or ()], device="cpu")


def open_data(specs: Spec | Sequence[Spec], levels: Levels | str | None = None) -> Data:
    """Opens the images to train on.

    Args:
        specs: one source or a list of them.  A source is a folder (searched recursively), a list file (.txt, a path
            per line, relative to the list, and optionally a tab and a label), a tar archive, a Parquet table, or a
            torch Dataset.  "PATH:0.1:pure", or a pair (source, 0.1), takes a tenth of the batches from that source
            alone; the other batches mix all sources without such a number, in proportion to their images.
        levels: for images of more than 8 bits: the values that become black and white, see `load_image`.

    Raises:
        MissingFileError: a path does not exist.
        InputError: a source has no images, an archive is damaged, or the probabilities do not add up.
        InputTypeError: a source has an unsupported type.

    Example:
        >>> data = open_data(["photos/", "scans.tar:0.1:pure"])
        >>> data[0].shape
        torch.Size([3, 480, 640])
    """
    given = specs if isinstance(specs, list) or (isinstance(specs, tuple) and not _is_pair(specs)) else [specs]
    if not given:
        raise InputError("data is empty; give a folder of images")
    pairs = [_probability(spec) for spec in given]
    return Data([_open(spec) for spec, _ in pairs], [probability for _, probability in pairs], levels)


def _above(source: Source) -> str:
    """The part of a folder's image names that changes when the folder is moved."""
    first, base = source.key(0), source.base(0)
    if first is None or base is None:
        return ""
    return first.removesuffix(os.path.relpath(os.path.abspath(first), base))


def _is_pair(spec: Any) -> bool:
    return isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], (int, float))


def _probability(spec: Spec) -> tuple[Any, float]:
    probability: float
    if isinstance(spec, str) and (found := re.fullmatch(r"(.+):([^:]*):pure", spec)):
        try:
            spec, probability = found[1], float(found[2])
        except ValueError:
            raise InputError(f"'{spec}' has no number before ':pure'; write PATH:0.1:pure") from None
    elif _is_pair(spec):
        spec, probability = spec
    else:
        return spec, 0.0
    if not 0 < probability <= 1:
        raise InputError(f"the share of pure batches is {probability:g}; give a number above 0, up to 1")
    return spec, probability


def _open(spec: Any) -> Source:
    if isinstance(spec, (str, os.PathLike)):
        spec = Path(spec).expanduser()
        if not spec.exists():
            raise MissingFileError(f"'{spec.absolute()}' does not exist; check the path of the data")
        suffix = spec.suffix.lower()
        if suffix in image_suffixes() and not spec.is_dir():
            raise InputError(f"'{spec}' is a single image; give a folder of images, or a list of images in a .txt file")
        if spec.is_file() and suffix not in (*ARCHIVES, *LISTS):
            kinds = ", ".join((*LISTS, *ARCHIVES))
            raise InputError(f"'{spec}' cannot hold images; give a folder, or a file that ends in {kinds}")
    return as_source(spec)
