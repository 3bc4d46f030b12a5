"""Lists of pictures for `train --data` and for embed, and a look at what they name."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...images.paths import address_scheme, read_list
from ...system import whole
from .store import Store

__all__ = ["listed_in", "write_list"]


def write_list(path: Path, names: Iterable[str]) -> int:
    """One absolute path a line, or between zero bytes where one holds a line break or a tab; how many there are.

    Raises: InputError where a picture came as an object and has no name.
    """
    found = [name if address_scheme(name) else os.path.abspath(name) for name in names if name]
    if not found:
        raise InputError(f"no names of pictures for '{path}': there are none, or the pictures came as objects")
    separator = b"\0" if any(c in name for name in found for c in "\n\r\t") else b"\n"
    with whole(path) as beside:
        beside.write_bytes(b"".join(os.fsencode(name) + separator for name in found))
    return len(found)


def listed_in(store: Store, path: str | os.PathLike[str]) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """[N] bool: pictures of a store that a list file names.

    Raises: MissingFileError, InputError for a list that names none of them.
    """
    names = set(read_list(path))
    paths: Sequence[str] = store.paths
    found = np.array([p in names or os.path.abspath(p) in names for p in paths], bool)
    if len(found) and not found.any():
        raise InputError(
            f"the list '{path}' names none of the {len(found)} pictures of '{store.path}'; give one that dedup or "
            "curate has made of them"
        )
    return found
