"""The base of the file formats: rows of vectors, and a line of the list for each."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ..vectors import Array
from .recipe import Recipe, Record
from .seals import Seal, damage

__all__ = ["Format", "Line", "Piece", "Rows"]


class Line(NamedTuple):
    """The entry of one row in the list."""

    path: str | None
    error: str = ""
    grid: tuple[int, int] | None = None  # (h, w) in patches
    source: str | None = None  # identity of the image; None: not known


class Piece(NamedTuple):
    """Consecutive rows of a file."""

    path: Path
    start: int
    stop: int


@dataclass
class Rows:
    """Consecutive rows; the first one belongs to image number `first`."""

    first: int
    vectors: Array | list[Array | None]  # [n, *shape]; a list if the rows differ in shape
    dtype: str
    lines: list[Line] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, part: slice) -> "Rows":
        start, stop, _ = part.indices(len(self))
        return Rows(self.first + start, self.vectors[start:stop], self.dtype, self.lines[start:stop])

    def put(self, number: int, vector: Array | None, line: Line) -> None:
        """Sets or appends the row of an image; `vector`: [C], [P, C] or [C, h, w], or None, which leaves NaN."""
        at = number - self.first
        if isinstance(self.vectors, list):
            self.vectors[at : at + 1] = [vector]
        else:
            self.vectors[at] = np.nan if vector is None else vector.reshape(self.vectors.shape[1:])
        self.lines[at : at + 1] = [line]


class Format(ABC):
    """A file format.  The file with the vectors is renamed into place last, so its presence means that all is there."""

    suffix: str
    sides: tuple[str, ...] = ()  # suffixes of the files beside it
    sealed: tuple[str, ...]  # suffixes of the files with a checksum
    ragged = False  # whether rows may differ in shape

    @abstractmethod
    def write(self, target: Path, rows: Rows, recipe: Recipe) -> None:
        """Writes one file of these rows, with its record."""

    @abstractmethod
    def join(self, target: Path, pieces: Sequence[Piece], recipe: Recipe) -> None:
        """Writes one file with the rows of all pieces."""

    @abstractmethod
    def vectors(self, path: Path) -> Array:
        """[n, *shape], memory-mapped if the format allows it.  Raises: InputError for a damaged file."""

    @abstractmethod
    def count(self, path: Path) -> int:
        """Number of rows, without reading them.  Raises: InputError for a damaged file."""

    @abstractmethod
    def stated(self, path: Path) -> bytes | None:
        """Text of the record of a file, or None.  Raises: InputError for a damaged file."""

    @abstractmethod
    def region(self, path: Path) -> tuple[int, bytes]:
        """(offset, content) of the part of a file that holds its record."""

    def record(self, path: Path) -> Record | None:
        """The record of a file, or None.  Raises: InputError for a damaged file."""
        text = self.stated(path)
        return None if text is None else Record.from_json(text, path)

    def damage(self, path: Path, seal: Seal | None, deep: bool = True) -> str | None:
        """The damage of a file, as a clause, or None.  Without a seal only the rows are counted."""
        try:
            if seal is None:
                there, listed = self.count(path), sum(1 for _ in self.lines(path))
                return None if there == listed else f"'{path}' has {there} rows, but its list has {listed}"
            if wrong := damage(path, seal, self.sealed, self.region, deep):
                return wrong
            there = self.count(path)
            return None if there == seal.rows else f"'{path}' has {there} rows, but {seal.rows} were written"
        except (InputError, OSError, ValueError) as error:
            return str(error) if isinstance(error, InputError) else f"'{path}' cannot be read"

    def lines(self, path: Path, start: int = 0, stop: int | None = None) -> Iterator[Line]:
        """Yields the lines of these rows.  Raises: InputError for a damaged list."""
        beside = path.with_suffix(".jsonl")
        try:
            with open(beside, encoding="utf-8") as lines:
                for line in islice(lines, start, stop):
                    row = json.loads(line)
                    grid, source = row["grid"], row.get("source")  # old lists have no sources
                    found = Line(row["path"], row["error"], None if grid is None else (grid[0], grid[1]), source)
                    if not isinstance(found.error, str) or not isinstance(found.path, str | None):
                        raise ValueError
                    yield found
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise InputError(
                f"the list '{beside}' is damaged or missing; remove '{path.name}' beside it and run embed again"
            ) from None

    def read(self, path: Path, start: int, stop: int) -> Rows:
        """Loads these rows into memory.  Raises: InputError for a damaged file."""
        vectors = self.vectors(path)[start:stop]
        return Rows(start, np.array(vectors), str(vectors.dtype), list(self.lines(path, start, stop)))

    def remove(self, path: Path) -> None:
        """Removes a file and the files beside it."""
        for name in (path, *(path.with_suffix(side) for side in self.sides)):
            name.unlink(missing_ok=True)
