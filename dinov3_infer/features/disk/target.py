"""Where vectors go: one file, or a folder of shards."""

import contextlib
import os
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...errors import InputError, MissingFileError
from .formats import FORMATS, Format, whole
from .recipe import Recipe

__all__ = ["Target"]

RECORD = "dinov3_infer.json"  # the recipe of a folder of shards


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
            strange = self.path.is_dir() and any(self.path.iterdir()) and not (self.path / RECORD).is_file()
            if strange:
                raise InputError(f"the folder '{self.path}' holds other things; give an empty one or another name")
            return
        ours = overwrite or (self.parts / RECORD).is_file() or self.format.recipe(self.path) is not None
        for existing in (self.path, *(self.path.with_suffix(side) for side in self.format.sides)):
            if existing.exists() and not ours:
                raise InputError(f"'{existing}' exists already, and not from embed; give another name, or overwrite it")

    @property
    def parts(self) -> Path:
        return self.path if self.is_folder else self.path.with_name(f"{self.path.name}.parts")

    def shard(self, number: int) -> Path:
        return self.parts / f"{number:06d}{self.format.suffix}"

    def recorded(self) -> Recipe | None:
        """The recipe of what is there, finished or not."""
        if not self.is_folder and self.path.is_file() and (text := self.format.recipe(self.path)) is not None:
            return Recipe.from_json(text, self.path)
        record = self.parts / RECORD
        return Recipe.from_json(record.read_bytes(), record) if record.is_file() else None

    def is_finished(self) -> bool:
        return not self.is_folder and self.path.is_file()

    def clear(self) -> None:
        """Removes shards and their record; a finished file stays until another takes its place."""
        if not self.is_folder:
            shutil.rmtree(self.parts, ignore_errors=True)
        elif self.path.is_dir():
            (self.path / RECORD).unlink(missing_ok=True)
            for path in self.path.glob("[0-9]" * 6 + ".*"):
                path.unlink(missing_ok=True)

    def begin(self, recipe: Recipe) -> Recipe:
        """Writes the recipe, unless another process was faster, whose plan is taken then."""
        self.parts.mkdir(exist_ok=True)
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
        there = Recipe.from_json(record.read_bytes(), record)
        recipe.planned(there.plan).check_continues(there, self.path)
        return there

    def rewrite(self, recipe: Recipe) -> None:
        with whole(self.parts / RECORD) as beside:
            beside.write_text(recipe.to_json(), encoding="utf-8")

    def finish(self, recipe: Recipe, parts: list[Path]) -> None:
        """Joins the shards of a file, which takes the place of what is there."""
        if self.is_folder:
            return
        made = self.parts / f"joined{self.format.suffix}"
        self.format.join(made, parts, recipe.count or 0, recipe.to_json())
        self.format.remove(self.path)  # never an old file with a new list beside it
        for side in self.format.sides:
            os.replace(made.with_suffix(side), self.path.with_suffix(side))
        os.replace(made, self.path)
        shutil.rmtree(self.parts)

    def abandon(self) -> None:
        """After a failure: what holds no shard goes."""
        if self.parts.is_dir() and not any(self.shards()):
            self.clear()
            with contextlib.suppress(OSError):
                self.parts.rmdir()

    def forget(self, mine: Container[int]) -> None:
        """Removes what a run that was killed has left of shards that are to be written now."""
        for left_over in self.parts.glob("." + "[0-9]" * 6 + ".*.tmp*"):
            if int(left_over.name[1:7]) in mine:
                left_over.unlink(missing_ok=True)

    def shards(self) -> Iterator[Path]:
        """Those that are there, in order."""
        pattern = "[0-9]" * 6 + self.format.suffix
        return iter(sorted(self.parts.glob(pattern)))
