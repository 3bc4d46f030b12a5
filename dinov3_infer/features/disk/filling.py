"""One shard while it is computed: the rows on disk, the new rows, and how both are kept when a run stops early."""

from dataclasses import replace

import numpy as np

from ..vectors import Array
from .recipe import Recipe
from .rows import Line, Rows
from .survey import Work
from .target import Target

__all__ = ["Filling"]


class Filling:
    """Collects the rows of one shard, in the order of `work.numbers`.

    A complete shard that needs new rows is read and written again when all of them are computed, or when the run stops.
    The rows of an incomplete shard are written in parts, each of which starts where the last one ends, until the shard
    is complete.
    """

    def __init__(self, target: Target, recipe: Recipe, work: Work) -> None:
        self.target, self.recipe, self.work = target, recipe, work
        self.number = work.images.start // (recipe.plan.shard_size or 1)
        self.patches: dict[int, tuple[Array | None, Line]] = {}  # new rows of a complete shard, by image number
        self.came = self.stored = 0  # rows computed, and how many of them are on disk
        self.rows = None if work.there else self._loaded()
        self._whole = self._on_disk = len(self.rows or ())  # rows of finished passes, rows in parts

    def _loaded(self) -> Rows:
        """Allocates the whole shard and loads the rows of its parts."""
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
        """Whether all rows to compute are there."""
        return self.came == len(self.work.numbers)

    def put(self, number: int, vector: Array | None, line: Line) -> None:
        """`vector`: the row of one image, [C], [P, C] or [C, h, w]; None for an image that could not be read."""
        if self.rows is None:
            self.patches[number] = vector, line
        else:
            self.rows.put(number, vector, line)
        self.came += 1

    def end_pass(self) -> None:
        """Marks the rows up to now as rows of finished passes, which can be kept.

        A run that continues after them groups the remaining images into the same passes.
        """
        self._whole = len(self.rows or ())

    def keep(self) -> int:
        """Writes the rows up to now of an incomplete shard; returns the number of rows that are new on disk."""
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
        """Writes the shard; returns the number of rows that are new on disk."""
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
        """Writes the new rows into a complete shard, unless the same images failed again with the same errors."""
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
