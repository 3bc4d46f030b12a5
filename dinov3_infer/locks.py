"""Folders that one run at a time writes to."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "locked"]

LOCK = ".dinov3_infer.lock"
_SECONDS = 3.0  # in which a process that was killed ends, and the first one of a run says which run it is
_held: dict[Path, str] = {}  # folders that this process has locked: the system does not keep a process from itself


@contextmanager
def locked(folder: Path, shown: object, run: str | None = None) -> Iterator[None]:
    """Only processes of one run are inside, and the system takes the lock away when a process ends, however it does.

    The folder is made where there is none, and stays.  `run`: a name that all processes of a run share, which may be
    inside together; None for a process alone.  Where the disk knows no locks, nobody is kept out.

    Raises: InputError while another run is inside.
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
                if _taken(descriptor, exclusive=True):  # the last one out
                    path.unlink(missing_ok=True)
            os.close(descriptor)


def _entered(path: Path, name: str, shared: bool, shown: object) -> int | None:
    """A descriptor that holds the lock; None where the disk knows none."""
    begun = time.monotonic()
    while path not in _held:
        descriptor = -1
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if _taken(descriptor, exclusive=True):
                if _is(path, descriptor):  # and not one that the last process has just removed
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
        except FileNotFoundError:  # the folder has just gone
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
    """A lock of this process, which those that it forks do not have."""
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
