"""Looks at the rows on disk and decides which are kept and which are computed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...images.sources import Source
from .recipe import Recipe
from .rows import Line, Piece
from .target import Target

__all__ = ["Found", "Survey", "Work"]

log = logging.getLogger("dinov3_infer")


@dataclass
class Work:
    """The rows to compute of one shard."""

    images: range  # image numbers of the shard
    numbers: Sequence[int]  # images to compute, in rising order
    there: Piece | None = None  # all rows of a complete shard, some of which are computed again
    parts: tuple[Piece, ...] = ()  # the first rows of an incomplete shard


@dataclass
class Found:
    """Counts for the log and the report."""

    changed: int = 0  # rows whose source changed
    retried: int = 0  # rows that had failed
    damaged: int = 0  # files that are written again
    unsealed: int = 0  # files without a checksum
    unknown: int = 0  # rows whose source cannot be compared


class _Unusable(Exception):
    """The rows of a file cannot be kept."""


class Survey:
    """Looks at shards one by one.

    `base`: whether a finished file of the same recipe exists; its rows are used for shards that do not exist.
    `trusted`: take a file of the same name for the same image.

    Raises: InputError for a finished file that is damaged.
    """

    def __init__(self, target: Target, recipe: Recipe, images: Source, trusted: bool, base: bool = False) -> None:
        self.target, self.recipe, self.images, self.trusted, self.base = target, recipe, images, trusted, base
        self.found = Found()
        there = target.unfinished()
        self.old = there is None or there.old  # whether files without a record are valid
        if base:
            try:
                self._check(target.path, 0, recipe.count or 0)
            except _Unusable as error:
                raise InputError(f"{error}; restore a copy, or overwrite it") from None

    def work(self, shard: int, images: range) -> Work | None:
        """The rows to compute of a shard, or None.  A damaged file is removed.

        Raises: InputError for a complete file with another number of rows, and for in-memory images, because a rerun
        cannot notice their changes.
        """
        path, parts = self.target.shard(shard), self.target.parts_of(shard)
        if path.exists():
            piece = Piece(path, 0, len(images))
            try:
                self._check(path, images.start, len(images))
                again = self._again(piece, images)
            except _Unusable:
                self._drop(path)
            else:
                self.target.remove_parts(shard)
                return Work(images, again, piece) if again else None
        elif self.base:
            piece = Piece(self.target.path, images.start, images.stop)
            again = self._again(piece, images)
            return Work(images, again, piece) if again else None
        kept: list[Piece] = []
        offset, numbers = 0, []
        for part in parts:
            try:
                if part != self.target.shard(shard, offset, part=True):
                    raise _Unusable
                count = self._check(part, images.start + offset)
                numbers += self._again(Piece(part, 0, count), images[offset : offset + count])
            except _Unusable:
                self._drop(part)
                continue
            kept.append(Piece(part, 0, count))
            offset += count
        return Work(images, [*numbers, *images[offset:]] if numbers else images[offset:], parts=tuple(kept))

    def say(self) -> None:
        """Logs one line for rows that could not be checked and one for files that were damaged."""
        found, shown = self.found, self.target.path
        what = [f"the bytes of {found.unsealed} files, which have no checksums"] if found.unsealed else []
        what += [f"the sources of {found.unknown} images, which were not recorded or are gone"] if found.unknown else []
        if what:
            log.warning("'%s': not checked: %s; overwrite to compute all again", shown, ", and ".join(what))
        if found.damaged:
            log.warning("'%s': %d damaged shard files are computed again", shown, found.damaged)

    # --- one file -----------------------------------------------------------------------------------------------------

    def _drop(self, path: Path) -> None:
        self.found.damaged += 1
        self.target.format.remove(path)

    def _check(self, path: Path, first: int, rows: int | None = None) -> int:
        """Counts the rows of a file whose first row is that of image `first`.

        Raises: _Unusable; InputError for a complete file with another number of rows.
        """
        form = self.target.format
        try:
            there, record = form.count(path), form.record(path)
        except InputError as error:
            raise _Unusable(str(error)) from None
        if rows is not None and there != rows:
            raise InputError(f"'{path}' holds {there} rows, but embed wrote {rows}; remove it and repeat the call")
        seal = None if record is None else record.seal
        lacks = seal is None and not (self.old if record is None else record.old)
        if lacks or (record is not None and not record.old and not record.recipe.is_like(self.recipe)):
            raise _Unusable(f"the record of '{path}' is damaged")
        if seal is not None and seal.first != first:
            raise _Unusable(f"'{path}' belongs to another shard")
        if wrong := form.damage(path, seal):
            raise _Unusable(wrong)
        self.found.unsealed += seal is None
        return there

    def _again(self, piece: Piece, images: range) -> list[int]:
        """Numbers of the rows to compute again.  Raises: _Unusable, InputError."""
        try:
            lines = list(self.target.format.lines(*piece))
        except InputError as error:
            raise _Unusable(str(error)) from None
        if len(lines) != len(images) or any(
            line.path != self.images.key(n) for n, line in zip(images, lines, strict=True)
        ):
            raise _Unusable(f"the list of '{piece.path}' does not name the images of its rows")
        return [number for number, line in zip(images, lines, strict=True) if self._is_due(number, line)]

    def _is_due(self, number: int, line: Line) -> bool:
        if line.error:
            self.found.retried += 1
            return True
        if self.trusted:
            return False
        now = self.images.identity(number)
        if now is None:
            raise InputError(
                f"'{self.target.path}' exists already, and a rerun cannot check whether {self.images.label(number)} "
                "changed; set trust_names=True if the images are the same, give another name, or overwrite it"
            )
        if not now or not line.source:
            self.found.unknown += 1
            return False
        self.found.changed += now != line.source
        return now != line.source
