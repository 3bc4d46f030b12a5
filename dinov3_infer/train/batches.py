"""Batches of views, prepared by worker processes, in an order that depends on seed and step only."""

import bisect
import itertools
import os
import shutil
import signal
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import Dinov3Error, ImageError, InputError, MissingFileError
from ..system import torch_threads
from .datasets import Data, open_data
from .draws import generator
from .views import Batch, ViewConfig, Views, block_mask, collate, make_views, masked_counts

__all__ = ["Batches", "Data", "batches", "open_data"]

CHUNK = 4  # images that a worker prepares at a time; few, because containers often have 64 MB of shared memory
REPLACEMENTS = 32  # images tried as a replacement of a broken one


class Task(NamedTuple):
    """Images of one step that one worker prepares together."""

    step: int
    row: int  # row of the table of resolutions
    slots: list[int]  # positions in the batch of all processes
    indices: list[int]  # numbers of the images at these positions


class Chunk(NamedTuple):
    """The prepared images of a task."""

    row: int
    views: Views  # each tensor with a leading dimension of n images: global_crops [n, 2, 3, S, S]
    masks: Tensor  # [n, 2, P]
    indices: Tensor  # [n], numbers of the images that were used
    broken: dict[int, str]  # number -> reason, for images that could not be read


class Batches:
    """Iterator of batches; endless if it has no last step.  Its workers end with it, or at `close`.

    Attributes:
        broken: number -> reason, for each image that could not be read so far; another image of the same source
            replaced it.
    """

    def __init__(self, collated: Generator[Batch, None, None], broken: dict[int, str]) -> None:
        self._collated, self.broken = collated, broken

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._collated)

    def close(self) -> None:
        """Ends the workers."""
        self._collated.close()


