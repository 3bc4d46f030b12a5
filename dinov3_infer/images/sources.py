"""The interface of an image source, and the simple sources: names, lists, and selections from several sources."""

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
        """The name of an image in a list: its path, "ARCHIVE.tar#MEMBER" or "TABLE.parquet#ROW"; None for an object."""

    @abstractmethod
    def image(self, index: int) -> ImageLike:
        """One image; not decoded if it is in a file.  Raises: ImageError, MissingFileError."""

    def identity(self, index: int) -> str | None:
        """A text that changes when the image behind a key changes, see `identity_of`; None if there is none."""
        return None

    @cached_property
    def labels(self) -> list[str] | None:
        """Class of each image, if all have one."""
        return None

    def base(self, index: int) -> str | None:
        """The folder, or the fixed part of a pattern, under which an image was found; None if it was given directly."""
        return None

    def label(self, index: int) -> str:
        """Name of an image in messages."""
        return f"item {index}" if (key := self.key(index)) is None else f"'{key}'"

    def load(
        self, index: int, target: TargetSize | None = None, levels: Levels | None = None, channels: int = 3
    ) -> Decoded:
        """Decode one image to [channels, H_px, W_px]; see `decode`.  Raises: ImageError, MissingFileError."""
        return decode(self.image(index), self.label(index), target, levels, channels)


class Names(Sequence[str]):
    """A sequence of names in one block of memory; a list of a million strings takes three times that per process."""

    def __init__(self, names: Iterable[str]) -> None:
        content, ends = bytearray(), [0]
        for name in names:
            content += name.encode("utf-8", "surrogatepass")  # also encodes impossible file names
            ends.append(len(content))
        self._content, self._ends = bytes(content), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._content[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class Items(Source):
    """A list of images of any kind."""

    def __init__(self, images: Sequence[ImageLike]) -> None:
        self._images = images
        self.kept = isinstance(images, (list, tuple, Names))  # each image keeps its own memory

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str | None:
        """Path or address of an image; None for an object."""
        return name_of(self._images[index])

    def image(self, index: int) -> ImageLike:
        """One image, as it was given."""
        return self._images[index]

    def identity(self, index: int) -> str | None:
        """See `identity_of`."""
        return identity_of(self._images[index])

    def label(self, index: int) -> str:
        """The text "item NUMBER"."""
        return f"item {index}"  # messages name the path anyway


class Files(Items):
    """Images in files or at addresses."""

    def __init__(self, paths: Iterable[str], base: str | None = None) -> None:
        """`base`: the folder, or the fixed part of a pattern, under which all were found."""
        super().__init__(Names(paths))
        self._base = base

    @cached_property
    def labels(self) -> list[str] | None:
        """The folders of the files, see `folder_labels`."""
        if self._base is None:
            return None
        return folder_labels([os.path.relpath(path, self._base) for path in self._images])  # type: ignore[arg-type]

    def base(self, index: int) -> str | None:
        """The folder, or the fixed part of a pattern, under which all were found."""
        return self._base


class Picked(Source):
    """Images selected from several sources, in any order."""

    def __init__(self, sources: Sequence[Source], places: Sequence[tuple[int, int]]) -> None:
        self._sources = tuple(sources)
        self._places = np.array(places, np.int64).reshape(-1, 2)  # [N, 2]: source, index in that source

    def __len__(self) -> int:
        return len(self._places)

    def _place(self, index: int) -> tuple[Source, int]:
        which, place = (int(v) for v in self._places[index])
        return self._sources[which], place

    def key(self, index: int) -> str | None:
        """Name of an image in its source."""
        source, place = self._place(index)
        return source.key(place)

    def image(self, index: int) -> ImageLike:
        """One image of its source.  Raises: ImageError, MissingFileError."""
        source, place = self._place(index)
        return source.image(place)

    def identity(self, index: int) -> str | None:
        """Identity of an image in its source."""
        source, place = self._place(index)
        return source.identity(place)

    def base(self, index: int) -> str | None:
        """Base of an image in its source."""
        source, place = self._place(index)
        return source.base(place)

    def label(self, index: int) -> str:
        """Label of an image in its source; "item NUMBER" for items of a list."""
        source, place = self._place(index)
        return f"item {index}" if isinstance(source, Items) else source.label(place)


def chained(sources: Sequence[Source]) -> Source:
    """All images of several sources, one source after the other."""
    if len(sources) == 1:
        return sources[0]
    return Picked(sources, [(which, i) for which, source in enumerate(sources) for i in range(len(source))])


def folder_labels(paths: Sequence[str]) -> list[str] | None:
    """Label each path by the first folder level at which the paths differ, as torchvision's ImageFolder; None if a path
    has no such folder.
    """
    parents = [os.path.dirname(path).replace(os.sep, "/").split("/") for path in paths]
    common = len(os.path.commonprefix(parents))
    if any(len(parent) <= common or not parent[0] for parent in parents):
        return None
    return [parent[common] for parent in parents]


def relative_names(source: Source) -> list[str]:
    """Output names of the images: their paths, without suffix, below the folder or pattern that was given, or below the
    common folder of the images that were given directly.
    """
    found = [(source.key(i) or source.label(i), source.base(i)) for i in range(len(source))]
    single = [os.path.dirname(os.path.abspath(key)) for key, base in found if base is None and not address_scheme(key)]
    common = os.path.commonpath(single) if single else ""
    names = []
    for key, base in found:
        if address_scheme(key):
            names.append(os.path.splitext(PurePosixPath(urlsplit(key).path).name)[0] or "image")
            continue
        name = os.path.relpath(os.path.abspath(key), common if base is None else base)
        stem, suffix = os.path.splitext(name)
        names.append(name if "#" in suffix else stem)  # "TABLE.parquet#ROW" has no suffix
    return names
