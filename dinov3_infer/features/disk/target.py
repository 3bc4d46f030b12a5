"""Where vectors go: one file, or a folder of shards."""

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
from .recipe import BatchPlan, Recipe, Record, State

__all__ = ["RECORD", "Target"]

RECORD = "dinov3_infer.json"  # the recipe of a folder of shards
_SHARD = r"\d{6,}(\+\d{6,})?"
_OURS = re.compile(rf"\.?({_SHARD}|joined)\.\S+|\.?{re.escape(RECORD)}(\.\d+)?|\.dinov3_infer\.\S+")


@dataclass(frozen=True)
class Target:
    """A name whose suffix says the format.

    A file is written in shards too, to a folder "NAME.parts" beside it, which are joined and go in the end; a name
    that ends in a slash, has no suffix or is that of a folder, is a folder where they stay.
    """

    path: Path
    is_folder: bool
    format: Format

    @classmethod
    def find(cls, out: str | os.PathLike[str], overwrite: bool = False) -> Self:
        """Before a model is loaded or a picture is read.

        Raises: InputError for a format that is not known or a file that is not ours, MissingFileError for no folder.
        """
        text = os.fspath(out)
        path = Path(text).expanduser()
        suffix = path.suffix.lower()
        if suffix not in ("", *FORMATS):
            raise InputError(
                f"'{path}' should end in {', '.join(FORMATS)}, or be a folder (a name without suffix, or with a slash "
                "behind it); rename it"
            )
        is_folder = path.is_dir() or not suffix or text.endswith(("/", os.sep))
        found = cls(path, is_folder, FORMATS[suffix or ".npy"]())
        if not path.parent.is_dir():
            raise MissingFileError(f"no folder '{path.parent.absolute()}' to write '{path.name}' to; make it first")
        place = path if path.is_dir() else path.parent
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(
                f"'{out}' cannot be written: no permission to write to '{place.absolute()}'; choose another place"
            )
        found._check_ours(overwrite)
        return found

    def _check_ours(self, overwrite: bool) -> None:
        """Nothing is replaced that embed has not written, unless asked for."""
        if self.is_folder:
            if self.path.is_file():
                raise InputError(f"'{self.path}' is a file, and a folder is needed; give another name")
            if self.path.is_dir() and not (self.path / RECORD).is_file():
                strange = [p.name for p in self.path.iterdir() if p.name != LOCK]
                if strange and not (overwrite and all(map(_OURS.fullmatch, strange))):
                    raise InputError(f"the folder '{self.path}' holds other things; give an empty one or another name")
            return
        ours = overwrite or (self.parts / RECORD).is_file() or self._says_how()
        for existing in (self.path, *(self.path.with_suffix(side) for side in self.format.sides)):
            if existing.exists() and not ours:
                raise InputError(f"'{existing}' exists already, and not from embed; give another name, or overwrite it")

    def _says_how(self) -> bool:
        """Whether a file has a record, whole or not.  Raises: InputError where nobody can tell."""
        try:
            return self.path.is_file() and self.format.stated(self.path) is not None
        except InputError:
            raise InputError(
                f"'{self.path}' exists already and is damaged, or not from embed; give another name, or overwrite it"
            ) from None

    @property
    def parts(self) -> Path:
        return self.path if self.is_folder else self.path.with_name(f"{self.path.name}.parts")

    def shard(self, number: int, offset: int = 0, part: bool = False) -> Path:
        """A shard, or the part from the row `offset` on of one that is not whole yet."""
        return self.parts / f"{number:06d}{f'+{offset:06d}' if part else ''}{self.format.suffix}"

    def locked(self, run: str | None = None) -> AbstractContextManager[None]:
        """Around all that a run does; see `locks.locked`."""
        return locked(self.parts, self.path, run)

    def unfinished(self) -> Record | None:
        """Of the folder of shards, which is gone when a file is finished."""
        record = self.parts / RECORD
        return Record.from_json(record.read_bytes(), record) if record.is_file() else None

    def finished(self) -> Record | None:
        """Of a file that is whole.  Raises: InputError for one that is damaged."""
        if not self.is_there():
            return None
        found = self.format.record(self.path)
        if found is None:
            raise InputError(f"'{self.path}' does not say how it was made; give another name, or overwrite it")
        return found

    def is_there(self) -> bool:
        """Whether there is a finished file."""
        return not self.is_folder and self.path.is_file()

    def clear(self, shards_alone: bool = False) -> None:
        """Removes the record, unless `shards_alone`, and then shards; a finished file stays until another takes its
        place.
        """
        if self.parts.is_dir():
            if not shards_alone:
                (self.parts / RECORD).unlink(missing_ok=True)
            for path in self.parts.iterdir():
                if path.name not in (LOCK, RECORD) and _OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        """Removes shards without a record, of which nobody knows how they were made.

        Raises: InputError where there are other things among them.
        """
        if self.is_folder or (self.parts / RECORD).is_file():
            return
        self.clear()
        if strange := [path.name for path in self.parts.iterdir() if path.name != LOCK]:
            raise InputError(f"the folder '{self.parts}' holds other things, such as '{strange[0]}'; move it elsewhere")

    def enter(
        self, recipe: Recipe, plan: Callable[[BatchPlan], BatchPlan], overwrite: bool, shared: bool
    ) -> tuple[Recipe, State, bool]:
        """Decides what a run goes on with, or begins: the recipe with its plan, the state, and whether a finished file
        of that recipe is there.

        `plan`: decides what a plan leaves open.  `shared`: other processes of this run are inside.

        Raises: InputError where what is there was made in another way, or has a damaged record.
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
        """Writes the recipe, unless another process was faster, whose plan is taken then."""
        record = self.parts / RECORD
        beside = record.with_name(f".{RECORD}.{os.getpid()}")
        try:
            beside.write_text(recipe.to_json(), encoding="utf-8")
            try:
                os.link(beside, record)  # unlike a rename it fails where there is one
                return recipe
            except OSError:  # or where the disk knows no links
                if not record.exists():
                    os.replace(beside, record)
                    return recipe
        finally:
            beside.unlink(missing_ok=True)
        there = Record.from_json(record.read_bytes(), record).recipe
        recipe.planned(there.plan).check_continues(there, self.path)
        return there

    def rewrite(self, recipe: Recipe, state: State = "") -> None:
        with whole(self.parts / RECORD, flush=True) as beside:
            beside.write_text(recipe.to_json(state=state), encoding="utf-8")

    def finish(self, recipe: Recipe, pieces: Sequence[Piece], state: State) -> None:
        """Joins the shards of a file, which takes the place of what is there; of a folder it says that it is whole."""
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
        """Puts a file that has been joined in its place, also after a kill in the middle of that."""
        made = self._joined
        if made.is_file():
            self.path.unlink(missing_ok=True)  # never an old file with a new list beside it
            for side in self.format.sides:
                if made.with_suffix(side).is_file():
                    os.replace(made.with_suffix(side), self.path.with_suffix(side))
            os.replace(made, self.path)
        self.clear()  # the record first: what is left without it is nothing

    def abandon(self) -> None:
        """Removes a folder of shards that holds none, which a run that failed or had nothing to do leaves."""
        if self.parts.is_dir() and not any(self.shards()) and not self.parts_of():
            self.clear()
            if all(path.name == LOCK for path in self.parts.iterdir()):
                shutil.rmtree(self.parts, ignore_errors=True)

    def forget(self, mine: Container[int] | None) -> None:
        """Removes what a run that was killed has left half written: all of it, or that of these shards."""
        for left_over in self.parts.glob(".*.tmp*"):
            number = re.match(r"\.(\d{6,})", left_over.name)
            if mine is None or (number and int(number[1]) in mine):
                left_over.unlink(missing_ok=True)

    def shards(self) -> Iterator[Path]:
        """Those that are whole, in order."""
        return iter(sorted(self.parts.glob("[0-9]" * 6 + self.format.suffix)))

    def parts_of(self, number: int | None = None) -> list[Path]:
        """Of a shard that is not whole, or of all, in order."""
        return sorted(self.parts.glob(f"{'*' if number is None else f'{number:06d}'}+*{self.format.suffix}"))

    def remove_parts(self, number: int) -> None:
        for path in self.parts_of(number):
            self.format.remove(path)


def _or_none(read: Callable[[], Record | None]) -> Record | None:
    """None for a record that is damaged, too."""
    try:
        return read()
    except InputError:
        return None
