"""Where images are, and which files are images: folders, patterns, lists, addresses."""

import base64
import glob
import hashlib
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import Image

from .. import web
from ..errors import Dinov3Error, ImageError, InputError, MissingFileError
from ..system import unmarked

__all__ = [
    "FORMATS",
    "address_scheme",
    "fetched",
    "fixed_part",
    "identity_of",
    "image_suffixes",
    "is_collection",
    "list_images",
    "name_of",
    "read_labelled_list",
    "read_list",
    "tell_left_out",
    "walk",
]

log = logging.getLogger("dinov3_infer")

# Supported formats and their suffixes.  This table is ours because Pillow's own loads every plugin of Pillow; only the
# first five formats load without that.  HEIF and JXL need a plugin (see `foreign`), which may add suffixes.  Other
# formats of Pillow are left out: EPS runs a program, FITS decompresses without a limit, most others are rarely tested.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
}
MAX_BYTES, MAX_SECONDS = 2**27, 60  # limits of one download


def image_suffixes() -> tuple[str, ...]:
    """Suffixes of image files, in lower case."""
    plugged = (suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS)
    return tuple(dict.fromkeys((*chain.from_iterable(FORMATS.values()), *plugged)))


def list_images(source: str | os.PathLike[str]) -> list[str]:
    """List all images under a folder, or all files that match a pattern.

    Folders are searched recursively by suffix (`image_suffixes`).  Hidden files and folders are skipped, see `walk`,
    and the log counts the other files that were left out.

    Args:
        source: A folder, or a pattern such as "photos/**/*.jpg".

    Returns: The paths, sorted.

    Raises:
        MissingFileError: Nothing is there.
        InputError: The folder holds no image.

    Example:
        >>> list_images("photos")
        ['photos/cat.jpg', 'photos/dog.jpg']
    """
    path = os.fsdecode(source)
    if not os.path.isdir(path):
        found = sorted({name for name in _fitting(path) if os.path.isfile(name)})
        if not found:
            raise MissingFileError(f"no folder and no file at '{os.path.abspath(path)}'; check the path or pattern")
        return found
    suffixes = image_suffixes()
    files = list(walk(path))
    images = sorted(name for name in files if name.lower().endswith(suffixes))
    kinds = Counter(os.path.splitext(name)[1].lower() for name in files if not name.lower().endswith(suffixes))
    if not images:
        held = _counted(kinds) or "no files"
        raise InputError(
            f"no images under '{path}' (looked for {' '.join(suffixes)}; {len(files)} other files), which holds "
            f"{held}; give a folder of images, or its tar files"
        )
    tell_left_out(path, kinds)
    return images


def tell_left_out(where: str, kinds: "Counter[str]") -> None:
    """Log a warning about files of a folder or an archive whose names are not image names."""
    if kinds:
        log.warning("left out of '%s': %d other files (%s)", where, kinds.total(), _counted(kinds))


def _counted(kinds: "Counter[str]") -> str:
    shown = ", ".join(f"{count} {kind or 'without suffix'}" for kind, count in kinds.most_common(3))
    return shown + (", ..." if len(kinds) > 3 else "")


def fixed_part(source: str | os.PathLike[str]) -> str:
    """Absolute path of a folder, or of the part of a pattern before its first wildcard."""
    fixed = os.fsdecode(source)
    while not os.path.isdir(fixed) and glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return os.path.abspath(fixed)


def _fitting(pattern: str) -> Iterator[str]:
    """Files that match a pattern; `**` matches the folders that `walk` enters, as glob follows link loops forever."""
    parts = (pattern.replace(os.altsep, os.sep) if os.altsep else pattern).split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    rest = [part for part in parts[at + 1 :] if part] or ["*"]
    for top in glob.iglob(os.sep.join([*parts[:at], ""])) if at else [""]:
        for folder, _ in _walk(top or os.curdir):
            found = folder if top else folder[2:]  # cut "./"
            yield from _fitting(os.path.join(glob.escape(found), *rest))


