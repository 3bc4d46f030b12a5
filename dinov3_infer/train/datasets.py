"""Images to train on, by number: folders, list files, tar archives, any torch Dataset, and mixtures of them."""

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
    """Images of all sources under one numbering; what `open_data` gives."""

    def __init__(self, sources: Sequence[Source], pure: Sequence[float], levels: Levels | str | None = None) -> None:
        """`pure`: for each source the probability of a batch out of it alone; 0 where it is one of the mixed ones.

        `levels`: of images of more than 8 bits, see `load_image`.
        """
        if sum(pure) > 1 or (not all(pure) and sum(pure) == 1) or (all(pure) and sum(pure) < 1):
            raise InputError(
                f"pure batches have probabilities {', '.join(f'{p:g}' for p in pure if p)}; they add up to less than 1 "
                "beside a source without one, else to 1"
            )
        self.sources, self.pure, self.levels = tuple(sources), tuple(pure), as_levels(levels)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [3, H_px, W_px].  Raises: ImageError for an image that cannot be read, IndexError."""
        return self.read(index)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def read(self, index: int, short_px: int = 0) -> Tensor:
        """The same; with `short_px` a JPEG may come smaller, by a power of two, while no side is below that."""
        which = self.source_of(index)
        target = (lambda _height, _width: (short_px, short_px)) if short_px else None
        image = self.sources[which].load(index - self.range_of(which)[0], target, self.levels).image
        return image if image.dtype == torch.uint8 else image.mul(255.0).round_().to(torch.uint8)

    def source_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def range_of(self, which: int) -> range:
        """Numbers of the images of a source."""
        end = int(self._ends[which])
        return range(end - len(self.sources[which]), end)

    def digest(self) -> str:
        """SHA-256 of the names of all images below what was given, in order, and of the sizes of their files."""
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
        """Names of the labels, sorted; empty where not every image has one."""
        found: set[str] = set()
        for source in self.sources:
            if source.labels is None:
                return []
            found.update(source.labels)
        return sorted(found)

    @property
    def labels(self) -> Tensor | None:
        """[N] int64, indices into `classes`; None where not every image has one or all have the same."""
        number = {name: i for i, name in enumerate(self.classes)}
        if len(number) < 2:
            return None
        return torch.tensor([number[label] for source in self.sources for label in source.labels or ()], device="cpu")


def open_data(specs: Spec | Sequence[Spec], levels: Levels | str | None = None) -> Data:
    """One source or a list of them: a folder (looked through to the bottom), a list file (.txt: a path per line, from
    where the list lies, and a label after a tab if you have one), a tar archive, a Parquet table, or a Dataset.

    "PATH:0.1:pure", or a pair (source, 0.1), takes a tenth of the batches from that source alone; the other batches
    are mixed from all sources without such a number, in proportion to their images.

    Raises: MissingFileError, InputError (no images, damaged archive, probabilities), InputTypeError.
    """
    given = specs if isinstance(specs, list) or (isinstance(specs, tuple) and not _is_pair(specs)) else [specs]
    if not given:
        raise InputError("no data was given; give a folder of images")
    pairs = [_probability(spec) for spec in given]
    return Data([_open(spec) for spec, _ in pairs], [probability for _, probability in pairs], levels)


def _above(source: Source) -> str:
    """What the names of images of a folder begin with, so that a folder may be moved."""
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
        raise InputError(f"a share of pure batches lies above 0 and up to 1; got {probability:g}")
    return spec, probability


def _open(spec: Any) -> Source:
    if isinstance(spec, (str, os.PathLike)):
        spec = Path(spec).expanduser()
        if not spec.exists():
            raise MissingFileError(f"no data at '{spec.absolute()}'; check the path")
        suffix = spec.suffix.lower()
        if suffix in image_suffixes() and not spec.is_dir():
            raise InputError(f"'{spec}' is one image; give a folder of them, or a list in a .txt file")
        if spec.is_file() and suffix not in (*ARCHIVES, *LISTS):
            raise InputError(f"'{spec}' is no source of images; give a folder, {', '.join((*LISTS, *ARCHIVES))}")
    return as_source(spec)
