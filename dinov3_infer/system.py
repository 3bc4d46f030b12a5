"""Files that appear whole or not at all, hashes, locked folders, signals, memory that is kept, and threads of torch."""

import hashlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "keep_freed_memory", "locked", "sha256", "together", "told_to_stop", "torch_threads", "whole"]

LOCK = ".dinov3_infer.lock"
_SECONDS = 3.0  # in which a process that was killed ends, and the first one of a run says which run it is
_held: dict[Path, str] = {}  # folders that this process has locked: the system does not keep a process from itself


@contextmanager
def whole(target: Path, *, flush: bool = False) -> Iterator[Path]:
    """A path of the same suffix to write to; it takes the place of `target` in the end, or goes.

    `flush`: what is written is on the disk by then, so that it outlives the machine too.
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
    finally:
        for beside in made:
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


@contextmanager
def told_to_stop(later: bool = False) -> Iterator[list[BaseException]]:
    """SIGTERM, and SIGHUP of a terminal that closes, end a run as Ctrl-C does: no thread is left.

    `later`: the first of these three is only noted, in the list, for who can stop at a better moment; the next one ends
    the run at once.
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
