"""Pictures in tar archives, Parquet tables and Datasets."""

import os
import tarfile
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from ..errors import ImageError, InputError, UnsupportedError, one_line
from .decode import MAX_BYTES, ImageLike
from .paths import identity_of, image_suffixes, tell_left_out
from .pixels import own
from .sources import Names, Source, folder_labels

__all__ = ["Dataset", "Table", "Tar", "pyarrow", "streamed"]

COLUMNS = ("image", "img", "jpg", "png")  # what holds the picture in a mapping or table
_OF_THE_NEXT = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip
_LONGEST_NAMES = 2**20  # bytes of what a tar says of one member besides its header
KEPT = 2  # groups of rows of a table in memory: those on both sides of a border


class _Member(tarfile.TarInfo):
    """A header that leads on, and not to all of memory: what has the names of the next one is read at once."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.size > _LONGEST_NAMES and found.type in _OF_THE_NEXT):
            raise tarfile.ReadError(f"a header says {found.size:,} bytes")
        return found


class Tar(Source):
    """Pictures in a tar archive, each found by the place that an index gives, which is built when it is opened."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path, self._identity = path, identity_of(path)
        suffixes = image_suffixes()
        names, spans, classes = list[str](), list[tuple[int, int]](), dict[str, str]()
        self._pieces: dict[int, list[tuple[int, int]]] = {}  # of members that are stored without their empty parts
        others: Counter[str] = Counter()
        try:
            with tarfile.open(path, "r:", tarinfo=_Member) as archive:
                last = -1
                for member in archive:
                    if member.offset <= last:  # some versions of Python would go round for ever
                        raise tarfile.ReadError(f"what follows '{one_line(member.name)}' lies before it")
                    last = member.offset
                    stem, suffix = os.path.splitext(member.name)
                    if not member.isfile() or os.path.basename(stem).startswith("."):
                        continue
                    if suffix.lower() in suffixes:
                        if sparse := cast("list[tuple[int, int]] | None", member.sparse):
                            self._pieces[len(names)] = [(int(start), int(length)) for start, length in sparse]
                        names.append(member.name)
                        spans.append((member.offset_data, member.size))
                    elif suffix == ".cls" and (text := archive.extractfile(member)):
                        classes[stem] = text.read(1 << 10).decode("utf-8-sig", "replace").strip()
                    else:
                        others[suffix.lower()] += 1
                    archive.members = []  # type: ignore[attr-defined]  # it would keep them, a kilobyte each
        except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
            raise InputError(
                f"'{path}' is no whole uncompressed tar archive ({error}); copy it again, or decompress it"
            ) from None
        if not names:
            raise InputError(f"no pictures in '{path}'; give an archive that holds some")
        tell_left_out(str(path), others)
        stems = [os.path.splitext(name)[0] for name in names]
        self.labels = [classes[s] for s in stems] if all(s in classes for s in stems) else folder_labels(names)
        self._names, self._spans = Names(names), np.array(spans, np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def key(self, index: int) -> str:
        return f"{self.name}#{self._names[index]}"

    def identity(self, index: int) -> str | None:
        return self._identity  # of the archive: whoever writes it anew may keep the times of its members

    def picture(self, index: int) -> bytes:
        offset, size = (int(v) for v in self._spans[index])
        if not 0 <= size <= MAX_BYTES:
            raise ImageError(f"'{self.key(index)}' has {size:,} bytes, which is no picture; leave it out")
        try:
            with open(self._path, "rb") as stream:
                stream.seek(offset)
                if (pieces := self._pieces.get(index)) is None:
                    return stream.read(size)
                content = bytearray(size)
                for start, length in pieces:
                    if not 0 <= start <= start + length <= size:
                        raise ImageError(f"'{self.key(index)}' is damaged; pack the archive again, without --sparse")
                    content[start : start + length] = stream.read(length)
                return bytes(content)
        except OSError as error:
            raise ImageError(f"cannot read '{self.key(index)}': {error.strerror}; check the path") from None


def pyarrow(what: str) -> Any:
    """pyarrow with its part for Parquet.  Raises: UnsupportedError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError(f"{what} needs pyarrow; pip install 'dinov3-infer[parquet]'") from None
    return pyarrow


class Table(Source):
    """A column of pictures: bytes, or {"bytes": ..., "path": ...}, called image, img, jpg or png, or the only one."""

    def __init__(self, path: Path) -> None:
        self.name, self._identity = str(path), identity_of(path)
        self._arrow, self._column = pyarrow(f"'{path}'"), ""
        self._rows: OrderedDict[int, list[Any]] = OrderedDict()  # by group
        self._lock = threading.Lock()
        arrow = self._arrow
        try:
            schema, metadata = self._file.schema_arrow, self._file.metadata
        except (OSError, arrow.ArrowException):
            raise InputError(f"'{path}' is no whole Parquet file; copy it again") from None
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))
        columns = [field.name for field in schema if _holds_pictures(arrow, field.type)]
        known = [name for name in COLUMNS if name in columns] or columns
        if not known or not metadata.num_rows:
            held = ", ".join(schema.names)
            raise InputError(f"no pictures in '{path}', whose columns are {held}; give one with a column 'image'")
        self._column = known[0]

    @cached_property
    def _file(self) -> Any:
        return self._arrow.parquet.ParquetFile(self.name, memory_map=True)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_file", "_rows", "_lock", "_arrow")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | dict(_rows=OrderedDict(), _lock=threading.Lock(), _arrow=pyarrow(f"'{state['name']}'"))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        return f"{self.name}#{index}"

    def identity(self, index: int) -> str | None:
        return self._identity

    def picture(self, index: int) -> ImageLike:
        group = bisect_right(self._ends, index)
        with self._lock:
            if group not in self._rows:
                try:
                    column = self._file.read_row_group(group, columns=[self._column]).column(0)
                except (OSError, self._arrow.ArrowException):
                    raise ImageError(
                        f"cannot read row {index} of '{self.name}': it is damaged; copy it again"
                    ) from None
                self._rows[group] = [row for chunk in column.chunks for row in chunk]  # not yet Python's own objects
                while len(self._rows) > KEPT:
                    self._rows.popitem(last=False)
            rows = self._rows[group]
            back = self._ends[group] - index  # from the end of the group
            row = rows[-back] if back <= len(rows) else None
        item, label = None if row is None else row.as_py(), self.label(index)
        if isinstance(item, Mapping) and item["bytes"] is None:  # a path is not followed: tables come from strangers
            raise ImageError(f"{label} holds no bytes of a picture; leave it out, or embed the files themselves")
        return stored_picture(item, label)


def _holds_pictures(arrow: Any, kind: Any) -> bool:
    binary = (arrow.types.is_binary, arrow.types.is_large_binary)
    if arrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and any(test(kind.field("bytes").type) for test in binary)
    return any(test(kind) for test in binary)


class Dataset(Source):
    """A torch or Hugging Face Dataset: its items are images, (image, ...) or {"image": image, ...}.

    One item is fetched at a time, and arrays are copied: a Dataset is made for one thread, and may fill one array again
    and again, or seek in one file.
    """

    def __init__(self, dataset: Any) -> None:
        self.name = type(dataset).__name__
        self.labels = [str(label) for label in np.asarray(getattr(dataset, "targets", ())).tolist()] or None
        self._dataset, self._column = _undecoded(dataset)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | dict(_lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._dataset)

    def key(self, index: int) -> str:
        return f"{self.name}#{index}"

    def identity(self, index: int) -> str | None:
        """Hugging Face's hash of what a dataset holds and what was done to it, with the identity of a file that it
        names; others have nothing of the kind.
        """
        found = getattr(self._dataset, "_fingerprint", None)
        if not isinstance(found, str):
            return None
        return f"{found} {identity_of(self._dataset[index][self._column]['path'])}" if self._names_files else found

    @cached_property
    def _names_files(self) -> bool:
        first = self._dataset[0].get(self._column) if len(self._dataset) else None
        return isinstance(first, Mapping) and first.get("bytes", b"") is None and isinstance(first.get("path"), str)

    def picture(self, index: int) -> ImageLike:
        with self._lock:
            try:
                item = self._dataset[index]
            except OSError as error:  # of Pillow too
                reason = error.strerror or str(error).split("<")[0].strip()
                raise ImageError(f"cannot read item {index} of {self.name}: {reason}; check that item") from None
            if isinstance(item, Mapping):
                item = next((item[key] for key in (self._column, *COLUMNS) if key in item), item)
            elif isinstance(item, (tuple, list)) and item:
                item = item[0]
            return own(stored_picture(item, self.label(index)))

    def label(self, index: int) -> str:
        return f"item {index} of {self.name}"


def _undecoded(dataset: Any) -> tuple[Any, str]:
    """A Hugging Face dataset that gives its pictures as bytes, so that a bad one costs itself alone; others as is."""
    features: Any = getattr(dataset, "features", None)
    columns = (
        [n for n, kind in features.items() if type(kind).__name__ == "Image"] if isinstance(features, dict) else []
    )
    if not columns or not hasattr(dataset, "cast_column"):
        return dataset, COLUMNS[0]
    column = next((name for name in COLUMNS if name in columns), columns[0])
    return dataset.select_columns([column]).cast_column(column, type(features[column])(decode=False)), column


def streamed(dataset: Any) -> Iterator[ImageLike]:
    """The pictures of a Hugging Face dataset without a length."""
    rows, column = _undecoded(dataset)
    for row in rows:
        item = row[column]
        yield item["bytes"] or item["path"] or b"" if isinstance(item, Mapping) else item


def stored_picture(item: Any, label: str) -> ImageLike:
    """Hugging Face keeps a picture as {"bytes": ..., "path": ...}, of which one may be missing."""
    if isinstance(item, Mapping) and set(item) == {"bytes", "path"}:
        item = item["bytes"] if item["bytes"] is not None else item["path"]
    if item is None:
        raise ImageError(f"{label} holds no picture; leave it out")
    return item  # type: ignore[no-any-return]
