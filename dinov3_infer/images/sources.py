"""What every source of pictures is, and the simple ones: names, lists, and what is picked out of several."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .decode import FORMATS, Decoded, ImageLike, TargetSize, decode
from .paths import name_of

__all__ = ["Files", "Items", "Names", "Numbered", "Picked", "Source", "folder_labels", "joined", "picture_suffixes"]


class Numbered(Protocol):
    """A torch or Hugging Face Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Source(ABC):
    """Numbered pictures of one origin."""

    name: str
    labels: list[str] | None = None  # class of each picture

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str | None:
        """What a list may call a picture: its path, "ARCHIVE.tar#MEMBER", "TABLE.parquet#ROW"; None for an object."""

    @abstractmethod
    def picture(self, index: int) -> ImageLike:
        """Not decoded where it lies in a file.  Raises: ImageError, MissingFileError."""

    def load(self, index: int, target: TargetSize | None = None) -> Decoded:
        """Decoded; with `target` a JPEG may come smaller, see `decode`.  Raises: ImageError, MissingFileError."""
        key = self.key(index)
        return decode(self.picture(index), f"item {index}" if key is None else f"'{key}'", target)


class Names(Sequence[str]):
    """Names end to end in one piece of memory: a list of a million strings takes three times that, in every process."""

    def __init__(self, names: Iterable[str]) -> None:
        content, ends = bytearray(), [0]
        for name in names:
            content += os.fsencode(name)
            ends.append(len(content))
        self._content, self._ends = bytes(content), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(self._content[self._ends[index] : self._ends[index + 1]])


class Listed(Source):
    """Pictures that are given one by one."""

    def __init__(self, name: str, pictures: Sequence[ImageLike], labels: list[str] | None = None) -> None:
        self.name, self._pictures, self.labels = name, pictures, labels

    def __len__(self) -> int:
        return len(self._pictures)

    def key(self, index: int) -> str | None:
        return name_of(self._pictures[index])

    def picture(self, index: int) -> ImageLike:
        return self._pictures[index]

    def load(self, index: int, target: TargetSize | None = None) -> Decoded:
        return decode(self._pictures[index], f"item {index}", target)  # a path is in what is said anyway


class Files(Listed):
    """Pictures in files or at addresses of their own."""

    def __init__(self, name: str, paths: Iterable[str], labels: list[str] | None = None) -> None:
        super().__init__(name, Names(paths), labels)


class Items(Listed):
    """Pictures of a list, of any kind."""

    def __init__(self, items: Sequence[ImageLike]) -> None:
        super().__init__("a list", items)


class Picked(Source):
    """Some pictures of several sources, in an order of their own."""

    def __init__(self, name: str, sources: Sequence[Source], places: Sequence[tuple[int, int]]) -> None:
        self.name, self._sources = name, tuple(sources)
        self._places = np.array(places, np.int64).reshape(-1, 2)  # which source, and its number there

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str | None:
        which, place = (int(v) for v in self._places[index])
        return self._sources[which].key(place)

    def picture(self, index: int) -> ImageLike:
        which, place = (int(v) for v in self._places[index])
        return self._sources[which].picture(place)

    def load(self, index: int, target: TargetSize | None = None) -> Decoded:
        which, place = (int(v) for v in self._places[index])
        return self._sources[which].load(place, target)


def joined(sources: Sequence[Source]) -> Source:
    """All pictures of several sources, one source after the other."""
    if len(sources) == 1:
        return sources[0]
    places = ((which, i) for which, source in enumerate(sources) for i in range(len(source)))
    return Picked("several sources", sources, list(places))


def folder_labels(paths: Sequence[str]) -> list[str] | None:
    """The first folder in which the paths differ, as torchvision's ImageFolder has it; None where there is none."""
    parents = [os.path.dirname(path).replace(os.sep, "/").split("/") for path in paths]
    common = len(os.path.commonprefix(parents))
    if any(len(parent) <= common or not parent[0] for parent in parents):
        return None
    return [parent[common] for parent in parents]


@cache
def picture_suffixes() -> frozenset[str]:
    """File name extensions of the formats that are read."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind in FORMATS)
