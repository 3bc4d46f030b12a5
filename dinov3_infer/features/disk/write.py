"""Writes vectors of any number of pictures: whole shards only, going on where a run before has ended."""

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import Dinov3Error, InputError, PrecisionError
from ...images.decode import ImageLike
from ...images.preprocess import PixelBatch, Placement, Preprocess
from ...images.sources import Source
from ..stream import Batcher, Item, Reading, items_of
from ..vectors import EmbedReport, Failure, Vector, say_failures
from .formats import Rows
from .recipe import Plan, Recipe
from .target import Target

__all__ = ["Model", "best_batch_size", "write"]

log = logging.getLogger("dinov3_infer")

MOST_PICTURES, MOST_BYTES = 10_000, 1 << 28  # of a shard, which is kept in memory until it is whole
FEW = 256  # pictures, for which looking for the best batch size takes longer than it gains


@dataclass(frozen=True)
class Model:
    """What turns pictures into vectors."""

    transform: Preprocess
    forward: Callable[[list[PixelBatch]], list[Sequence[Vector]]]
    reading: Reading
    max_tokens: int  # of one pass

    def batcher(self, plan: Plan, halves: bool) -> Batcher[Vector]:
        return Batcher(
            self.transform, self.forward, plan.batch_size or 1, plan.max_tokens or self.max_tokens, self.reading,
            plan.shard_size, halves,
        )  # fmt: skip

    def most(self) -> int:
        """Pictures in a pass at most."""
        return max(1, self.max_tokens // (self._example[0][0].numel() // self.transform.patch_size**2))

    def try_batch(self, batch_size: int) -> None:
        """Runs a pass of pictures of the size to come, to see whether it fits and how long it takes."""
        self.forward([self.transform.collate([self._example] * batch_size)])

    @property
    def _example(self) -> tuple[Tensor, Placement]:
        size = self.transform.size or 768
        height, width = (size, size) if isinstance(size, int) else size
        return self.transform.place(torch.zeros(3, height, width, dtype=torch.uint8))


def write(
    target: Target,
    pictures: Source | Iterable[ImageLike],
    recipe: Recipe,
    model: Model,
    *,
    raises: bool,
    progress: bool | None,
    overwrite: bool = False,
    only: Sequence[int] | None = None,
) -> EmbedReport:
    """Writes what is missing.  A stream, which has no length, is written once and cannot be gone on with.

    `only`: the shards of a folder to write, where others write the rest; under torchrun each process has its part.

    Raises: InputError where what is there was made in another way; with `raises` the error of the first bad picture.
    """
    if recipe.shape is None and not target.format.ragged:
        raise InputError(
            f"fit='native' gives {recipe.kind} of unequal shapes, which '{target.path}' cannot hold; write .parquet, "
            "or use fit='squash'"
        )
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    shared = ranks > 1 or only is not None
    if shared and (not target.is_folder or overwrite or recipe.count is None):
        what = "overwrites" if overwrite else "takes a list of files" if target.is_folder else "writes a folder"
        raise InputError(f"several processes share the work, which {what} only with one; give a folder of shards")
    if overwrite:
        target.clear()
    elif (there := target.recorded()) is not None:
        recipe.check_continues(there, target.path)
        recipe = there
        if target.is_finished():
            return _report(target, recipe, [target.path], recipe.count or 0)
    recipe = target.begin(replace(recipe, plan=_plan(recipe, model)))
    shards = list(recipe.shards())
    mine: Sequence[int] = range(rank, len(shards), ranks) if only is None else only
    todo = [k for k in mine if not target.shard(k).is_file()]
    target.forget(todo)
    before = sum(len(shards[k]) for k in mine) - sum(len(shards[k]) for k in todo)
    run = _Run(target, recipe, model, raises)
    total = None if recipe.count is None else sum(len(shards[k]) for k in mine)
    try:
        with _ended_by_sigterm(), run.bar(total, before, progress if rank == 0 else False):
            if isinstance(pictures, Source):
                run.source(pictures, {k: shards[k] for k in todo})
            else:
                recipe = run.stream(pictures)
                mine = range(len(list(recipe.shards())))
    except BaseException as error:
        left = [k for k in mine if not target.shard(k).is_file()]
        if not shared:
            target.abandon()
        if not isinstance(error, Exception) and recipe.count is not None and left:
            log.warning("%d of %d shards are whole; the same call goes on from there", len(mine) - len(left), len(mine))
        raise
    if not target.is_folder and not mine:  # of no pictures there is a file too
        run.empty()
        mine = range(1)
    parts = [target.shard(k) for k in mine]
    report = _report(target, recipe, parts, before, run.batch_size)
    target.finish(recipe, parts)
    say_failures(list(report.failures), report.shape[0])
    return report


class _Run:
    def __init__(self, target: Target, recipe: Recipe, model: Model, raises: bool) -> None:
        self.target, self.recipe, self.model, self.raises = target, recipe, model, raises
        self.batch_size = recipe.plan.batch_size or 1
        self.size = recipe.plan.shard_size or 1
        self.rows: Rows | None = None  # of the shard that is being filled
        self.failed = 0

    @contextmanager
    def bar(self, total: int | None, before: int, progress: bool | None) -> Iterator[None]:
        from tqdm import tqdm  # type: ignore[import-untyped]

        hidden = None if progress is None else not progress
        with tqdm(total=total, initial=before, unit="img", disable=hidden, smoothing=0.05) as self._bar:
            yield

    def source(self, pictures: Source, todo: dict[int, range]) -> None:
        """A shard for which the memory does not do is begun again with half the batch, so that one number tells what
        ran together in it.
        """
        while todo:
            plan = replace(self.recipe.plan, batch_size=self.batch_size)
            numbers = itertools.chain.from_iterable(list(todo.values()))
            try:
                for done in self._filled(self.model.batcher(plan, halves=False), items_of(pictures, numbers)):
                    del todo[done]
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self._bar.update(-len(self.rows or ()))
                self.rows = None
                self.batch_size //= 2
                log.warning("out of memory; going on with %d pictures in one pass", self.batch_size)

    def stream(self, pictures: Iterable[ImageLike]) -> Recipe:
        batcher = self.model.batcher(self.recipe.plan, halves=True)
        self.count = 0
        for _ in self._filled(batcher, items_of(pictures)):
            self.batch_size = batcher.batch_size
        recipe = replace(self.recipe, count=self.count)
        self.target.rewrite(recipe)
        return recipe

    def empty(self) -> None:
        self.rows = self._empty(0)
        self._written()

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
            if self.raises:
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


def _plan(recipe: Recipe, model: Model) -> Plan:
    """What has not been asked for, and is not recorded."""
    if recipe.plan.batch_size and recipe.plan.max_tokens:
        return recipe.plan
    row = np.dtype(recipe.out_dtype).itemsize * int(np.prod(recipe.shape or (2304, 1024)))
    size = recipe.plan.shard_size or max(1, min(MOST_PICTURES, MOST_BYTES // row))
    batch_size = recipe.plan.batch_size
    if batch_size is None:
        few = recipe.count is not None and recipe.count <= FEW
        batch_size = min(32, model.most()) if few else best_batch_size(model.try_batch, model.most())
    return Plan(size, batch_size, model.max_tokens)


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
