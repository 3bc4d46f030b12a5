"""The seal of a file of vectors: its number of rows, and the sizes and SHA-256 of the file and of those beside it.

A file that holds its own record also holds its own SHA-256, computed with zeros in the place of that SHA-256.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...system import sha256

__all__ = ["OWN", "Seal", "damage", "stamp"]

OWN = "own:" + "0" * 64  # placeholder until the file is complete
_STAMP = re.compile(rb"own:([0-9a-f]{64})")
_HEX = re.compile(r"(own:)?[0-9a-f]{64}")


@dataclass(frozen=True)
class Seal:
    """The seal as it is stored in a record."""

    first: int  # number of the image of the first row
    rows: int
    files: Mapping[str, tuple[int, str]]  # suffix -> size in bytes (0 for the file that holds this seal), SHA-256

    @classmethod
    def of(cls, images: range, files: Mapping[str, Path], own: str) -> Self:
        """The seal of complete files, by their later suffixes; `own`: suffix of the file that will hold the seal."""
        found = {suffix: (path.stat().st_size, sha256(path)) for suffix, path in files.items()}
        return cls(images.start, len(images), found | {own: (0, OWN)})

    @classmethod
    def read(cls, first: Any, rows: Any, files: Any) -> Self:
        """The seal with these stored fields.  Raises: ValueError, TypeError, AttributeError for other content."""
        found = {str(suffix): (size, digest) for suffix, (size, digest) in files.items()}
        numbers = [first, rows, *(size for size, _ in found.values())]
        if any(type(n) is not int or n < 0 for n in numbers) or not all(_HEX.fullmatch(d) for _, d in found.values()):
            raise ValueError
        return cls(first, rows, found)


def stamp(path: Path, region: tuple[int, bytes]) -> None:
    """Writes a file's own SHA-256 into its record.  `region`: (offset, content) of the record."""
    digest = sha256(path)
    with open(path, "r+b") as stream:
        stream.seek(_hole(region))
        stream.write(digest.encode())


def damage(
    path: Path, seal: Seal, suffixes: tuple[str, ...], region: Callable[[Path], tuple[int, bytes]], deep: bool
) -> str | None:
    """The damage of a file or of those beside it, as a clause, or None.

    `deep`: compares the bytes, not only the sizes.
    """
    for suffix in suffixes:
        file = path.with_suffix(suffix)
        if not file.is_file():
            return f"'{file}' is missing"
        if suffix not in seal.files:
            return f"'{path}' has no checksum of '{file.name}'"
        size, digest = seal.files[suffix]
        own = digest.startswith("own:")
        if not own and file.stat().st_size != size:
            return f"'{file}' has {file.stat().st_size} bytes, but {size} were written"
        if deep and (_own(file, region(file)) if own else sha256(file)) != digest.removeprefix("own:"):
            return f"the bytes of '{file}' differ from those that were written"
    return None


def _hole(region: tuple[int, bytes]) -> int:
    found = _STAMP.search(region[1])
    if found is None:
        raise ValueError("no place for a checksum")
    return region[0] + found.start(1)


def _own(path: Path, region: tuple[int, bytes]) -> str:
    """SHA-256 of a file, with zeros in the place of the SHA-256 that it holds."""
    hole, found = _hole(region), hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            first, end = stream.tell() - len(chunk), stream.tell()
            if first < hole + 64 and hole < end:
                a, b = max(hole, first), min(hole + 64, end)
                chunk = chunk[: a - first] + b"0" * (b - a) + chunk[b - first :]
            found.update(chunk)
    return found.hexdigest()
