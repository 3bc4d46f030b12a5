"""Images in tar archives, Parquet tables and Datasets."""

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

COLUMNS = ("image", "img", "jpg", "png")  # names of the image column, in order of preference
_PACKED, _MOST_ROWS = 20, 2**24  # highest compression of images in a table; most rows in a group
_OF_THE_NEXT = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip
_LONGEST_NAMES = 2**20  # bytes of the extended header of a tar member
KEPT = 2  # row groups of a table kept in memory, so that reads across a border stay cheap


class _Member(tarfile.TarInfo):
    """A tar header of bounded size, since tarfile reads the extended header of the next member into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.size > _LONGEST_NAMES and found.type in _OF_THE_NEXT):
            raise tarfile.ReadError(f"a header says {found.size:,} bytes")
        return found


class Tar(Source):
    """Images in a tar archive; an index of their byte offsets is built when the archive is opened.

    Raises: InputError if the archive is damaged, compressed or holds no images.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path, self._identity = path, identity_of(path)
        suffixes = image_suffixes()
        names, spans, classes = list[str](), list[tuple[int, int]](), dict[str, str]()
        self._pieces: dict[int, list[tuple[int, int]]] = {}  # sparse members
        others: Counter[str] = Counter()
        try:
            with tarfile.open(path, "r:", tarinfo=_Member) as archive:
                last = -1
                for member in archive:
                    if member.offset <= last:  # some versions of Python would loop forever
                        raise tarfile.ReadError(f"the member after '{one_line(member.name)}' lies before it")
                    last = member.offset
                    stem, suffix = os.path.splitext(member.name)
                    if not member.isfile() or os.path.basename(stem).startswith("."):
                        continue
                    if suffix.lower() in suffixes:
                        if sparse := cast("list[tuple[int, int]] | None", member.sparse):
                            self._pieces[len(names)] = [(int(start), int(length)) for start, length in sparse]
                        names.append(member.name)
                        spans.append((member.offset_data, min(member.size, 2**62)))  # `image` refuses such sizes
                    elif suffix == ".cls" and (text := archive.extractfile(member)):
                        classes[stem] = text.read(1 << 10).decode("utf-8-sig", "replace").strip()
                    else:
                        others[suffix.lower()] += 1
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep a kilobyte per member
        except OSError as error:
            raise InputError(f"cannot read '{path}' ({error.strerror}); check the disk and its permissions") from None
        except Exception as error:  # tarfile raises any exception for damaged archives, even RecursionError
            raise InputError(
                f"'{path}' is damaged or no uncompressed tar archive ({error}); copy it again, or decompress it"
            ) from None
        if not names:
            raise InputError(f"no images in '{path}'; give an archive that holds images")
        tell_left_out(str(path), others)
        stems = [os.path.splitext(name)[0] for name in names]
        self.labels = [classes[s] for s in stems] if all(s in classes for s in stems) else folder_labels(names)
        self._names, self._spans = Names(names), np.array(spans, np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def key(self, index: int) -> str:
        """The name "ARCHIVE.tar#MEMBER"."""
        return f"{self.name}#{self._names[index]}"

    def identity(self, index: int) -> str | None:
        """The identity of the archive, since rewriting an archive may keep the times of its members."""
        return self._identity

    def image(self, index: int) -> bytes:
        """The bytes of an image, not decoded.

        Raises: ImageError if the member is damaged or larger than an image file may be.
        """
        offset, size = (int(v) for v in self._spans[index])
        if not 0 <= size <= MAX_BYTES:
            raise ImageError(f"'{self.key(index)}' has {size:,} bytes, too many for an image; leave it out")
        try:
            with open(self._path, "rb") as stream:
                stream.seek(offset)
                if (pieces := self._pieces.get(index)) is None:
                    return stream.read(size)
                content = bytearray(size)
                for start, length in pieces:
                    if not 0 <= start <= start + length <= size:
                        raise ImageError(f"'{self.key(index)}' is damaged; pack the archive again without --sparse")
                    content[start : start + length] = stream.read(length)
                return bytes(content)
        except OSError as error:
            raise ImageError(f"cannot read '{self.key(index)}': {error.strerror}; check the path") from None


def pyarrow(what: str) -> Any:
    """Import pyarrow with its Parquet module; `what` needs it.

    Raises: UnsupportedError if pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError(f"{what} needs pyarrow; pip install 'dinov3-infer[parquet]'") from None
    return pyarrow


class Table(Source):
    """A Parquet column of images: bytes or {"bytes": ..., "path": ...}, named image, img, jpg or png, or the only one.

    Raises: InputError if the file is damaged, holds no images or has implausibly large row groups.
    """

    def __init__(self, path: Path) -> None:
        self.name, self._identity = str(path), identity_of(path)
        self._arrow, self._column, self._repeated = pyarrow(f"'{path}'"), "", list[str]()
        self._rows: OrderedDict[int, Any] = OrderedDict()  # row group -> its rows
        self._lock = threading.Lock()
        arrow = self._arrow
        try:
            schema, metadata = self._file.schema_arrow, self._file.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            held = ", ".join(schema.names)  # may fail to decode as UTF-8
        except Exception:  # pyarrow raises any exception for damaged files, even UnicodeDecodeError
            raise InputError(f"'{path}' is damaged or no Parquet file; copy it again") from None
        sizes = [group.num_rows for group in groups]
        most = max(MAX_BYTES, _PACKED * path.stat().st_size)  # images hardly compress further
        for group in groups:
            if group.total_byte_size > most or not 0 <= group.num_rows <= _MOST_ROWS:
                raise InputError(
                    f"a row group of '{path}' unpacks to {group.total_byte_size:,} bytes in {group.num_rows:,} rows, "
                    "too many for images; write the table again with fewer rows per group"
                )
        self._ends = list(accumulate(sizes))
        columns = [field.name for field in schema if _holds_images(arrow, field.type)]
        known = [name for name in COLUMNS if name in columns] or columns
        if not known or not metadata.num_rows:
            raise InputError(f"no images in '{path}' (columns: {held}); give a table with a column 'image'")
        self._column = known[0]
        nested = self._arrow.types.is_struct(schema.field(self._column).type)
        self._repeated = [f"{self._column}.bytes" if nested else self._column]
        del self._file

    @cached_property
    def _file(self) -> Any:
        """The open file; an image repeated in many rows is kept in memory once."""
        return self._arrow.parquet.ParquetFile(self.name, memory_map=True, read_dictionary=self._repeated)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_file", "_rows", "_lock", "_arrow")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | dict(_rows=OrderedDict(), _lock=threading.Lock(), _arrow=pyarrow(f"'{state['name']}'"))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """The name "TABLE.parquet#ROW"."""
        return f"{self.name}#{index}"

    def identity(self, index: int) -> str | None:
        """The identity of the file."""
        return self._identity

    def image(self, index: int) -> ImageLike:
        """The image in a row, not decoded.

        Raises: ImageError if the row is damaged or holds no bytes.
        """
        group = bisect_right(self._ends, index)
        with self._lock:
            if group not in self._rows:
                try:
                    column = self._file.read_row_group(group, columns=[self._column]).column(0)
                except Exception:  # as above, even MemoryError from a damaged size
                    raise self._damaged(index) from None
                self._rows[group] = column  # Arrow data, not yet Python objects
                while len(self._rows) > KEPT:
                    self._rows.popitem(last=False)
            rows = self._rows[group]
            back = self._ends[group] - index  # rows from the end of the group
            try:
                row = rows[len(rows) - back] if back <= len(rows) else None
                item, label = None if row is None else row.as_py(), self.label(index)
            except (self._arrow.ArrowException, IndexError, ValueError):  # damaged dictionary index or UTF-8
                raise self._damaged(index) from None
        if isinstance(item, Mapping) and item["bytes"] is None:  # paths are not followed: a table may come from anyone
            raise ImageError(
                f"{label} holds a path and no image bytes; leave it out, or give the files instead of the table"
            )
        return stored_picture(item, label)

    def _damaged(self, index: int) -> ImageError:
        return ImageError(f"cannot read row {index} of '{self.name}': it is damaged; copy it again")


def _holds_images(arrow: Any, kind: Any) -> bool:
    binary = (arrow.types.is_binary, arrow.types.is_large_binary)
    if arrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and any(test(kind.field("bytes").type) for test in binary)
    return any(test(kind) for test in binary)


class Dataset(Source):
    """A torch or Hugging Face Dataset whose items are images, (image, ...) or {"image": image, ...}.

    Items are fetched one at a time, and arrays are copied, since a Dataset may not be thread-safe and may reuse one
    array or one open file.
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
        """The name "DATASET#NUMBER", with the name of the dataset's class."""
        return f"{self.name}#{index}"

    def identity(self, index: int) -> str | None:
        """Hugging Face's fingerprint of the data and its transforms, plus the identity of the file that an item names.

        None for other datasets, which have no fingerprint.
        """
        found = getattr(self._dataset, "_fingerprint", None)
        if not isinstance(found, str):
            return None
        return f"{found} {identity_of(self._dataset[index][self._column]['path'])}" if self._names_files else found

    @cached_property
    def _names_files(self) -> bool:
        first = self._dataset[0].get(self._column) if len(self._dataset) else None
        return isinstance(first, Mapping) and first.get("bytes", b"") is None and isinstance(first.get("path"), str)

    def image(self, index: int) -> ImageLike:
        """The image of an item, copied if it is an array, not decoded if the dataset allows it.

        Raises: ImageError if the dataset cannot read the item or the item holds no image.
        """
        with self._lock:
            try:
                item = self._dataset[index]
            except OSError as error:  # Pillow's UnidentifiedImageError is one too
                reason = error.strerror or str(error).split("<")[0].strip()
                raise ImageError(f"cannot read item {index} of {self.name}: {reason}; check that item") from None
            if isinstance(item, Mapping):
                item = next((item[key] for key in (self._column, *COLUMNS) if key in item), item)
            elif isinstance(item, (tuple, list)) and item:
                item = item[0]
            return own(stored_picture(item, self.label(index)))

    def label(self, index: int) -> str:
        """The text "item NUMBER of DATASET"."""
        return f"item {index} of {self.name}"


def _undecoded(dataset: Any) -> tuple[Any, str]:
    """A Hugging Face dataset that gives encoded bytes, so that one damaged image costs one item; others unchanged."""
    features: Any = getattr(dataset, "features", None)
    columns = (
        [n for n, kind in features.items() if type(kind).__name__ == "Image"] if isinstance(features, dict) else []
    )
    if not columns or not hasattr(dataset, "cast_column"):
        return dataset, COLUMNS[0]
    column = next((name for name in COLUMNS if name in columns), columns[0])
    return dataset.select_columns([column]).cast_column(column, type(features[column])(decode=False)), column


def streamed(dataset: Any) -> Iterator[ImageLike]:
    """The images of a Hugging Face dataset without a length."""
    rows, column = _undecoded(dataset)
    for row in rows:
        item = row[column]
        yield item["bytes"] or item["path"] or b"" if isinstance(item, Mapping) else item


def stored_picture(item: Any, label: str) -> ImageLike:
    """Unpack Hugging Face's {"bytes": ..., "path": ...}, where either value may be None; other items are unchanged.

    Raises: ImageError if the item is None.
    """
    if isinstance(item, Mapping) and set(item) == {"bytes", "path"}:
        item = item["bytes"] if item["bytes"] is not None else item["path"]
    if item is None:
        raise ImageError(f"{label} holds no image; leave it out")
    return item  # type: ignore[no-any-return]
