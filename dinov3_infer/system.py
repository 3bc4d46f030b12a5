"""Atomic file writes, disk errors, hashes, text encodings, signals, memory and threads."""

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

_GONE = "the disk or its mount is gone or broken; mount it again, or use another folder"
_MENDED = {  # errno -> what is wrong, and what to do
    "ENOSPC": "the disk is full; make room, or use another disk",
    "EDQUOT": "the quota is used up; remove something, or use another disk",
    "EFBIG": "the file exceeds the size limit; raise it (ulimit -f), or use another folder",
    "EROFS": "the disk is read-only; use another folder",
    **dict.fromkeys(("EIO", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "EREMOTEIO", "ENOMEDIUM"), _GONE),
}
_TRIED = 1 << 22  # bytes of a trial write that finds the errno of a disk


@contextmanager
def whole(target: Path, *, flush: bool = False) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path of the same suffix, which replaces `target` on success only.

    `flush`: the content is on the disk when this returns, so that it survives a power failure.

    Raises: DiskError if the disk refuses the file, whatever exception the writing library makes of that.

    Example:
        >>> with whole(Path("a.json")) as path:
        ...     path.write_text("{}")
    """
    with together(target, flush=flush) as (beside,):
        yield beside


@contextmanager
def together(*targets: Path, flush: bool = False) -> Iterator[list[Path]]:
    """Like `whole` for files that belong together: all are written before any is renamed, in order, to its target.

    Raises: DiskError.
    """
    # 16 characters tell which file it belongs to; the whole name plus the additions may be too long for a name
    made = [t.with_name(f".{t.stem[:16]}.{uuid.uuid4().hex[:8]}.tmp{t.suffix}") for t in targets]
    try:
        for beside in made:
            beside.touch(exist_ok=False)
        mode = made[0].stat().st_mode  # mode of a new file; some writers replace the file by a private one
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
    """Turn an exception into a DiskError if a disk caused it, else return None.

    The exceptions of numpy, torch and safetensors have no errno, or only in their text.

    Args:
        error: The exception.
        target: The path to name in the message.
        written: A file that a library was writing.  If the exception has no errno, a trial write to this file gives it.
    """
    said = re.search(r"\bos error (\d+)\b", str(error))
    number = getattr(error, "errno", None) if isinstance(error, OSError) else int(said[1]) if said else None
    if number is None and written is not None:
        number = _said_of_more(written)
    name = errno.errorcode.get(number or 0, "")
    place = target or getattr(error, "filename", None)
    shown = f"'{os.fsdecode(place)}' could not be written" if isinstance(place, (str, bytes, os.PathLike)) else ""
    if name == "ENOENT" and target is not None and not Path(target).parent.is_dir():
        text = f"{shown}: its folder is gone; create it or mount its disk again"
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
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_MARKS = (  # UTF-32 first, since its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def unmarked(content: bytes) -> bytes:
    """Decode a text by its byte-order mark, and return it in the encoding of file names; unchanged without a mark.

    Raises: ValueError if the text contradicts its mark, or is UTF-16 without a mark.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return os.fsencode(content[len(mark) :].decode(encoding))
    if any(line in content for line in (b"\n\0", b"\0\n")) and content.count(b"\0") * 3 > len(content):
        raise ValueError("it looks like UTF-16 without a byte-order mark")
    return content


@cache
def keep_freed_memory() -> None:
    """Make glibc keep freed memory, up to 62 MiB per thread; runs once per process.

    By default glibc returns large blocks to the system until it has seen one freed, and gets them back page by page.
    That costs up to half of the time of a large image, and 8 to 10 % of the time of a float32 model.  The block
    allocated here is just below the largest size from which glibc learns.
    """
    import torch  # not at the top: the command line starts without torch

    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@cache
def survive_forks() -> None:
    """Make every process that is forked from now on compute with one thread; runs once per process.

    The OpenMP threads of torch stay with the parent, so a forked child would wait for them forever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_compute_alone)


def _compute_alone() -> None:
    import torch  # not at the top, see `keep_freed_memory`

    torch.set_num_threads(1)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads to `count` inside the block."""
    import torch  # not at the top, see `keep_freed_memory`

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def told_to_stop(later: bool = False) -> Iterator[list[BaseException]]:
    """Handle SIGTERM, and SIGHUP from a closing terminal, like Ctrl-C, so that a run ends without stray threads.

    `later`: the first of these signals and of SIGINT is only added to the list that this yields, so that the caller can
    stop at a good moment; the next one ends the run at once.

    Raises: SystemExit (128 + signal number), or KeyboardInterrupt for SIGINT.
    """
    told: list[BaseException] = []
    names = ("SIGTERM", "SIGHUP", *(("SIGINT",) if later else ()))
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    usual = {number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL for number in numbers}
    main = threading.current_thread() is threading.main_thread()
    numbers = [number for number in numbers if main and signal.getsignal(number) == usual[number]]

    def end(number: int, _: object) -> None:
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if told or not later:
            raise error
        told.append(error)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield told
    finally:
        for number in numbers:
            signal.signal(number, usual[number])