def walk(folder: str) -> Iterator[str]:
    """Yield the files under a folder, recursively, without hidden ones.

    Links to folders are followed after all real folders, and each folder is entered once.  So loops end, no file comes
    twice under another name, and the result does not depend on the order of the disk.
    """
    return (os.path.join(where, name) for where, files in _walk(folder) for name in files)


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its files."""
    entered: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        links: list[str] = []
        for top in waiting:
            for where, folders, files in os.walk(top):
                identity = _identity(where)
                if identity is None or identity in entered:
                    folders.clear()
                    continue
                entered.add(identity)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                links += (path for name in folders if os.path.islink(path := os.path.join(where, name)))
                yield where, [name for name in files if not name.startswith(".")]
        waiting = links


def _identity(folder: str) -> tuple[int, int] | None:
    """Device and inode of a folder; None if it has just been removed."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def read_list(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a list file, or its zero-separated entries if it holds zero bytes; "-" is stdin.

    Raises: MissingFileError, or InputError if the list is empty or no text.
    """
    return _read_list(path)[0]


def read_labelled_list(path: str | os.PathLike[str]) -> tuple[list[str], list[str] | None]:
    """Read the paths of a list file, and its labels if every line has a tab and a label.

    Raises: As in `read_list`.
    """
    lines, by_line = _read_list(path)
    if not by_line:
        return lines, None
    pairs = [line.split("\t") for line in lines]
    labels = [pair[1].strip() for pair in pairs] if all(len(pair) > 1 for pair in pairs) else None
    return [pair[0].strip() for pair in pairs], labels


def _read_list(path: str | os.PathLike[str]) -> tuple[list[str], bool]:
    try:
        if os.fspath(path) == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as stream:
                content = stream.read()
    except OSError as error:
        raise MissingFileError(f"the list '{path}' cannot be read ({error.strerror}); check the path") from None
    try:
        content = unmarked(content)
    except ValueError as error:
        raise InputError(f"the list '{path}' is no text ({error}); save it as UTF-8") from None
    by_line = b"\0" not in content
    lines = content.splitlines() if by_line else content.split(b"\0")
    found = [os.fsdecode(line) for line in lines if line.strip()]
    if not found:
        raise InputError(f"the list '{path}' is empty; give one path per line")
    return found, by_line


def is_collection(source: object) -> bool:
    """Whether this is a folder, or a pattern that is not itself the name of a file."""
    if not isinstance(source, (str, os.PathLike)) or address_scheme(path := os.fsdecode(source)):
        return False
    return os.path.isdir(path) or (glob.has_magic(path) and not os.path.exists(path))


def address_scheme(path: str) -> str:
    """The scheme of an address (http, https, file, data, ...) in lower case; empty for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://|(https?)(?=:/)|(data):", path)  # Path turns // into /
    return next(filter(None, found.groups())).lower() if found else ""


def name_of(source: object) -> str | None:
    """The path of an image, or its address without query and password; None for an image given as an object."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = os.fsdecode(source)
    scheme = address_scheme(path)
    if scheme == "data":
        return "data:..."
    if not scheme:
        return path
    try:
        parts = urlsplit(path)
        host, _ = parts.hostname, parts.port
    except ValueError:  # perhaps half of a password with an unescaped "/" or "?"
        host = None
    if not host and scheme != "file":
        return f"{scheme}://..."
    return re.sub(r"(?<=:/)(/?)[^/?#]*@|[?#].*", r"\1", path, flags=re.DOTALL)


def identity_of(source: object) -> str | None:
    """A text that changes when a file changes: its size and modification time.

    For an address it is a hash of the address without its password, for a data address a hash of the content.  It is
    None for an object, and "" for a file that cannot be examined.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = os.fsdecode(source)
    scheme = address_scheme(path)
    if scheme not in ("", "file"):
        whole = path if scheme == "data" else re.sub(r"(?<=://)[^/?#]*@", "", path)
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    try:
        found = os.stat(url2pathname(urlsplit(path).path) if scheme else path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}"


def fetched(source: str) -> str | bytes:
    """Resolve a source: a path unchanged, a file address as its path, an http, https or data address as its content.

    Downloads use the session of huggingface_hub with its proxies and certificates, without its token.

    Raises: InputError for a file address that is no path or a link of another scheme; MissingFileError; ImageError if a
    download fails or is too large.
    """
    scheme = address_scheme(source)
    if not scheme:
        return source
    if scheme == "file":
        try:
            return url2pathname(urlsplit(source).path)
        except ValueError:
            raise InputError("'file://...' is no address of a file; give its path") from None
    if scheme == "data":
        head, _, body = source.partition(",")
        try:
            return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
        except ValueError:
            raise ImageError(f"a data: address of {len(source)} characters is no base64; encode it again") from None
    shown, content, started = web.without_query(source), bytearray(), time.monotonic()
    try:
        with web.queries_cut(), web.get(source, seconds=MAX_SECONDS) as (response, chunks):
            if response.status_code in (404, 410):
                raise MissingFileError(f"no image at '{shown}' (HTTP {response.status_code}); check the address")
            if response.status_code >= 400:
                raise ImageError(
                    f"cannot download '{shown}' (HTTP {response.status_code}); download it another way, and give the "
                    "file"
                )
            for chunk in chunks:
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ImageError(f"'{shown}' is larger than {MAX_BYTES >> 20} MiB; download it, and give the file")
                if time.monotonic() - started > MAX_SECONDS:
                    raise TimeoutError
    except Dinov3Error:
        raise
    except web.client_errors() as error:
        if time.monotonic() - started > MAX_SECONDS:
            raise ImageError(f"'{shown}' took longer than {MAX_SECONDS} s; download it, and give the file") from None
        raise ImageError(
            f"cannot download '{shown}' ({web.reason(error)}); check the address, or give a file"
        ) from None
    return bytes(content)
