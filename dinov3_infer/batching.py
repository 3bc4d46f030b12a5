"""A stream of pictures of any sizes: read ahead, run in bounded batches, given back in the order of the input."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import index
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .errors import Dinov3Error, InputError, InputTypeError
from .features import Features
from .images import ImageLike, load_image
from .places import name_of
from .preprocess import PixelBatch, Placement, Preprocess

__all__ = ["Batcher", "OnError", "Result", "check_on_error"]

log = logging.getLogger("dinov3_infer")

OnError = Literal["raise", "skip"]
# Tokens of one pass: on a GPU enough to fill it, on a CPU few enough to stay near its caches.
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}


def check_on_error(on_error: str) -> None:
    """Raises InputError for a rule that does not exist."""
    if on_error not in get_args(OnError):
        raise InputError(f"on_error is 'raise' or 'skip', got {on_error!r}")


@dataclass(frozen=True)
class Result:
    """What became of one picture."""

    number: int  # in the input, from 0
    path: str | None  # None for pictures that came as objects
    features: Features | Dinov3Error  # of one picture, on the CPU; or why it could not be read


@dataclass(frozen=True)
class _Read:
    number: int
    path: str | None
    placed: tuple[Tensor, Placement] | Dinov3Error

    def tokens(self, patch_size: int) -> int:
        return 0 if isinstance(self.placed, Dinov3Error) else self.placed[0][0].numel() // patch_size**2


class Batcher:
    """Runs `forward` over a stream of pictures.

    A pass takes neighbours only, `batch_size` pictures and `max_tokens` patches at most, grouped by size.  Where the
    memory of the device does not do, the pass is run in halves, and from then on with half the pictures.
    """

    def __init__(
        self,
        transform: Preprocess,
        forward: Callable[[list[PixelBatch]], list[Features]],  # one batch per size -> its features
        batch_size: int,
        max_tokens: int,
        num_workers: int = 0,  # threads that read pictures ahead
    ) -> None:
        self.transform, self.forward, self.max_tokens = transform, forward, max_tokens
        self.batch_size = _count("batch_size", batch_size, 1)
        self.num_workers = _count("num_workers", num_workers, 0)

    def __call__(self, images: Iterable[ImageLike]) -> Iterator[Result]:
        """One result per picture, in order."""
        waiting: list[_Read] = []
        for item in self._read(images):
            tokens = sum(i.tokens(self.transform.patch_size) for i in (*waiting, item))
            if waiting and (len(waiting) >= self.batch_size or tokens > self.max_tokens):
                yield from self._run(waiting)
                waiting = []
            waiting.append(item)
        yield from self._run(waiting)

    def _read(self, images: Iterable[ImageLike]) -> Iterator[_Read]:
        if not self.num_workers:
            yield from (self._load(number, image) for number, image in enumerate(images))
            return
        pending: deque[Future[_Read]] = deque()
        pool = ThreadPoolExecutor(self.num_workers, "dinov3-infer-read")
        try:
            for number, image in enumerate(images):
                if isinstance(image, (str, os.PathLike, bytes, np.ndarray, Tensor)):
                    pending.append(pool.submit(self._load, number, image))
                else:  # an open picture or stream may come twice, and two threads cannot read it at once
                    pending.append(Future())
                    pending[-1].set_result(self._load(number, image))
                if len(pending) >= self.batch_size + self.num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, number: int, image: ImageLike) -> _Read:
        label = f"item {number}"
        try:
            return _Read(number, name_of(image), self.transform.place(load_image(image, label), label))
        except Dinov3Error as error:
            return _Read(number, name_of(image), error)

    def _run(self, items: list[_Read]) -> Iterator[Result]:
        while items:
            part = items[: self.batch_size]
            features = self._features(part)
            if features is None:
                self.batch_size = len(part) // 2
                log.warning("out of memory with %d pictures in one pass; going on with %d", len(part), self.batch_size)
                continue
            for item in part:
                found = item.placed if isinstance(item.placed, Dinov3Error) else features[item.number]
                yield Result(item.number, item.path, found)
            items = items[len(part) :]

    def _features(self, items: list[_Read]) -> dict[int, Features] | None:
        """By number of the picture; None where the memory did not do."""
        groups: dict[tuple[int, ...], list[tuple[int, tuple[Tensor, Placement]]]] = {}
        for item in items:
            if not isinstance(item.placed, Dinov3Error):
                groups.setdefault(tuple(item.placed[0].shape), []).append((item.number, item.placed))
        if not groups:
            return {}
        batches = [self.transform.collate([placed for _, placed in group]) for group in groups.values()]
        try:
            done = [features.to("cpu") for features in self.forward(batches)]
        except torch.OutOfMemoryError as error:
            if len(items) > 1:
                return None
            error.add_note(f"item {items[0].number} alone is too large for the memory; give a smaller size=")
            raise
        numbers = [[number for number, _ in group] for group in groups.values()]
        return {n: one for group, batch in zip(numbers, done, strict=True) for n, one in zip(group, batch, strict=True)}


def _count(name: str, value: int, least: int) -> int:
    try:
        number = index(value)
    except TypeError:
        raise InputTypeError(f"{name} is a whole number, got {value!r}") from None
    if number < least:
        raise InputError(f"{name} is a whole number from {least} on, got {value}")
    return number
