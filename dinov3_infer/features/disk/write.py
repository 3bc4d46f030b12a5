"""Writes vectors of any number of images as complete shards; a rerun continues after the last one."""

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import Dinov3Error, InputError, PrecisionError
from ...images.decode import ImageLike
from ...images.preprocess import PixelBatch, Placement
from ...images.sources import Source
from ...system import told_to_stop
from ..extractor import Extractor
from ..result import EmbedReport, Failure
from ..stream import Batcher, Item, Result, items_of
from ..vectors import EmbedOptions, Vector, say_failures, vectors_of
from .filling import Filling
from .recipe import BatchPlan, recipe_of
from .rows import Line, Piece
from .survey import Found, Survey, Work
from .target import Target

__all__ = ["Writer", "best_batch_size"]

log = logging.getLogger("dinov3_infer")

MOST_IMAGES, MOST_BYTES = 10_000, 1 << 28  # limits of a shard, which stays in memory until it is complete
FEW = 256  # images; below this, measuring the best batch size takes longer than it saves
SECONDS = 120.0  # time after which the rows of an incomplete shard are written


class Writer:
    """Writes the vectors of images to a target: those that are missing, that failed, or whose source changed.

    Raises: InputError if rows differ in shape and the format cannot hold them.
    """

    def __init__(
        self, target: Target, images: Source | Iterable[ImageLike], extractor: Extractor, options: EmbedOptions
    ) -> None:
        self.target, self.images, self.extractor, self.options = target, images, extractor, options
        self.recipe = recipe_of(extractor, images, options)
        self.transform = extractor.transform(options.size, options.fit, options.levels)
        self.filling: Filling | None = None
        self.works: dict[int, Work] = {}  # by shard number
        self.sources: dict[int, str | None] = {}  # identities of images that are being read
        self.failed = 0
        if self.recipe.shape is None and not target.format.ragged:
            raise InputError(
                f"fit='native' gives {options.kind} of unequal shapes, which '{target.path}' cannot hold; write "
                ".parquet, or use fit='squash'"
            )

    def run(self, only: Sequence[int] | None = None, run: str | None = None) -> EmbedReport:
        """Writes the missing rows.  A stream, which has no length, is written once and cannot be continued.

        `only`: the shards of a folder to write, if other processes write the rest; under torchrun each process has a
        part.
        `run`: a name that all processes of this run share (default: from torchrun's environment).

        Raises: InputError if the vectors on disk have another recipe, or another run is writing them; with
        on_error="raise" the error of the first image that cannot be read.
        """
        target = self.target
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        shared = ranks > 1 or only is not None
        if shared and (not target.is_folder or self.options.overwrite or self.recipe.count is None):
            what = (
                "write to a name without suffix" if not target.is_folder
                else "leave overwrite out, or run one process" if self.options.overwrite
                else "give a folder, a list of files or an archive instead of a stream"
            )  # fmt: skip
            raise InputError(
                f"several processes can only write a folder of shards, of a known number of images; {what}"
            )
        with target.locked((run or _launch()) if shared else None):
            try:
                self.recipe, self.state, base = target.enter(self.recipe, self._plan, self.options.overwrite, shared)
                shards = list(self.recipe.shards())
                report = self._run(range(rank, len(shards), ranks) if only is None else only, base, shared, rank)
            except BaseException:
                if not shared:
                    target.abandon()
                raise
            if not target.is_folder:
                target.abandon()
            return report

    def _run(self, mine: Sequence[int], base: bool, shared: bool, rank: int) -> EmbedReport:
        target, shards = self.target, list(self.recipe.shards())
        self.batch_size, self.size = self.recipe.plan.batch_size or 1, self.recipe.plan.shard_size or 1
        target.forget(mine if shared else None)
        found = Found()
        if isinstance(self.images, Source):
            survey = Survey(target, self.recipe, self.images, self.options.trust_names, base)
            self.works = {k: work for k in mine if (work := survey.work(k, shards[k])) is not None}
            survey.say()
            found = survey.found
        total = None if self.recipe.count is None else sum(len(shards[k]) for k in mine)
        before = self.kept = (total or 0) - sum(len(work.numbers) for work in self.works.values())
        if self.works or not isinstance(self.images, Source):
            self.extractor.warm(self.transform)
        try:
            with told_to_stop(), self._shown(total, before, self.options.progress if rank == 0 else False):
                if isinstance(self.images, Source):
                    self._source(self.images)
                else:
                    self._stream(self.images)
                    mine = range(len(list(self.recipe.shards())))
        except BaseException as error:
            if not isinstance(error, Exception):
                self._stopped(total)
            raise
        if not target.is_folder and not mine:  # without images the file has no rows
            Filling(target, self.recipe, Work(range(0), ())).write(self.batch_size)
            mine = range(1)
        pieces = [self._piece(k, shards) for k in mine]
        report = _report(target, pieces, self.size, EmbedReport(
            target.path, (self.recipe.count or 0, *(self.recipe.shape or ())), (), self.batch_size, before,
            found.changed, found.retried,
        ))  # fmt: skip
        if not base or any(piece.path != target.path for piece in pieces):
            if not target.is_folder:
                self._check(pieces)
            target.finish(self.recipe, pieces, self.state)
        say_failures(list(report.failures), report.shape[0])
        return report

    def _piece(self, shard: int, shards: list[range]) -> Piece:
        """Where the rows of a shard are."""
        path = self.target.shard(shard)
        if path.is_file() or not self.target.is_there():
            return Piece(path, 0, self.target.format.count(path))
        return Piece(self.target.path, shards[shard].start, shards[shard].stop)

    def _check(self, pieces: list[Piece]) -> None:
        """Raises InputError for files that were damaged since they were written."""
        form = self.target.format
        for path in dict.fromkeys(piece.path for piece in pieces):
            record = form.record(path)
            if wrong := form.damage(path, None if record is None else record.seal):
                raise InputError(f"{wrong}; repeat the call, which writes it again")

    def _stopped(self, total: int | None) -> None:
        """Writes the rows up to now when a run is stopped."""
        if self.filling is not None:
            self.kept += self.filling.keep()
        if total is not None and self.kept:
            log.warning("%d of %d images are kept; the same call continues from there", self.kept, total)

    # --- batches --------------------------------------------------------------------------------------------------

    def _plan(self, plan: BatchPlan) -> BatchPlan:
        """Completes a plan: recorded and given values stay, the rest is decided."""
        if plan.batch_size and plan.max_tokens:
            return plan
        row = np.dtype(self.recipe.out_dtype).itemsize * int(np.prod(self.recipe.shape or (2304, 1024)))
        size = plan.shard_size or max(1, min(MOST_IMAGES, MOST_BYTES // row))
        batch_size = plan.batch_size
        if batch_size is None:
            most = max(1, self.extractor.max_tokens // (self._example[0][0].numel() // self.transform.patch_size**2))
            few = self.recipe.count is not None and self.recipe.count <= FEW
            batch_size = min(32, most) if few else best_batch_size(self._try, most)
        return BatchPlan(size, batch_size, self.extractor.max_tokens)

    def _try(self, batch_size: int) -> None:
        """Runs a pass of zeros, to test its memory and time."""
        self._vectors([self.transform.collate([self._example] * batch_size, self.extractor.on_gpu)])()

    @property
    def _example(self) -> tuple[Tensor, Placement]:
        size = self.transform.size or 768
        height, width = (size, size) if isinstance(size, int) else size
        return self.transform.place(
            torch.zeros(3, height, width, dtype=torch.uint8, device="cpu"), for_gpu=self.extractor.on_gpu
        )

    def _vectors(self, batches: list[PixelBatch]) -> Callable[[], list[Sequence[Vector]]]:
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

    def _source(self, images: Source) -> None:
        """Computes the shards of a source.  A shard that does not fit in memory starts again with half the batch size,
        so that one number tells which images ran together.
        """
        todo = dict(self.works)
        while todo:
            numbers = itertools.chain.from_iterable([work.numbers for work in todo.values()])
            try:
                for done in self._filled(self._batcher(halves=False), self._items(images, numbers)):
                    del todo[done]
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                if self.filling is not None:
                    self._bar.update(-self.filling.came)
                    self.kept -= self.filling.stored
                    if self.filling.rows is not None:
                        number, whole = self.filling.number, self.filling.work.images
                        self.target.remove_parts(number)
                        todo[number] = self.works[number] = Work(whole, whole)
                    self.filling = None
                self.batch_size //= 2
                log.warning("out of memory; continuing with %d images per pass", self.batch_size)

    def _items(self, images: Source, numbers: Iterable[int]) -> Iterator[Item]:
        """Records the identity of an image before reading it, so the next run notices a change during this run."""
        for item in items_of(images, numbers):
            self.sources[item.number] = images.identity(item.number)
            yield item

    def _stream(self, images: Iterable[ImageLike]) -> None:
        batcher, count = self._batcher(halves=True), 0
        for shard in self._filled(batcher, items_of(images)):
            self.batch_size = batcher.batch_size
            count = shard * self.size + self.target.format.count(self.target.shard(shard))
        self.recipe = replace(self.recipe, count=count)
        self.target.rewrite(self.recipe, "overwriting" if self.state else "")

    def _filled(self, batcher: Batcher[Vector], items: Iterator[Item]) -> Iterator[int]:
        """Yields the number of each shard when it is written."""
        written = time.monotonic()
        for result in batcher(items):
            if self.filling is None:
                first = result.number - result.number % self.size
                work = self.works.get(result.number // self.size)
                room = range(first, first + self.size)
                self.filling = Filling(self.target, self.recipe, work or Work(room, room))
            self._add(self.filling, result)
            if result.ends:
                self.filling.end_pass()
            if self.filling.is_full:
                yield self._written(self.filling)
                written = time.monotonic()
            elif result.ends and time.monotonic() - written > SECONDS:
                self.kept += self.filling.keep()
                written = time.monotonic()
        if self.filling is not None:
            yield self._written(self.filling)

    def _add(self, filling: Filling, result: Result[Vector]) -> None:
        found, vector, line = result.found, None, Line(result.path, source=self.sources.pop(result.number, None))
        if isinstance(found, Dinov3Error):
            if self.options.on_error == "raise":
                raise found
            self.failed += 1
            self._bar.set_postfix(failed=self.failed, refresh=False)
            line = line._replace(error=str(found))
        else:
            vector, line = _fitting(found.array, self.recipe.out_dtype), line._replace(grid=found.grid)
        filling.put(result.number, vector, line)
        self._bar.update()

    def _written(self, filling: Filling) -> int:
        self.kept += filling.write(self.batch_size)
        self.filling = None
        return filling.number


def _fitting(vector: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "float16" and float(np.abs(vector).max(initial=0)) > 65504:
        raise PrecisionError("a vector holds numbers above 65504, the largest of float16; store float32 instead")
    return vector.astype(dtype, copy=False)


def best_batch_size(
    run: Callable[[int], None], most: int, seconds: float = 10.0, clock: Callable[[], float] = time.perf_counter
) -> int:
    """The batch size, a power of two up to `most`, with the least time per image.

    Sizes are doubled until a step gains less than 5 %, memory runs out, or `seconds` have passed.
    """
    best, best_time, size, started = 1, float("inf"), 1, clock()
    while size <= most:
        try:
            run(size)  # the first run also compiles and allocates
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
    log.info("%d images per pass (measured)", best)
    return best


def _launch() -> str:
    """A name that all processes of one torchrun launch share."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    return "torchrun " + " ".join(os.environ.get(name, "") for name in names)


def _report(target: Target, pieces: list[Piece], shard_size: int, report: EmbedReport) -> EmbedReport:
    failures: list[Failure] = []
    count = 0
    for piece in pieces:
        first = piece.start if piece.path == target.path else int(piece.path.stem) * shard_size
        for row, line in enumerate(target.format.lines(*piece), first):
            count += 1
            if line.error:
                failures.append(Failure(row, line.path, line.error))
    return replace(report, shape=(count, *report.shape[1:]), failures=tuple(failures))
