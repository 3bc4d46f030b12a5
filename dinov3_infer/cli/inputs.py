"""Which pictures are meant, and where results may go."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ..errors import InputError, MissingFileError
from ..images.paths import address_scheme, is_collection, list_pictures, name_of, read_list

__all__ = ["Picture", "check_file", "check_folder", "find_pictures"]


@dataclass(frozen=True)
class Picture:
    """One picture of the command line."""

    path: str  # or address
    name: str  # below the folder of results, without a suffix


def find_pictures(sources: list[str]) -> list[Picture]:
    """All pictures that are meant, in the order given; what a folder or a pattern holds is sorted.

    Names keep the folders below a folder that was given, below the fixed part of a pattern, or below what all single
    files have in common.

    Raises: MissingFileError, InputError for a folder or list without a picture.
    """
    found: list[tuple[str, str | None]] = []  # path, and the folder that its name begins below
    for source in sources:
        if source.startswith("@"):
            found += [(path, None) for path in read_list(source[1:])]
        elif is_collection(source):
            found += [(path, _base(source)) for path in list_pictures(source)]
        elif address_scheme(source) or os.path.isfile(source):
            found.append((source, None))
        else:
            raise MissingFileError(f"no picture, folder or pattern at '{os.path.abspath(source)}'; check the path")
    single = [
        os.path.dirname(os.path.abspath(path)) for path, base in found if base is None and not address_scheme(path)
    ]
    common = os.path.commonpath(single) if single else ""
    return [Picture(path, _name(path, common if base is None else base)) for path, base in found]


def _base(source: str) -> str:
    if os.path.isdir(source):
        return os.path.abspath(source)
    fixed = source
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return os.path.abspath(fixed)


def _name(path: str, base: str) -> str:
    if address_scheme(path):
        inside = PurePosixPath(urlsplit(name_of(path) or "").path).name
        return os.path.splitext(inside)[0] or "picture"
    return os.path.splitext(os.path.relpath(os.path.abspath(path), base))[0]


def check_file(out: str, overwrite: bool, suffixes: tuple[str, ...]) -> Path:
    """A file that can be written.  Raises InputError, MissingFileError."""
    path = Path(out).expanduser()
    if path.suffix.lower() not in suffixes:
        raise InputError(f"'{out}' should end in {' or '.join(suffixes)}; rename it")
    _check_place(path.parent, out)
    if path.is_dir():
        raise InputError(f"'{out}' is a folder; give a file")
    if path.exists() and not overwrite:
        raise InputError(f"'{out}' exists already; give another name, or --overwrite")
    return path


def check_folder(out: str, overwrite: bool) -> Path:
    """A folder that can be written to, or made, and is empty unless `overwrite`.  Raises as `check_file`."""
    path = Path(out).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"'{out}' is a file, and a folder is needed; give another name")
    if path.is_dir():
        _check_place(path, out)
        if any(path.iterdir()) and not overwrite:
            raise InputError(f"the folder '{out}' is not empty; give another one, or --overwrite")
        return path
    _check_place(path.parent, out)
    return path


def _check_place(folder: Path, out: str) -> None:
    if not folder.is_dir():
        raise MissingFileError(f"no folder '{folder.absolute()}' to write '{out}' to; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"'{out}' cannot be written: no permission to write to '{folder.absolute()}'; choose another place"
        )
