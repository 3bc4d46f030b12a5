"""A shard that is being computed: what is there of it, what has come, and how both are kept when a run ends early."""

from dataclasses import replace

import numpy as np

from ..vectors import Array
from .recipe import Recipe
from .rows import Line, Rows
from .survey import Work
from .target import Target

__all__ = ["Filling"]


class Filling:
    """Takes rows in the order of `work.numbers`.

    A shard that is whole is read and written again with its new rows when all have come, or the run ends.  The rows of
    one that is not are written in parts, each from where the last one ends, until all are there.
    """

    def __init__(self, target: Target, recipe: Recipe, work: Work) -> None:
        self.target, self.recipe, self.work = target, recipe, work
        self.number = work.images.start // (recipe.plan.shard_size or 1)
        self.patches: dict[int, tuple[Array | None, Line]] = {}  # by number of the image
        self.came = self.stored = 0  # rows that were computed, and those of them on the disk
        self.rows = None if work.there else self._loaded()
        self._whole = self._on_disk = len(self.rows or ())  # rows in passes that have ended, rows in parts

    def _loaded(self) -> Rows:
        """Room for the whole shard, with what is there of it."""
        recipe, images, form = self.recipe, self.work.images, self.target.format
        if recipe.shape is None:
            rows = Rows(images.start, [], recipe.out_dtype)
        else:
            room = np.full((len(images), *recipe.shape), np.nan, recipe.out_dtype)
            rows = Rows(images.start, room, recipe.out_dtype)
        for part in self.work.parts:
            found = form.read(*part)
            if isinstance(rows.vectors, list):
                rows.vectors += found.vectors
            else:
                room[len(rows) : len(rows) + len(found)] = np.asarray(found.vectors).reshape(-1, *room.shape[1:])
            rows.lines += found.lines
        return rows

    @property
    def is_full(self) -> bool:
        return self.came == len(self.work.numbers)

    def put(self, number: int, vector: Array | None, line: Line) -> None:
        """`vector`: None for an image that could not be read."""
        if self.rows is None:
            self.patches[number] = vector, line
        else:
            self.rows.put(number, vector, line)
        self.came += 1

    def end_pass(self) -> None:
        """What has come may be kept: what is computed next does not depend on where a run began."""
        self._whole = len(self.rows or ())

    def keep(self) -> int:
        """Writes what has come, of a shard that is not whole yet; says how many rows are new on the disk."""
        before = self.stored
        if self.rows is None:
            self._patch()
            self.stored = len(self.patches)
        elif self._whole > self._on_disk:
            part = self.rows[self._on_disk : self._whole]
            self.target.format.write(self.target.shard(self.number, self._on_disk, part=True), part, self.recipe)
            self.stored += self._whole - self._on_disk
            self._on_disk = self._whole
        return self.stored - before

    def write(self, batch_size: int) -> int:
        """Writes the shard; says how many rows are new on the disk."""
        target, before = self.target, self.stored
        if self.rows is None:
            self._patch()
        else:
            recipe = replace(self.recipe, plan=replace(self.recipe.plan, batch_size=batch_size))
            target.format.write(target.shard(self.number), self.rows[: len(self.rows)], recipe)
            if self._on_disk:
                target.remove_parts(self.number)
        self.stored = self.came
        return self.stored - before

    def _patch(self) -> None:
        """Nothing is written where all that failed has failed again."""
        there, form = self.work.there, self.target.format
        assert there is not None
        first = self.work.images.start
        lines = list(form.lines(*there))
        if all(vector is None and lines[n - first].error == line.error for n, (vector, line) in self.patches.items()):
            return
        rows = form.read(*there)
        rows.first = first
        for number, (vector, line) in self.patches.items():
            rows.put(number, vector, line)
        form.write(self.target.shard(self.number), rows, self.recipe)
