"""The place of the vectors: one file, or a folder of shards."""

import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ...errors import InputError, MissingFileError
from ...locks import LOCK, locked
from ...system import whole
from .formats import FORMATS, Format, Piece
from .recipe import BatchPlan, Recipe, Record, State, checked_json

__all__ = ["RECORD", "Target"]

RECORD = "dinov3_infer.json"  # record of a folder of shards
_SHARD = r"\d{6,}(\+\d{6,})?"
_OURS = re.compile(rf"\.?({_SHARD}|joined)\.\S+|\.?{re.escape(RECORD)}(\.\d+)?|\.dinov3_infer\.\S+")


@dataclass(frozen=True)
class Target:
    """A path whose suffix decides the format.

    A file is first written as shards in a folder "NAME.parts" beside it; at the end they are joined and removed.  A
    name without suffix or with a slash at its end, and the name of a folder, is a folder in which the shards stay.
    """

    path: Path
    is_folder: bool
    format: Format

    @classmethod
    def find(cls, out: str | os.PathLike[str], overwrite: bool = False) -> Self:
        """Checks a target before a model is loaded or an image is read.

        Raises: InputError for an unknown format, a file that embed did not write or a folder without write permission;
        MissingFileError if the parent folder does not exist.
        """
        text = os.fspath(out)
        path = Path(text).expanduser()
        suffix = path.suffix.lower()
        if suffix not in ("", *FORMATS):
            raise InputError(
                f"'{path}' should end in {', '.join(FORMATS)}, or be a folder (a name without suffix, or with a slash "
                "at its end); rename it"
            )
        is_folder = path.is_dir() or not suffix or text.endswith(("/", os.sep))
        found = cls(path, is_folder, FORMATS[suffix or ".npy"]())
        if not path.parent.is_dir():
            raise MissingFileError(f"no folder '{path.parent.absolute()}' to write '{path.name}' to; make it first")
        place = path if path.is_dir() else path.parent
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(
                f"'{out}' cannot be written: no permission to write to '{place.absolute()}'; give another path"
            )
        found._check_ours(overwrite)
        return found

    def _check_ours(self, overwrite: bool) -> None:
        """Refuses to replace what embed did not write, unless `overwrite`."""
        if self.is_folder:
            if self.path.is_file():
                raise InputError(f"'{self.path}' is a file, but a folder is needed; give another name")
            if self.path.is_dir() and not (self.path / RECORD).is_file():
                strange = [p.name for p in self.path.iterdir() if p.name != LOCK]
                if strange and not (overwrite and all(map(_OURS.fullmatch, strange))):
                    raise InputError(
                        f"the folder '{self.path}' holds other files; give an empty folder or another name"
                    )
            return
        ours = overwrite or (self.parts / RECORD).is_file() or self._says_how()
        for existing in (self.path, *(self.path.with_suffix(side) for side in self.format.sides)):
            if existing.exists() and not ours:
                raise InputError(
                    f"'{existing}' exists already and was not written by embed; give another name, or overwrite it"
                )

    def _says_how(self) -> bool:
        """Whether the file has a record, complete or not.  Raises: InputError if the file cannot be read."""
        try:
            return self.path.is_file() and self.format.stated(self.path) is not None
        except InputError:
            raise InputError(
                f"'{self.path}' exists already and is damaged, or was not written by embed; give another name, or "
                "overwrite it"
            ) from None

    @property
    def parts(self) -> Path:
        """The folder of the shards."""
        return self.path if self.is_folder else self.path.with_name(f"{self.path.name}.parts")

    def shard(self, number: int, offset: int = 0, part: bool = False) -> Path:
        """Path of a shard, or of the part of an incomplete shard that starts at row `offset`."""
        return self.parts / f"{number:06d}{f'+{offset:06d}' if part else ''}{self.format.suffix}"

    def locked(self, run: str | None = None) -> AbstractContextManager[None]:
        """The lock of a run; see `locks.locked`."""
        return locked(self.parts, self.path, run)

    def unfinished(self) -> Record | None:
        """The record of the folder of shards, or None.  Raises: InputError for a damaged record."""
        record = self.parts / RECORD
        return Record.from_json(record.read_bytes(), record) if record.is_file() else None

    def finished(self) -> Record | None:
        """The record of the finished file, or None.  Raises: InputError for a damaged file."""
        if not self.is_there():
            return None
        found = self.format.record(self.path)
        if found is None:
            raise InputError(f"'{self.path}' has no record of its settings; give another name, or overwrite it")
        return found

    def is_there(self) -> bool:
        """Whether the finished file exists."""
        return not self.is_folder and self.path.is_file()

    def clear(self, shards_alone: bool = False) -> None:
        """Removes the record, unless `shards_alone`, and then the shards; a finished file stays."""
        if self.parts.is_dir():
            if not shards_alone:
                (self.parts / RECORD).unlink(missing_ok=True)
            for path in self.parts.iterdir():
                if path.name not in (LOCK, RECORD) and _OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        """Removes shards without a record, whose settings are not known.

        Raises: InputError if the folder holds other files.
        """
        if self.is_folder or (self.parts / RECORD).is_file():
            return
        self.clear()
        if strange := [path.name for path in self.parts.iterdir() if path.name != LOCK]:
            raise InputError(f"the folder '{self.parts}' holds other files, such as '{strange[0]}'; move it elsewhere")

    def enter(
        self, recipe: Recipe, plan: Callable[[BatchPlan], BatchPlan], overwrite: bool, shared: bool
    ) -> tuple[Recipe, State, bool]:
        """Starts or continues a run.

        Returns the recipe with its plan, the state, and whether a finished file of that recipe exists.

        `plan`: decides what the plan of the recipe leaves open.
        `shared`: whether other processes of this run may be inside.

        Raises: InputError if the vectors on disk have another recipe, or their record is damaged.
        """
        if overwrite:
            there = _or_none(self.unfinished)
            if there is None or not there.state or recipe.differs(there.recipe):
                there = Record(replace(recipe, plan=plan(recipe.plan)), state="clearing")
                self.rewrite(there.recipe, "clearing")
            done = None
        else:
            if not shared:
                self.clear_leftovers()
            if (there := self.unfinished()) is not None and there.state == "joined":
                self.settle()
                there = None
            done = self.finished()
            for found in filter(None, (there, done)):
                recipe.check_continues(found.recipe, self.path)
            if there is None:
                there = Record(self.begin(done.recipe if done else replace(recipe, plan=plan(recipe.plan))))
        if there.state == "clearing":
            self.clear(shards_alone=True)
            self.rewrite(there.recipe, "overwriting")
            there = there._replace(state="overwriting")
        return there.recipe, there.state, done is not None and not there.state

    def begin(self, recipe: Recipe) -> Recipe:
        """Writes the recipe.  If another process of the run was faster, its recipe with its plan is returned.

        Raises: InputError if the recipe of the other process differs.
        """
        record = self.parts / RECORD
        beside = record.with_name(f".{RECORD}.{os.getpid()}")
        try:
            beside.write_text(checked_json(recipe, ""), encoding="utf-8")
            try:
                os.link(beside, record)  # unlike a rename, a link fails if the record exists
                return recipe
            except OSError:  # also raised by file systems without links
                if not record.exists():
                    os.replace(beside, record)
                    return recipe
        finally:
            beside.unlink(missing_ok=True)
        there = Record.from_json(record.read_bytes(), record).recipe
        recipe.planned(there.plan).check_continues(there, self.path)
        return there

    def rewrite(self, recipe: Recipe, state: State = "") -> None:
        """Replaces the record of the folder of shards."""
        with whole(self.parts / RECORD, flush=True) as beside:
            beside.write_text(checked_json(recipe, state), encoding="utf-8")

    def finish(self, recipe: Recipe, pieces: Sequence[Piece], state: State) -> None:
        """Joins the shards into the file and replaces the old one; for a folder it marks the run as complete."""
        if self.is_folder:
            if state:
                self.rewrite(recipe)
            return
        self.format.join(self._joined, pieces, recipe)
        self.rewrite(recipe, "joined")
        self.settle()

    @property
    def _joined(self) -> Path:
        return self.parts / f"joined{self.format.suffix}"

    def settle(self) -> None:
        """Moves the joined file into place; repeats the move if the last run was killed during it."""
        made = self._joined
        if made.is_file():
            self.path.unlink(missing_ok=True)  # never an old file with a new list beside it
            for side in self.format.sides:
                if made.with_suffix(side).is_file():
                    os.replace(made.with_suffix(side), self.path.with_suffix(side))
            os.replace(made, self.path)
        self.clear()  # removes the record first: shards without a record are removed by the next run

    def abandon(self) -> None:
        """Removes the folder of shards if it is empty, after a run that failed or had nothing to do."""
        if self.parts.is_dir() and not any(self.shards()) and not self.parts_of():
            self.clear()
            if all(path.name == LOCK for path in self.parts.iterdir()):
                shutil.rmtree(self.parts, ignore_errors=True)

    def forget(self, mine: Container[int] | None) -> None:
        """Removes temporary files of a killed run: all of them, or those of these shards."""
        for left_over in self.parts.glob(".*.tmp*"):
            number = re.match(r"\.(\d{6,})", left_over.name)
            if mine is None or (number and int(number[1]) in mine):
                left_over.unlink(missing_ok=True)

    def shards(self) -> Iterator[Path]:
        """Paths of the complete shards, in order."""
        return iter(sorted(self.parts.glob("[0-9]" * 6 + self.format.suffix)))

    def parts_of(self, number: int | None = None) -> list[Path]:
        """Paths of the parts of an incomplete shard, or of all, in order."""
        return sorted(self.parts.glob(f"{'*' if number is None else f'{number:06d}'}+*{self.format.suffix}"))

    def remove_parts(self, number: int) -> None:
        """Removes the parts of a shard."""
        for path in self.parts_of(number):
            self.format.remove(path)


def _or_none(read: Callable[[], Record | None]) -> Record | None:
    """Returns the record, or None if it is damaged."""
    try:
        return read()
    except InputError:
        return None
