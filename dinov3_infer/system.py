"""Files that appear whole or not at all, their hashes, memory that is kept, and threads of torch."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["keep_freed_memory", "sha256", "torch_threads", "whole"]


@contextmanager
def whole(target: Path, *, flush: bool = False) -> Iterator[Path]:
    """A path of the same suffix to write to; it takes the place of `target` in the end, or goes.

    `flush`: what is written is on the disk by then, so that it outlives the machine too.
    """
    # the name's beginning tells whose it is; all of it might leave no room for more
    beside = target.with_name(f".{target.stem[:16]}.{uuid.uuid4().hex[:8]}.tmp{target.suffix}")
    try:
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode  # as any new file has here; some writers make it another file, for us alone
        yield beside
        beside.chmod(mode)
        if flush:
            _flush(beside)
        os.replace(beside, target)
        if flush:
            _flush(target.parent)
    finally:
        beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def keep_freed_memory() -> None:
    """Once per process: has glibc keep what is freed, up to 62 MiB for each thread.

    Otherwise it goes back to the system and comes again page by page, up to half of the time of a large picture and 8
    to 10 % of that of a model in float32, until glibc has seen one such block freed.  This is just below the largest
    size that it learns from.
    """
    import torch  # not above: the command line starts without it

    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads, and afterwards with as many as before."""
    import torch  # as above

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
