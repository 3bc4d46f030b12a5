"""Files that appear whole or not at all, a disk's errors, hashes, texts, signals, memory and threads."""

import codecs
import errno
import hashlib
import os
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .errors import Dinov3Error, DiskError

__all__ = [
    "disk_error",
    "keep_freed_memory",
    "sha256",
    "survive_forks",
    "together",
    "told_to_stop",
    "torch_threads",
    "unmarked",
    "whole",
]

_GONE = "the disk or its mount is gone or broken; mount it again, or take another place"
_MENDED = {  # what the system says -> what to do
    "ENOSPC": "the disk is full; make room, or take another disk",
    "EDQUOT": "the quota is used up; remove something, or take another disk",
    "EFBIG": "no file may be larger here; raise that limit (ulimit -f), or take another place",
    "EROFS": "nothing can be written there; take another place",
    **dict.fromkeys(("EIO", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "EREMOTEIO", "ENOMEDIUM"), _GONE),
}
_TRIED = 1 << 22  # bytes that are written to learn what a disk says


@contextmanager
def whole(target: Path, *, flush: bool = False) -> Iterator[Path]:
    """A path of the same suffix to write to; it takes the place of `target` in the end, or goes.

    `flush`: what is written is on the disk by then, so that it outlives the machine too.

    Raises: DiskError where the disk does not take it, whatever the library that wrote makes of that.
    """
    with together(target, flush=flush) as (beside,):
        yield beside


@contextmanager
def together(*targets: Path, flush: bool = False) -> Iterator[list[Path]]:
    """As `whole`, for files that belong together: none takes its place before all are written, the last one last."""
    # the name's beginning tells whose it is; all of it might leave no room for more
    made = [t.with_name(f".{t.stem[:16]}.{uuid.uuid4().hex[:8]}.tmp{t.suffix}") for t in targets]
    try:
        for beside in made:
            beside.touch(exist_ok=False)
        mode = made[0].stat().st_mode  # as any new file has here; some writers make it another file, for us alone
        yield made
        for beside in made:
            beside.chmod(mode)
            if flush:
                _flush(beside)
        for beside, target in zip(made, targets, strict=True):
            os.replace(beside, target)
        if flush:
            for folder in {target.parent for target in targets}:
                _flush(folder)
    except Dinov3Error:
        raise
    except Exception as error:
        for target, beside in zip(targets, made, strict=True):
            if (problem := disk_error(error, target, beside)) is not None:
                raise problem from None
        raise
    finally:
        for beside in made:
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def disk_error(
    error: Exception, target: str | os.PathLike[str] | None = None, written: Path | None = None
) -> DiskError | None:
    """What a disk is to blame for, in a sentence; None where an error has another cause.

    numpy, torch and safetensors tell no number of the system's error, or tell it in their text.  `written` is the file
    that one of them was writing: the disk is asked what it says to more of it.
    """
    said = re.search(r"\bos error (\d+)\b", str(error))
    number = getattr(error, "errno", None) if isinstance(error, OSError) else int(said[1]) if said else None
    if number is None and written is not None:
        number = _said_of_more(written)
    name = errno.errorcode.get(number or 0, "")
    place = target or getattr(error, "filename", None)
    shown = f"'{os.fsdecode(place)}' could not be written" if isinstance(place, (str, bytes, os.PathLike)) else ""
    if name == "ENOENT" and target is not None and not Path(target).parent.is_dir():
        text = f"{shown}: its folder is gone; make it, or mount its disk, again"
    elif name in _MENDED:
        text = f"{shown or 'something could not be written'} ({os.strerror(number or 0)}): {_MENDED[name]}"
    else:
        return None
    found = DiskError(text)
    found.errno = number
    return found


def _said_of_more(path: Path) -> int | None:
    try:
        with open(path, "ab") as file:
            file.write(bytes(_TRIED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


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


@contextmanager
def told_to_stop() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that closes, end a run as Ctrl-C does: no thread is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
