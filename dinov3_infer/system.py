"""Files that appear whole or not at all, their hashes, memory that is kept, and threads of torch."""

import codecs
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["keep_freed_memory", "sha256", "survive_forks", "torch_threads", "unmarked", "whole"]


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


_MARKS = (  # the longer ones first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def unmarked(content: bytes) -> bytes:
    """The bytes of a text in the encoding of file names, without its byte-order mark; as they are without a mark.

    Raises: ValueError for a text that is not what its mark says, and for UTF-16 without one.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return os.fsencode(content[len(mark) :].decode(encoding))
    if any(line in content for line in (b"\n\0", b"\0\n")) and content.count(b"\0") * 3 > len(content):
        raise ValueError("it looks like UTF-16 without a byte-order mark")
    return content


@cache
def keep_freed_memory() -> None:
    """Once per process: has glibc keep what is freed, up to 62 MiB for each thread.

    Otherwise it goes back to the system and comes again page by page, up to half of the time of a large picture and 8
    to 10 % of that of a model in float32, until glibc has seen one such block freed.  This is just below the largest
    size that it learns from.
    """
    import torch  # not above: the command line starts without it

    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@cache
def survive_forks() -> None:
    """Once per process: has every child that is forked from now on compute with one thread.

    The threads of OpenMP, in which torch computes, stay with the parent, and a child would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_compute_alone)


def _compute_alone() -> None:
    import torch  # as below

    torch.set_num_threads(1)


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
