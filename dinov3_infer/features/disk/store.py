"""What embed has written, read without loading it all."""

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ...errors import InputError, MissingFileError
from ...images.sources import Names
from ..vectors import Array
from .formats import FORMATS, Format
from .recipe import Recipe, difference
from .target import RECORD, Target

__all__ = ["Store"]

BLOCK = 16384  # rows that are in memory at a time


class Store:
    """A file or a folder of vectors, one per picture.

    Raises: MissingFileError, InputError for what is not from embed, is not finished or holds patches or maps.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise MissingFileError(f"no vectors at '{self.path.absolute()}'; give a file or folder of embed")
        self._files, self._format, self.recipe = _opened(self.path)
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
                for path, error in self._format.listing(file):
                    good.append(not error)
                    yield path or ""

        return Names(names()), np.array(good, bool)

    @property
    def paths(self) -> Names:
        """Of all pictures; empty for one that came as an object."""
        return self._listed[0]

    @property
    def good(self) -> Array:
        """[N] bool: pictures that could be read."""
        return self._listed[1]


def _opened(path: Path) -> tuple[list[Path], Format, Recipe]:
    if path.is_dir():
        record = path / RECORD
        if not record.is_file():
            raise InputError(f"the folder '{path}' is not one of embed, it has no {RECORD}; give another one")
        recipe = Recipe.from_json(record.read_bytes(), record)
        kinds = [kind for kind in FORMATS.values() if any(path.glob(f"[0-9]*{kind.suffix}"))]
        target = Target(path, True, (kinds or [FORMATS[".npy"]])[0]())
        files, wanted = list(target.shards()), len(list(recipe.shards()))
        if recipe.count is None or len(files) < wanted:
            raise InputError(f"'{path}' holds {len(files)} of {wanted} shards; run the same embed again to finish it")
        return files, target.format, recipe
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"'{path}' is no file of embed, whose names end in {', '.join(FORMATS)}; give one of these")
    found = FORMATS[path.suffix.lower()]()
    text = found.recipe(path)
    if text is None:
        raise InputError(
            f"'{path}' does not say how it was made; give what embed has written, with what lies beside it"
        )
    return [path], found, Recipe.from_json(text, path)