def batches(
    data: Data,
    views: ViewConfig | Sequence[tuple[float, ViewConfig]],
    *,
    batch_size: int,
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Batches:
    """The batches of steps `start` to `stop`, as this process sees them.

    Every epoch shows each image of a source once, in random order.

    Args:
        data: the images.
        views: the crops to draw; or pairs (probability, views) of several resolutions, one of which all processes draw
            at each step.
        batch_size: images per step over all processes; this process gets its consecutive share.
        seed: seed of all draws.
        start: first step.
        stop: step after the last; None for no end.
        rank: number of this process.
        world_size: number of processes.
        workers: processes that prepare images; 0 prepares them in this process.  The batches are the same.
        device: where the batches are put.

    Raises:
        InputError: the batch does not divide among the processes, or no resolution has a probability above 0.
        ImageError: while iterating, if an image and all its replacements are broken.
    """
    rows = [(1.0, views)] if isinstance(views, ViewConfig) else list(views)
    if batch_size < 1 or batch_size % world_size:
        raise InputError(f"batch_size={batch_size} does not divide among {world_size} processes; give a multiple")
    if not rows or min(p for p, _ in rows) < 0 or not any(p for p, _ in rows):
        raise InputError("resolutions are pairs (probability, views); give at least one with a probability above 0")
    configs = [config for _, config in rows]
    device, share = torch.device(device), batch_size // world_size
    mine, per_step = range(rank * share, (rank + 1) * share), -(-share // CHUNK)
    loader: DataLoader[Chunk] = DataLoader(
        _Prepared(data, configs, seed, batch_size),
        sampler=_tasks(data, [p for p, _ in rows], seed, batch_size, start, stop, mine),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=_ahead(configs, per_step, workers, world_size) if workers else None,
        worker_init_fn=_ignore_interrupts,
        pin_memory=device.type == "cuda",
        generator=generator(seed, start, "workers"),  # so that the loader draws nothing from torch's global generator
    )
    broken: dict[int, str] = {}
    return Batches(_collated(loader, configs, per_step, device, broken), broken)


def _collated(
    loader: DataLoader[Chunk],
    configs: Sequence[ViewConfig],
    per_step: int,  # chunks per step
    device: torch.device,
    broken: dict[int, str],
) -> Generator[Batch, None, None]:
    chunks = iter(loader)
    try:
        while made := list(itertools.islice(chunks, per_step)):
            for chunk in made:
                if isinstance(chunk, Dinov3Error):  # the loader would add its traceback to the message
                    raise chunk
                broken |= chunk.broken
            masks = torch.cat([chunk.masks for chunk in made])
            indices = torch.cat([chunk.indices for chunk in made])
            yield collate([chunk.views for chunk in made], masks, indices, configs[made[0].row], device)
    finally:
        del chunks  # ends the workers now, even if someone keeps the exception, and with it this frame


def _ahead(configs: Sequence[ViewConfig], per_step: int, workers: int, world_size: int) -> int:
    """Chunks that each worker prepares in advance: two batches in all, within half of the shared memory.

    A worker is killed, without an error message, when shared memory runs out.
    """
    wanted = 2 * per_step
    if os.path.isdir("/dev/shm"):
        largest = CHUNK * max(config.image_bytes for config in configs)
        wanted = min(wanted, shutil.disk_usage("/dev/shm").free // (2 * world_size * largest))
    return max(2, -(-wanted // workers))


def _tasks(
    data: Data,
    rows: Sequence[float],
    seed: int,
    batch_size: int,
    start: int,
    stop: int | None,
    mine: range,
) -> Iterator[Task]:
    """The tasks of this process from step `start` on; earlier steps only advance the counters."""

    @lru_cache(maxsize=4)
    def shuffled(stream: int, epoch: int, length: int) -> Tensor:
        return torch.randperm(length, generator=generator(seed, epoch, "order", stream), device="cpu")

    # Each source of pure batches is a separate stream; all other sources form one stream.
    images: dict[int, list[range]] = {}
    for which, probability in enumerate(data.pure):
        images.setdefault(which if probability else len(data.pure), []).append(data.range_of(which))
    streams = list(images)
    chances = [data.pure[stream] if stream < len(data.pure) else 1 - sum(data.pure) for stream in streams]
    drawn = dict.fromkeys(streams, 0)  # steps so far, by stream
    for step in itertools.count() if stop is None else range(stop):
        stream = streams[_pick(chances, seed, step, "mixture")]
        first = drawn[stream] * batch_size
        drawn[stream] += 1
        if step < start:
            continue
        ranges = images[stream]
        length = sum(map(len, ranges))
        row = _pick(rows, seed, step, "resolution")
        for begin in range(mine.start, mine.stop, CHUNK):
            slots = list(range(begin, min(begin + CHUNK, mine.stop)))
            indices = []
            for slot in slots:
                epoch, place = divmod(first + slot, length)
                index = int(shuffled(stream, epoch, length)[place])
                for numbers in ranges:
                    if index < len(numbers):
                        indices.append(numbers[index])
                        break
                    index -= len(numbers)
            yield Task(step, row, slots, indices)


def _pick(chances: Sequence[float], seed: int, step: int, purpose: str) -> int:
    """The index of one of several chances, the same in all processes."""
    if len(chances) == 1:
        return 0
    ends = list(itertools.accumulate(chances))
    drawn = (
        float(torch.rand((), generator=generator(seed, step, purpose), dtype=torch.float64, device="cpu")) * ends[-1]
    )
    return min(bisect.bisect_right(ends, drawn), len(ends) - 1)


class _Prepared(Dataset[Chunk]):
    """Turns tasks into chunks.  The views of an image depend on seed, step and slot, not on the worker."""

    def __init__(self, data: Data, configs: Sequence[ViewConfig], seed: int, batch_size: int) -> None:
        self._data, self._configs, self._seed, self._batch_size = data, configs, seed, batch_size

    def __getitem__(self, task: Task) -> Chunk:
        try:
            with torch_threads(1):  # as in a worker: the work is small, and sums depend on the number of threads
                return self._prepare(task)
        except Dinov3Error as error:
            return cast(Chunk, error)

    def _prepare(self, task: Task) -> Chunk:
        seed, step, size, config = self._seed, task.step, self._batch_size, self._configs[task.row]
        broken: dict[int, str] = {}
        taken, made = [], []
        for slot, index in zip(task.slots, task.indices, strict=True):
            index, image = self._read(index, step, slot, config.image_px, broken)
            taken.append(index)
            made.append(make_views(image, config, generator(seed, step, "views", slot)))
        rows, columns = config.grid
        counts = masked_counts(
            2 * size, rows * columns, generator(seed, step, "masked"), config.mask_probability, config.mask_ratio
        )
        crops = [slot + k * size for slot in task.slots for k in range(2)]
        masks = [block_mask(config.grid, counts[crop], generator(seed, step, "mask", crop)) for crop in crops]
        gram = [views.gram_crops for views in made if views.gram_crops is not None]
        views = Views(
            torch.stack([views.global_crops for views in made]),
            torch.stack([views.local_crops for views in made]),
            torch.stack(gram) if gram else None,
        )
        return Chunk(task.row, views, torch.stack(masks).unflatten(0, (-1, 2)), torch.tensor(taken), broken)

    def _read(self, index: int, step: int, slot: int, short_px: int, broken: dict[int, str]) -> tuple[int, Tensor]:
        """The image and its number; if it is broken, another image of the same source, drawn for this slot."""
        wanted = self._data.range_of(self._data.source_of(index))
        others = torch.randint(
            len(wanted), (REPLACEMENTS,), generator=generator(self._seed, step, "instead", slot), device="cpu"
        )
        for candidate in (index, *(wanted[i] for i in others.tolist())):
            try:
                return candidate, self._data.read(candidate, short_px)
            except (ImageError, MissingFileError) as error:
                broken[candidate] = str(error)
        raise ImageError(f"{len(broken)} images in a row cannot be read; check the data; the first: {broken[index]}")


def _unchanged(chunk: Any) -> Any:
    return chunk


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
