"""Lists of images, for `train --data` and for embed."""

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
    """Writes absolute paths, one per line, or separated by zero bytes if a path holds a line break or a tab.

    Returns the number of paths.

    Raises: InputError if no image has a name.
    """
    found = [name if address_scheme(name) else os.path.abspath(name) for name in names if name]
    if not found:
        raise InputError(
            f"there is nothing to write to '{path}': no image has a path; give images from files or web addresses"
        )
    separator = b"\0" if any(c in name for name in found for c in "\n\r\t") else b"\n"
    with whole(path) as beside:
        beside.write_bytes(b"".join(os.fsencode(name) + separator for name in found))
    return len(found)


def listed_in(store: Store, path: str | os.PathLike[str]) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """[N] bool: the images of a store that a list file names.

    Raises: MissingFileError if there is no list, InputError if it names no image of the store.
    """
    names = set(read_list(path))
    paths: Sequence[str] = store.paths
    found = np.array([p in names or os.path.abspath(p) in names for p in paths], bool)
    if len(found) and not found.any():
        raise InputError(
            f"the list '{path}' names none of the {len(found)} images of '{store.path}'; give a list that dedup or "
            "curate wrote for it"
        )
    return found
