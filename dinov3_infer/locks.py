"""Locks folders, so that one run at a time writes to a folder."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "locked"]

LOCK = ".dinov3_infer.lock"
_SECONDS = 3.0  # wait for a killed process to end, and for the first process of a run to write the run's name
_held: dict[Path, str] = {}  # folders that this process has locked; file locks do not exclude their own process


@contextmanager
def locked(folder: Path, shown: object, run: str | None = None) -> Iterator[None]:
    """Hold a lock on a folder, which only the processes of one run can share.

    The operating system releases the lock when a process ends, even if it is killed.  The folder is created if it is
    missing, and stays.  On disks without locks nobody is kept out.

    Args:
        folder: The folder to lock.
        shown: Its name in the error.
        run: A name that all processes of a run share; None for a single process.

    Raises:
        InputError: Another run holds the lock.
    """
    folder.mkdir(exist_ok=True)
    name, path = run or uuid.uuid4().hex, folder.resolve() / LOCK
    if run is not None and _held.get(path) == name:
        yield
        return
    descriptor = None if fcntl is None else _entered(path, name, run is not None, shown)
    _held[path] = name
    try:
        yield
    finally:
        del _held[path]
        if descriptor is not None:
            with suppress(OSError):
                if _taken(descriptor, exclusive=True):  # no other process is inside
                    path.unlink(missing_ok=True)
            os.close(descriptor)


def _entered(path: Path, name: str, shared: bool, shown: object) -> int | None:
    """A file descriptor that holds the lock; None on a disk without locks."""
    begun = time.monotonic()
    while path not in _held:
        descriptor = -1
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if _taken(descriptor, exclusive=True):
                if _is(path, descriptor):  # not a file that the last process has just removed
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, name.encode(), 0)
                    if shared:
                        _taken(descriptor, exclusive=False)
                    return descriptor
            elif (
                shared
                and _taken(descriptor, exclusive=False)
                and _is(path, descriptor)
                and os.pread(descriptor, 1 << 12, 0) == name.encode()
            ):
                return descriptor
            os.close(descriptor)
        except FileNotFoundError:  # the folder has just been removed
            if descriptor >= 0:
                os.close(descriptor)
        except OSError:
            if descriptor >= 0:
                os.close(descriptor)
            return None
        if time.monotonic() - begun > _SECONDS:
            break
        time.sleep(0.02)
    raise InputError(f"another run is writing to '{shown}' now; wait until it has ended, or give another name")


def _taken(descriptor: int, exclusive: bool) -> bool:
    """Try to lock; forked processes do not inherit such a lock."""
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
