"""What every source of images is, and the simple ones: names, lists, and what is picked out of several."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from .decode import Decoded, ImageLike, TargetSize, decode
from .levels import Levels
from .paths import address_scheme, identity_of, name_of

__all__ = ["Files", "Items", "Names", "Numbered", "Picked", "Source", "chained", "folder_labels", "relative_names"]


class Numbered(Protocol):
    """A torch or Hugging Face Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Source(ABC):
    """Numbered images of one origin."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str | None:
        """What a list may call an image: its path, "ARCHIVE.tar#MEMBER", "TABLE.parquet#ROW"; None for an object."""

    @abstractmethod
    def picture(self, index: int) -> ImageLike:
        """Not decoded where it lies in a file.  Raises: ImageError, MissingFileError."""

    def identity(self, index: int) -> str | None:
        """What tells an image from another one of its key, see `identity_of`; None where nothing does."""
        return None

    @cached_property
    def labels(self) -> list[str] | None:
        """Class of each image, where all have one."""
        return None

    def base(self, index: int) -> str | None:
        """The folder, or the fixed part of a pattern, that an image was found below; None if it was given itself."""
        return None

    def label(self, index: int) -> str:
        """What messages call an image."""
        return f"item {index}" if (key := self.key(index)) is None else f"'{key}'"

    def load(self, index: int, target: TargetSize | None = None, levels: Levels | None = None) -> Decoded:
        """Decoded; for `target` and `levels` see `decode`.  Raises: ImageError, MissingFileError."""
        return decode(self.picture(index), self.label(index), target, levels)


class Names(Sequence[str]):
    """Names end to end in one piece of memory: a list of a million strings takes three times that, in every process."""

    def __init__(self, names: Iterable[str]) -> None:
        content, ends = bytearray(), [0]
        for name in names:
            content += name.encode("utf-8", "surrogatepass")  # which takes names that no file can have too
            ends.append(len(content))
        self._content, self._ends = bytes(content), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._content[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class Items(Source):
    """Images of a list, of any kind."""

    def __init__(self, images: Sequence[ImageLike]) -> None:
        self._images = images
        self.kept = isinstance(images, (list, tuple, Names))  # each image in memory of its own

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str | None:
        return name_of(self._images[index])

    def picture(self, index: int) -> ImageLike:
        return self._images[index]

    def identity(self, index: int) -> str | None:
        return identity_of(self._images[index])

    def label(self, index: int) -> str:
        return f"item {index}"  # a path is in what is said anyway


class Files(Items):
    """Images in files or at addresses of their own."""

    def __init__(self, paths: Iterable[str], base: str | None = None) -> None:
        """`base`: the folder, or the fixed part of a pattern, that all were found below."""
        super().__init__(Names(paths))
        self._base = base

    @cached_property
    def labels(self) -> list[str] | None:
        if self._base is None:
            return None
        return folder_labels([os.path.relpath(path, self._base) for path in self._images])  # type: ignore[arg-type]

    def base(self, index: int) -> str | None:
        return self._base


class Picked(Source):
    """Some images of several sources, in an order of their own."""

    def __init__(self, sources: Sequence[Source], places: Sequence[tuple[int, int]]) -> None:
        self._sources = tuple(sources)
        self._places = np.array(places, np.int64).reshape(-1, 2)  # which source, and its number there

    def __len__(self) -> int:
        return len(self._places)

    def _place(self, index: int) -> tuple[Source, int]:
        which, place = (int(v) for v in self._places[index])
        return self._sources[which], place

    def key(self, index: int) -> str | None:
        source, place = self._place(index)
        return source.key(place)

    def picture(self, index: int) -> ImageLike:
        source, place = self._place(index)
        return source.picture(place)

    def identity(self, index: int) -> str | None:
        source, place = self._place(index)
        return source.identity(place)

    def base(self, index: int) -> str | None:
        source, place = self._place(index)
        return source.base(place)

    def label(self, index: int) -> str:
        source, place = self._place(index)
        return f"item {index}" if isinstance(source, Items) else source.label(place)


def chained(sources: Sequence[Source]) -> Source:
    """All images of several sources, one source after the other."""
    if len(sources) == 1:
        return sources[0]
    return Picked(sources, [(which, i) for which, source in enumerate(sources) for i in range(len(source))])


def folder_labels(paths: Sequence[str]) -> list[str] | None:
    """The first folder in which the paths differ, as torchvision's ImageFolder has it; None where there is none."""
    parents = [os.path.dirname(path).replace(os.sep, "/").split("/") for path in paths]
    common = len(os.path.commonprefix(parents))
    if any(len(parent) <= common or not parent[0] for parent in parents):
        return None
    return [parent[common] for parent in parents]


def relative_names(source: Source) -> list[str]:
    """Names for what is written for each image: its path below the folder or pattern that was given, or below what all
    that were given themselves have in common, without a suffix."""
    found = [(source.key(i) or source.label(i), source.base(i)) for i in range(len(source))]
    single = [os.path.dirname(os.path.abspath(key)) for key, base in found if base is None and not address_scheme(key)]
    common = os.path.commonpath(single) if single else ""
    names = []
    for key, base in found:
        if address_scheme(key):
            names.append(os.path.splitext(PurePosixPath(urlsplit(key).path).name)[0] or "picture")
            continue
        name = os.path.relpath(os.path.abspath(key), common if base is None else base)
        stem, suffix = os.path.splitext(name)
        names.append(name if "#" in suffix else stem)  # "TABLE.parquet#ROW" has no suffix
    return names
