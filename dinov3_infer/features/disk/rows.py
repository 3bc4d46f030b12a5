"""What every format of files holds: rows of vectors, and a line for each in a list."""

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
    """What a list says of a row."""

    path: str | None
    error: str = ""
    grid: tuple[int, int] | None = None  # (h, w) in patches
    source: str | None = None  # None: nothing tells it from another one of its name


class Piece(NamedTuple):
    """Neighbouring rows of a file."""

    path: Path
    start: int
    stop: int


@dataclass
class Rows:
    """Neighbours, of which the first is image number `first`."""

    first: int
    vectors: Array | list[Array | None]  # [n, *shape]; a list where each row has a shape of its own
    dtype: str
    lines: list[Line] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, part: slice) -> "Rows":
        start, stop, _ = part.indices(len(self))
        return Rows(self.first + start, self.vectors[start:stop], self.dtype, self.lines[start:stop])

    def put(self, number: int, vector: Array | None, line: Line) -> None:
        """The row of an image, behind the last one or in place of one; without a vector it is NaN."""
        at = number - self.first
        if isinstance(self.vectors, list):
            self.vectors[at : at + 1] = [vector]
        else:
            self.vectors[at] = np.nan if vector is None else vector.reshape(self.vectors.shape[1:])
        self.lines[at : at + 1] = [line]


class Format(ABC):
    """A kind of file.  The file with the vectors appears last, so that where it is, all is."""

    suffix: str
    sides: tuple[str, ...] = ()  # suffixes of what lies beside a file
    sealed: tuple[str, ...]  # suffixes of what has a checksum
    ragged = False  # whether rows may differ in shape

    @abstractmethod
    def write(self, target: Path, rows: Rows, recipe: Recipe) -> None: ...

    @abstractmethod
    def join(self, target: Path, pieces: Sequence[Piece], recipe: Recipe) -> None:
        """One file of all rows."""

    @abstractmethod
    def vectors(self, path: Path) -> Array:
        """[n, *shape], mapped and not read where the format allows it.  Raises: InputError for a damaged file."""

    @abstractmethod
    def count(self, path: Path) -> int:
        """Rows, without reading them.  Raises: InputError for a damaged file."""

    @abstractmethod
    def stated(self, path: Path) -> bytes | None:
        """The record of a file; None where there is none.  Raises: InputError for a damaged file."""

    @abstractmethod
    def region(self, path: Path) -> tuple[int, bytes]:
        """(offset, content) of the part of a file that holds its record."""

    def record(self, path: Path) -> Record | None:
        """What a file says of itself; None where it says nothing.  Raises: InputError for a damaged file."""
        text = self.stated(path)
        return None if text is None else Record.from_json(text, path)

    def damage(self, path: Path, seal: Seal | None, deep: bool = True) -> str | None:
        """What is wrong with a file, for a sentence; None where nothing is.  Without a seal rows are counted only."""
        try:
            if seal is None:
                there, listed = self.count(path), sum(1 for _ in self.lines(path))
                return None if there == listed else f"'{path}' has {there} rows, and its list has {listed}"
            if wrong := damage(path, seal, self.sealed, self.region, deep):
                return wrong
            there = self.count(path)
            return None if there == seal.rows else f"'{path}' has {there} rows, and {seal.rows} were written"
        except (InputError, OSError, ValueError) as error:
            return str(error) if isinstance(error, InputError) else f"'{path}' cannot be read"

    def lines(self, path: Path, start: int = 0, stop: int | None = None) -> Iterator[Line]:
        """Of these rows.  Raises: InputError for a damaged list."""
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
        """These rows, in memory.  Raises: InputError for a damaged file."""
        vectors = self.vectors(path)[start:stop]
        return Rows(start, np.array(vectors), str(vectors.dtype), list(self.lines(path, start, stop)))

    def remove(self, path: Path) -> None:
        for name in (path, *(path.with_suffix(side) for side in self.sides)):
            name.unlink(missing_ok=True)
