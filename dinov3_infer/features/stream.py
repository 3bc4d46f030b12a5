"""A stream of images of any sizes: threads decode them, bounded batches run, and results keep the order."""

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import Dinov3Error, InputError, InputTypeError, check_choice
from ..images.decode import Decoded, ImageLike, TargetSize, decode
from ..images.levels import Levels
from ..images.paths import name_of
from ..images.pixels import own
from ..images.preprocess import PixelBatch, Placement, Preprocess
from ..images.sources import Items, Source

__all__ = [
    "MAX_TOKENS",
    "Batcher",
    "Decode",
    "Item",
    "Launch",
    "OnError",
    "Reading",
    "Result",
    "T",
    "count_of",
    "in_order",
    "items_of",
]

log = logging.getLogger("dinov3_infer")

OnError = Literal["raise", "skip", "return"]
Decode = Literal["exact", "fast"]
# Tokens per pass: enough to fill a GPU, few enough for the caches of a CPU.
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}

T = TypeVar("T")
Launch = Callable[[list[PixelBatch]], Callable[[], list[Sequence[T]]]]


class Item(NamedTuple):
    """One image that is not read yet."""

    number: int  # position in the input, from 0
    path: str | None  # None for an image that is an object in memory
    load: Callable[[TargetSize | None, Levels | None, int], Decoded]
    alone: bool = False  # outside the threads: an open file may occur twice, and two threads cannot read it at once


@dataclass(frozen=True)
class Result(Generic[T]):
    """The result for one image."""

    number: int
    path: str | None
    found: T | Dinov3Error  # the error, if the image could not be read
    ends: bool = True  # whether it is the last of its pass


@dataclass(frozen=True)
class Reading:
    """How images are read and decoded."""

    workers: int = 0  # threads
    ahead: bool = False  # read while the model runs, for a GPU; False: all threads read, then all compute
    decode: Decode = "exact"  # "fast": see `decode`

    def __post_init__(self) -> None:
        object.__setattr__(self, "workers", count_of("num_workers", self.workers, 0))
        check_choice("decode", self.decode, Decode)


class _Read(NamedTuple):
    item: Item
    placed: tuple[Tensor, Placement] | Dinov3Error

    def tokens(self, patch_size: int) -> int:
        return 0 if isinstance(self.placed, Dinov3Error) else self.placed[0][0].numel() // patch_size**2


def items_of(images: Source | Iterable[ImageLike], numbers: Iterable[int] | None = None) -> Iterator[Item]:
    """Items for all images, or for those images of a source that have these numbers.

    Arrays and tensors from a stream are copied, because the stream may reuse their memory; those of a list are not.
    """
    if isinstance(images, Source):
        numbers = range(len(images)) if numbers is None else numbers
        if not isinstance(images, Items):
            yield from (Item(n, images.key(n), partial(images.load, n)) for n in numbers)
            return
        listed, kept = list(numbers), images.kept
        chosen: Iterable[tuple[int, ImageLike]] = zip(listed, map(images.image, listed), strict=True)
    else:
        chosen, kept = enumerate(images), isinstance(images, (list, tuple))
    for n, image in chosen:
        if not kept:
            image = own(image)
        alone = not isinstance(image, (str, os.PathLike, bytes, np.ndarray, Tensor))
        yield Item(n, name_of(image), partial(decode, image, f"item {n}"), alone)


