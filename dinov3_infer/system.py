"""Files that appear whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole"]


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
