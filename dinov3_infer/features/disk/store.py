"""Reads the vectors that embed wrote, without loading them all."""

import logging
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ...errors import InputError, MissingFileError
from ...images.sources import Names
from ..vectors import Array
from .formats import FORMATS, Format
from .recipe import Recipe, Record, difference
from .target import RECORD, Target

__all__ = ["Store"]

log = logging.getLogger("dinov3_infer")

BLOCK = 16384  # rows in memory at a time


class Store:
    """A file or a folder of vectors, one per image.

    Opening a store compares the files with the sizes and counts in their records.

    Args:
        path: the file or folder that embed wrote.
        verify: read every byte and compare checksums (default: False).

    Raises:
        MissingFileError: the path does not exist.
        InputError: embed did not write it or did not finish it, it is damaged, or it holds patches or maps.

    Example:
        >>> store = Store("vectors/")
        >>> for first, vectors in store.blocks():  # [n, C], length 1
        ...     print(store.paths[first], vectors.shape)
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = False) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise MissingFileError(f"no vectors at '{self.path.absolute()}'; give a file or folder that embed wrote")
        self._files, self._format, self.recipe = _opened(self.path, verify)
        if self.recipe.kind != "embedding":
            raise InputError(f"'{self.path}' holds {self.recipe.kind}; run embed with kind 'embedding' for this")

    def __len__(self) -> int:
        return self.recipe.count or 0

    def __repr__(self) -> str:
        return f"Store('{self.path}', {len(self):,} vectors of length {self.width})"

    @property
    def width(self) -> int:
        """Length of a vector."""
        return (self.recipe.shape or (0,))[0]

    def check_comparable(self, other: "Store") -> None:
        """Raises: InputError if the two stores were made with different models or settings."""
        if self.recipe.fingerprint != other.recipe.fingerprint:
            raise InputError(f"'{self.path}' and '{other.path}' come from different models; embed both with one model")
        for name in ("pooling", "preprocess"):
            mine, theirs = getattr(self.recipe, name), getattr(other.recipe, name)
            if mine != theirs:
                raise InputError(
                    f"'{self.path}' cannot be compared with '{other.path}', which was made "
                    f"{difference(name, theirs, mine)}; embed both with the same settings"
                )

    def blocks(self, rows: int = BLOCK) -> Iterator[tuple[int, Array]]:
        """Yields (number of the first row, float32 [n, C] of length 1), in order; a failed image has a row of NaN.

        Raises: InputError for a damaged file.
        """
        first = 0
        for file in self._files:
            vectors = self._format.vectors(file)
            for start in range(0, len(vectors), rows):
                block = np.array(vectors[start : start + rows], np.float32)
                yield first + start, block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
            first += len(vectors)

    def vectors(self) -> Array:
        """All vectors as they were written, float32 [N, C]; an image that failed has a row of NaN."""
        found = [np.array(self._format.vectors(file), np.float32) for file in self._files]
        return np.concatenate(found) if found else np.zeros((0, self.width), np.float32)

    def rows(self, numbers: Iterable[int]) -> Array:
        """The vectors of these images, [n, C] of length 1, in rising order of their numbers."""
        wanted = np.unique(np.fromiter(numbers, np.int64))
        found = [
            block[wanted[(wanted >= first) & (wanted < first + len(block))] - first] for first, block in self.blocks()
        ]
        return np.concatenate(found) if found else np.zeros((0, self.width), np.float32)

    @cached_property
    def _listed(self) -> tuple[Names, Array]:
        good: list[bool] = []

        def names() -> Iterator[str]:
            for file in self._files:
                for line in self._format.lines(file):
                    good.append(not line.error)
                    yield line.path or ""

        found = Names(names()), np.array(good, bool)
        if len(good) != len(self):
            raise InputError(
                f"the lists of '{self.path}' name {len(good)} images, not {len(self)}; run the same embed again"
            )
        return found

    @property
    def paths(self) -> Names:
        """Paths of all images; "" for an image that was an object in memory.  Raises: InputError for a damaged list."""
        return self._listed[0]

    @property
    def good(self) -> Array:
        """[N] bool: images that could be read.  Raises: InputError for a damaged list."""
        return self._listed[1]


def _opened(path: Path, verify: bool) -> tuple[list[Path], Format, Recipe]:
    """The files in order, their format and their recipe."""
    if path.is_dir():
        record = path / RECORD
        if not record.is_file():
            raise InputError(f"the folder '{path}' was not written by embed: it has no {RECORD}; give another one")
        found = Record.from_json(record.read_bytes(), record)
        recipe = found.recipe
        kinds = [kind for kind in FORMATS.values() if any(path.glob(f"[0-9]*{kind.suffix}"))]
        target = Target(path, True, (kinds or [FORMATS[".npy"]])[0]())
        wanted = list(recipe.shards())
        files = [target.shard(number) for number in range(len(wanted))]
        there = sum(file.is_file() for file in files)
        if recipe.count is None or there < len(wanted):
            raise InputError(f"'{path}' holds {there} of {len(wanted)} shards; run the same embed again to finish it")
    elif path.suffix.lower() not in FORMATS:
        raise InputError(
            f"'{path}' was not written by embed, whose files end in {', '.join(FORMATS)}; give one of these"
        )
    else:
        target = Target(path, False, FORMATS[path.suffix.lower()]())
        stated = target.format.record(path)
        if stated is None:
            raise InputError(
                f"'{path}' has no record of its settings; give a file that embed wrote, with the files beside it"
            )
        found = stated
        recipe, files, wanted = found.recipe, [path], [range(found.recipe.count or 0)]
    unsealed = sum(
        _check(target.format, file, images, found, verify) for file, images in zip(files, wanted, strict=True)
    )
    if unsealed:
        log.warning(
            "'%s': %d of %d files have no checksums, so only their rows were counted", path, unsealed, len(files)
        )
    return files, target.format, recipe


def _check(form: Format, path: Path, images: range, of: Record, verify: bool) -> bool:
    """Whether a file has no checksum.  Raises: InputError for a damaged file."""
    record = form.record(path)
    seal = None if record is None else record.seal
    strange = record is not None and not record.old and verify and not record.recipe.is_like(of.recipe)
    if strange or (seal is None and not (of.old if record is None else record.old)):
        wrong: str | None = f"the record of '{path}' is damaged, or belongs to other vectors"
    elif seal is None and not verify:
        wrong = None
    else:
        wrong = form.damage(path, seal, deep=verify)
    if wrong is None and (there := form.count(path)) != len(images):
        wrong = f"'{path}' holds {there} rows, but it should hold {len(images)}"
    if wrong is None and seal is not None and seal.first != images.start:
        wrong = f"the rows of '{path}' belong to other images"
    if wrong is not None:
        raise InputError(f"{wrong}; run the same embed again, which repairs the damage or reports it")
    return seal is None