class Batcher(Generic[T]):
    """Runs `launch` over a stream of images.

    `launch` takes one batch per size and returns a function that waits for one result per image.  On a GPU the next
    pass is launched before the results of the last one are awaited.

    A pass holds neighbouring images of one shard, at most `batch_size` images and `max_tokens` patches, grouped by
    size.  So the images of a shard and these two numbers alone decide which images run together.  If the device runs
    out of memory, the pass is split and `batch_size` is halved; with `halves=False` torch's error is raised.

    Raises: InputError, InputTypeError for a wrong `batch_size`.
    """

    def __init__(
        self,
        transform: Preprocess,
        launch: Launch[T],
        batch_size: int,
        max_tokens: int,
        reading: Reading,
        shard_size: int | None = None,  # images
        halves: bool = True,
        for_gpu: bool = False,  # see `Preprocess.place`
    ) -> None:
        self.transform, self.launch, self.max_tokens, self.reading = transform, launch, max_tokens, reading
        self.batch_size = count_of("batch_size", batch_size, 1)
        self.shard_size, self.halves, self.for_gpu = shard_size, halves, for_gpu

    def __call__(self, items: Iterable[Item]) -> Iterator[Result[T]]:
        """Yields one result per image, in input order.

        Raises: torch.OutOfMemoryError if one image alone, or with `halves=False` one pass, does not fit in memory.
        """
        flying: deque[_Flight[T]] = deque()
        for reads in self._passes(items):
            yield from self._run(reads, flying)
        while flying:
            yield from flying.popleft().landed()

    def _passes(self, items: Iterable[Item]) -> Iterator[list[_Read]]:
        waiting: list[_Read] = []
        tokens = 0
        for read in self._read(items):
            more = read.tokens(self.transform.patch_size)
            if waiting and (tokens + more > self.max_tokens or self._shard(read) != self._shard(waiting[0])):
                yield waiting
                waiting, tokens = [], 0
            waiting.append(read)
            tokens += more
            if len(waiting) >= self.batch_size:  # at once: a camera may take long to give the next image
                yield waiting
                waiting, tokens = [], 0
        yield waiting

    def _shard(self, read: _Read) -> int:
        return read.item.number // self.shard_size if self.shard_size else 0

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self, items: Iterable[Item]) -> Iterator[_Read]:
        if not self.reading.workers:
            yield from map(self._load, items)
            return
        # one torch thread per worker: otherwise each worker starts a thread per core
        pool = ThreadPoolExecutor(
            self.reading.workers, "dinov3-infer-read", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            yield from (self._ahead if self.reading.ahead else self._in_rounds)(pool, iter(items))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(torch.get_num_threads())  # the pool has changed the value for new threads

    def _ahead(self, pool: ThreadPoolExecutor, items: Iterator[Item]) -> Iterator[_Read]:
        pending: deque[Future[_Read]] = deque()
        for item in items:
            pending.append(self._submit(pool, item))
            if len(pending) >= self.batch_size + self.reading.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _in_rounds(self, pool: ThreadPoolExecutor, items: Iterator[Item]) -> Iterator[_Read]:
        """Reads, then computes: a model on the CPU uses every core, and decoding beside it slows it down.

        A pass may start before the last image of a round, so the whole round is read first.
        """
        while batch := [self._submit(pool, item) for item in itertools.islice(items, self.batch_size)]:
            yield from [future.result() for future in batch]

    def _submit(self, pool: ThreadPoolExecutor, item: Item) -> Future[_Read]:
        if not item.alone:
            return pool.submit(self._load, item)
        done: Future[_Read] = Future()
        done.set_result(self._load(item))
        return done

    def _load(self, item: Item) -> _Read:
        label = f"item {item.number}"
        wanted = (lambda h, w: self.transform.plan(h, w, label).resized) if self.reading.decode == "fast" else None
        try:
            image, original = item.load(wanted, self.transform.levels, self.transform.channels)
            return _Read(item, self.transform.place(image, label, original, self.for_gpu))
        except Dinov3Error as error:
            return _Read(item, error)

    # --- running ----------------------------------------------------------------------------------------------------

    def _run(self, reads: list[_Read], flying: "deque[_Flight[T]]") -> Iterator[Result[T]]:
        """Launches a pass and yields the results of passes that should not run beside it."""
        while reads:
            part = reads[: self.batch_size]
            flight = self._launched(part, alone=not flying)
            if flight is None and flying:  # a running pass holds memory
                yield from flying.popleft().landed()
                continue
            if flight is None:
                self.batch_size = len(part) // 2
                log.warning("out of memory with %d images per pass; continuing with %d", len(part), self.batch_size)
                continue
            flying.append(flight)
            reads = reads[len(part) :]
            while len(flying) > self.for_gpu:
                yield from flying.popleft().landed()

    def _launched(self, reads: list[_Read], alone: bool) -> "_Flight[T] | None":
        """The running pass, or None if the device ran out of memory and a retry is possible."""
        groups: dict[tuple[int, ...], list[tuple[int, tuple[Tensor, Placement]]]] = {}
        for item, placed in reads:
            if not isinstance(placed, Dinov3Error):
                groups.setdefault(tuple(placed[0].shape), []).append((item.number, placed))
        if not groups:
            return _Flight(reads, [], list)
        batches = [self.transform.collate([placed for _, placed in group], self.for_gpu) for group in groups.values()]
        try:
            wait = self.launch(batches)
        except torch.OutOfMemoryError as error:
            if not alone or (len(reads) > 1 and self.halves):
                return None
            if len(reads) == 1:
                error.add_note(f"item {reads[0].item.number} does not fit in memory even alone; give a smaller size=")
            raise
        return _Flight(reads, [[number for number, _ in group] for group in groups.values()], wait)


@dataclass(frozen=True)
class _Flight(Generic[T]):
    """A pass that was launched."""

    reads: list[_Read]
    numbers: list[list[int]]  # of the images of each batch
    wait: Callable[[], list[Sequence[T]]]

    def landed(self) -> Iterator[Result[T]]:
        """Waits for the pass and yields one result per image."""
        batches = zip(self.numbers, self.wait(), strict=True)
        done = {n: one for numbers, batch in batches for n, one in zip(numbers, batch, strict=True)}
        for item, placed in self.reads:
            found = placed if isinstance(placed, Dinov3Error) else done[item.number]
            yield Result(item.number, item.path, found, item is self.reads[-1].item)


def in_order(results: Iterable[Result[T]], on_error: OnError) -> Iterator[T | Dinov3Error | None]:
    """Yields the results in order; `on_error` decides about images that could not be read.

    Raises: with on_error="raise" the error of the first such image.
    """
    for result in results:
        if not isinstance(result.found, Dinov3Error) or on_error == "return":
            yield result.found
        elif on_error == "raise":
            raise result.found
        else:
            log.warning("skipped item %d: %s", result.number, result.found)
            yield None


def count_of(name: str, value: int, least: int) -> int:
    """`value` as an int.

    Raises: InputTypeError if it is not a whole number, InputError if it is below `least`.
    """
    try:
        number = index(value)
    except TypeError:
        raise InputTypeError(f"{name} is a whole number, got {value!r}") from None
    if number < least:
        raise InputError(f"{name} is a whole number of at least {least}, got {value}")
    return number
