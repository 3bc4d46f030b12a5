"""What embed has written, read without loading it all."""

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

BLOCK = 16384  # rows that are in memory at a time


class Store:
    """A file or a folder of vectors, one per image.  What lies there has to have the sizes and counts of its records.

    `verify`: reads every byte, and compares the checksums.

    Raises: MissingFileError, InputError for what is not from embed, is damaged or not finished, or holds patches or
    maps.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = False) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise MissingFileError(f"no vectors at '{self.path.absolute()}'; give a file or folder of embed")
        self._files, self._format, self.recipe = _opened(self.path, verify)
        if self.recipe.kind != "embedding":
            raise InputError(f"'{self.path}' holds {self.recipe.kind}; make vectors of kind 'embedding' for this")

    def __len__(self) -> int:
        return self.recipe.count or 0

    def __repr__(self) -> str:
        return f"Store('{self.path}', {len(self):,} vectors of {self.width} numbers)"

    @property
    def width(self) -> int:
        return (self.recipe.shape or (0,))[0]

    def check_comparable(self, other: "Store") -> None:
        """Raises InputError, in one sentence, where a cosine of a vector here with one there would mean nothing."""
        if self.recipe.fingerprint != other.recipe.fingerprint:
            raise InputError(f"'{self.path}' and '{other.path}' come from different models; embed both with one")
        for name in ("pooling", "preprocess"):
            mine, theirs = getattr(self.recipe, name), getattr(other.recipe, name)
            if mine != theirs:
                raise InputError(
                    f"'{self.path}' cannot be compared with '{other.path}', which was made "
                    f"{difference(name, theirs, mine)}; embed both in one way"
                )

    def blocks(self, rows: int = BLOCK) -> Iterator[tuple[int, Array]]:
        """(number of the first, float32 [n, C] of length 1), in order; a row of NaN is a picture that failed."""
        first = 0
        for file in self._files:
            vectors = self._format.vectors(file)
            for start in range(0, len(vectors), rows):
                block = np.array(vectors[start : start + rows], np.float32)
                yield first + start, block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
            first += len(vectors)

    def rows(self, numbers: Iterable[int]) -> Array:
        """[n, C] of these pictures, in the order of their numbers."""
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
            raise InputError(f"the lists of '{self.path}' name {len(good)} images, and it holds {len(self)}")
        return found

    @property
    def paths(self) -> Names:
        """Of all pictures; empty for one that came as an object."""
        return self._listed[0]

    @property
    def good(self) -> Array:
        """[N] bool: pictures that could be read."""
        return self._listed[1]


def _opened(path: Path, verify: bool) -> tuple[list[Path], Format, Recipe]:
    """Files, in order, their format, and how they were made."""
    if path.is_dir():
        record = path / RECORD
        if not record.is_file():
            raise InputError(f"the folder '{path}' is not one of embed, it has no {RECORD}; give another one")
        recipe = Record.from_json(record.read_bytes(), record).recipe
        kinds = [kind for kind in FORMATS.values() if any(path.glob(f"[0-9]*{kind.suffix}"))]
        target = Target(path, True, (kinds or [FORMATS[".npy"]])[0]())
        wanted = list(recipe.shards())
        files = [target.shard(number) for number in range(len(wanted))]
        there = sum(file.is_file() for file in files)
        if recipe.count is None or there < len(wanted):
            raise InputError(f"'{path}' holds {there} of {len(wanted)} shards; run the same embed again to finish it")
    elif path.suffix.lower() not in FORMATS:
        raise InputError(f"'{path}' is no file of embed, whose names end in {', '.join(FORMATS)}; give one of these")
    else:
        target = Target(path, False, FORMATS[path.suffix.lower()]())
        found = target.format.record(path)
        if found is None:
            raise InputError(
                f"'{path}' does not say how it was made; give what embed has written, with what lies beside it"
            )
        recipe, files, wanted = found.recipe, [path], [range(found.recipe.count or 0)]
    unsealed = sum(
        _check(target.format, file, images, recipe, verify) for file, images in zip(files, wanted, strict=True)
    )
    if unsealed:
        log.warning("'%s': %d of %d files have no checksums, only their rows were counted", path, unsealed, len(files))
    return files, target.format, recipe


def _check(form: Format, path: Path, images: range, recipe: Recipe, verify: bool) -> bool:
    """Whether a file has no checksum.  Raises: InputError for one that is damaged."""
    record = form.record(path)
    seal = None if record is None else record.seal
    strange = record is not None and verify and not record.recipe.is_like(recipe)
    if record is not None and not record.old and (seal is None or strange):
        wrong: str | None = f"the record of '{path}' is damaged, or not of these vectors"
    elif seal is None and not verify:
        wrong = None
    else:
        wrong = form.damage(path, seal, deep=verify)
    if wrong is None and (there := form.count(path)) != len(images):
        wrong = f"'{path}' holds {there} rows, and {len(images)} belong there"
    if wrong is None and seal is not None and seal.first != images.start:
        wrong = f"the rows of '{path}' belong elsewhere"
    if wrong is not None:
        raise InputError(f"{wrong}; run the same embed again, which says or mends what is damaged")
    return seal is None
