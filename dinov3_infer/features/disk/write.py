"""Writes vectors of any number of pictures: whole shards only, going on where a run before has ended."""

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import Dinov3Error, InputError, PrecisionError
from ...images.decode import ImageLike
from ...images.preprocess import PixelBatch, Placement
from ...images.sources import Source
from ..extractor import Extractor
from ..stream import Batcher, Item, items_of
from ..vectors import EmbedOptions, EmbedReport, Failure, Vector, say_failures, vectors_of
from .formats import Rows
from .recipe import BatchPlan, Recipe, recipe_of
from .target import Target

__all__ = ["Writer", "best_batch_size"]

log = logging.getLogger("dinov3_infer")

MOST_PICTURES, MOST_BYTES = 10_000, 1 << 28  # of a shard, which is kept in memory until it is whole
FEW = 256  # pictures, for which looking for the best batch size takes longer than it gains


class Writer:
    """Writes the vectors of some images to a target: whole shards only, and those alone that are missing."""

    def __init__(
        self, target: Target, images: Source | Iterable[ImageLike], extractor: Extractor, options: EmbedOptions
    ) -> None:
        self.target, self.images, self.extractor, self.options = target, images, extractor, options
        self.recipe = recipe_of(extractor, images, options)
        self.transform = extractor.transform(options.size, options.fit)
        self.rows: Rows | None = None  # of the shard that is being filled
        self.failed = 0
        if self.recipe.shape is None and not target.format.ragged:
            raise InputError(
                f"fit='native' gives {options.kind} of unequal shapes, which '{target.path}' cannot hold; write "
                ".parquet, or use fit='squash'"
            )

    def run(self, only: Sequence[int] | None = None) -> EmbedReport:
        """Writes what is missing.  A stream, which has no length, is written once and cannot be gone on with.

        `only`: the shards of a folder to write, where others write the rest; under torchrun each process has its part.

        Raises: InputError where what is there was made in another way; with on_error="raise" the error of the first
        image that cannot be read.
        """
        target, overwrite = self.target, self.options.overwrite
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        shared = ranks > 1 or only is not None
        if shared and (not target.is_folder or overwrite or self.recipe.count is None):
            what = (
                "give a folder, which is a name without suffix" if not target.is_folder
                else "leave overwrite out, or run one process" if overwrite
                else "give a folder, a list of files or an archive in place of a stream"
            )  # fmt: skip
            raise InputError(f"several processes can only write a folder of shards, of images with a count; {what}")
        if overwrite:
            target.clear()
        elif (there := target.recorded()) is not None:
            self.recipe.check_continues(there, target.path)
            self.recipe = there
            if target.is_finished():
                return _report(target, there, [target.path], there.count or 0)
        self.recipe = target.begin(replace(self.recipe, plan=self._plan()))
        self.batch_size, self.size = self.recipe.plan.batch_size or 1, self.recipe.plan.shard_size or 1
        shards = list(self.recipe.shards())
        mine: Sequence[int] = range(rank, len(shards), ranks) if only is None else only
        todo = [k for k in mine if not target.shard(k).is_file()]
        target.forget(todo)
        before = sum(len(shards[k]) for k in mine) - sum(len(shards[k]) for k in todo)
        total = None if self.recipe.count is None else sum(len(shards[k]) for k in mine)
        try:
            with _ended_by_sigterm(), self._shown(total, before, self.options.progress if rank == 0 else False):
                if isinstance(self.images, Source):
                    self._source(self.images, {k: shards[k] for k in todo})
                else:
                    self._stream(self.images)
                    mine = range(len(list(self.recipe.shards())))
        except BaseException as error:
            left = [k for k in mine if not target.shard(k).is_file()]
            if not shared:
                target.abandon()
            if not isinstance(error, Exception) and self.recipe.count is not None and left:
                log.warning(
                    "%d of %d shards are whole; the same call goes on from there", len(mine) - len(left), len(mine)
                )
            raise
        if not target.is_folder and not mine:  # of no images there is a file too
            self.rows = self._empty(0)
            self._written()
            mine = range(1)
        parts = [target.shard(k) for k in mine]
        report = _report(target, self.recipe, parts, before, self.batch_size)
        target.finish(self.recipe, parts)
        say_failures(list(report.failures), report.shape[0])
        return report

    # --- batches --------------------------------------------------------------------------------------------------

    def _plan(self) -> BatchPlan:
        """What was asked for or recorded, and the rest decided."""
        plan = self.recipe.plan
        if plan.batch_size and plan.max_tokens:
            return plan
        row = np.dtype(self.recipe.out_dtype).itemsize * int(np.prod(self.recipe.shape or (2304, 1024)))
        size = plan.shard_size or max(1, min(MOST_PICTURES, MOST_BYTES // row))
        batch_size = plan.batch_size
        if batch_size is None:
            most = max(1, self.extractor.max_tokens // (self._example[0][0].numel() // self.transform.patch_size**2))
            few = self.recipe.count is not None and self.recipe.count <= FEW
            batch_size = min(32, most) if few else best_batch_size(self._try, most)
        return BatchPlan(size, batch_size, self.extractor.max_tokens)

    def _try(self, batch_size: int) -> None:
        """Runs a pass of images of the size to come, to see whether it fits and how long it takes."""
        self._vectors([self.transform.collate([self._example] * batch_size)])

    @property
    def _example(self) -> tuple[Tensor, Placement]:
        size = self.transform.size or 768
        height, width = (size, size) if isinstance(size, int) else size
        return self.transform.place(torch.zeros(3, height, width, dtype=torch.uint8))

    def _vectors(self, batches: list[PixelBatch]) -> list[Sequence[Vector]]:
        return vectors_of(self.extractor, batches, self.options)

    def _batcher(self, halves: bool) -> Batcher[Vector]:
        plan, options = self.recipe.plan, self.options
        return self.extractor.batcher(
            self.transform, self._vectors, self.batch_size, num_workers=options.num_workers, decode=options.decode,
            max_tokens=plan.max_tokens, shard_size=plan.shard_size, halves=halves,
        )  # fmt: skip

    @contextmanager
    def _shown(self, total: int | None, before: int, progress: bool | None) -> Iterator[None]:
        from tqdm import tqdm  # type: ignore[import-untyped]

        hidden = None if progress is None else not progress
        with tqdm(total=total, initial=before, unit="img", disable=hidden, smoothing=0.05) as self._bar:
            yield

    # --- shards ---------------------------------------------------------------------------------------------------

    def _source(self, images: Source, todo: dict[int, range]) -> None:
        """A shard for which the memory does not do is begun again with half the batch, so that one number tells what
        ran together in it.
        """
        while todo:
            numbers = itertools.chain.from_iterable(list(todo.values()))
            try:
                for done in self._filled(self._batcher(halves=False), items_of(images, numbers)):
                    del todo[done]
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self._bar.update(-len(self.rows or ()))
                self.rows = None
                self.batch_size //= 2
                log.warning("out of memory; going on with %d pictures in one pass", self.batch_size)

    def _stream(self, images: Iterable[ImageLike]) -> None:
        batcher = self._batcher(halves=True)
        self.count = 0
        for _ in self._filled(batcher, items_of(images)):
            self.batch_size = batcher.batch_size
        self.recipe = replace(self.recipe, count=self.count)
        self.target.rewrite(self.recipe)

    def _filled(self, batcher: Batcher[Vector], items: Iterator[Item]) -> Iterator[int]:
        """Numbers of the shards as they are written."""
        for number, path, found in ((r.number, r.path, r.found) for r in batcher(items)):
            if self.rows is None:
                self.rows = self._empty(number - number % self.size)
            self._add(self.rows, number, path, found)
            self.count = number + 1
            if number % self.size == self.size - 1:
                yield self._written()
        if self.rows is not None:
            yield self._written()

    def _empty(self, first: int) -> Rows:
        size = self.size if self.recipe.count is None else min(self.size, self.recipe.count - first)
        if self.recipe.shape is None:
            return Rows(first, [], self.recipe.out_dtype)
        return Rows(first, np.full((size, *self.recipe.shape), np.nan, self.recipe.out_dtype), self.recipe.out_dtype)

    def _add(self, rows: Rows, number: int, path: str | None, found: Vector | Dinov3Error) -> None:
        failed = isinstance(found, Dinov3Error)
        if isinstance(found, Dinov3Error):
            if self.options.on_error == "raise":
                raise found
            self.failed += 1
            self._bar.set_postfix(failed=self.failed, refresh=False)
        vector = None if isinstance(found, Dinov3Error) else _fitting(found.array, self.recipe.out_dtype)
        if isinstance(rows.vectors, list):
            rows.vectors.append(vector)
        elif vector is not None:
            rows.vectors[number - rows.first] = vector
        rows.paths.append(path)
        rows.grids.append(None if isinstance(found, Dinov3Error) else found.grid)
        rows.errors.append(str(found) if failed else "")
        self._bar.update()

    def _written(self) -> int:
        assert self.rows is not None
        rows, self.rows = self.rows, None
        if not isinstance(rows.vectors, list):
            rows.vectors = rows.vectors[: len(rows)]
        shard = rows.first // self.size
        recipe = replace(self.recipe, plan=replace(self.recipe.plan, batch_size=self.batch_size))
        self.target.format.write(self.target.shard(shard), rows, recipe.to_json())
        return shard


def _fitting(vector: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "float16" and float(np.abs(vector).max(initial=0)) > 65504:
        raise PrecisionError("a vector holds numbers above 65504, which float16 has not; store float32")
    return vector.astype(dtype, copy=False)


def best_batch_size(
    run: Callable[[int], None], most: int, seconds: float = 10.0, clock: Callable[[], float] = time.perf_counter
) -> int:
    """The number of pictures in a pass, a power of two up to `most`, that takes the least time per picture.

    Doubled until a step gains less than a twentieth, the memory does not do, or the time is over.
    """
    best, best_time, size, started = 1, float("inf"), 1, clock()
    while size <= most:
        try:
            run(size)  # the first one sets things up
            begun = clock()
            run(size)
        except torch.OutOfMemoryError:
            break
        took = (clock() - begun) / size
        if took > 0.95 * best_time and size > 4:
            break
        if took < best_time:
            best, best_time = size, took
        if clock() - started > seconds:
            break
        size *= 2
    log.info("%d pictures in one pass, found by trying", best)
    return best


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, with threads joined and nothing half written left."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _report(
    target: Target, recipe: Recipe, parts: list[Path], before: int, batch_size: int | None = None
) -> EmbedReport:
    failures: list[Failure] = []
    row = count = 0
    for part in parts:
        row = int(part.stem) * (recipe.plan.shard_size or 1) if part != target.path else 0
        for path, error in target.format.listing(part):
            if error:
                failures.append(Failure(row, path, error))
            row, count = row + 1, count + 1
    shape = (count, *(recipe.shape or ()))
    return EmbedReport(target.path, shape, tuple(failures), batch_size or recipe.plan.batch_size or 1, before)
