"""Downloads weights from a link, once and atomically; never stores or shows the signature of a link."""

import base64
import binascii
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from ..checkpoints.reading import SUFFIXES, kind_of
from ..errors import (
    CheckpointError,
    Dinov3Error,
    DiskError,
    GatedModelError,
    InputError,
    ModelNotFoundError,
    OfflineError,
)
from ..system import whole
from ..web import client_error, client_errors, client_tools, get, queries_cut, reason, without_query

__all__ = ["download"]

_TRIES, _PAUSE_S = 4, 1.0
MAX_BYTES = 2**36  # size limit of a file: twice the largest model in float32
_HEAD = 64  # bytes that show the kind of a file
_SPARE = 2**30  # bytes of the disk that a file of unstated size must leave free


def download(
    link: str,
    *,
    cache_dir: str | os.PathLike[str] | None,
    not_asked: str | None,
    check: Callable[[Path], None],
) -> tuple[Path, bool]:
    """Download the file behind a link into the assets of huggingface_hub's cache.

    The link without its query identifies the file, so that a newly signed link finds an earlier download.

    Args:
        link: An http or https link to a weights file.
        cache_dir: The cache (default: that of huggingface_hub).
        not_asked: Why nothing may be downloaded; None if it may.
        check: Raises for a file that must not be kept.

    Returns: The path, and whether the file was downloaded now.

    Raises:
        InputError: The link is not valid.
        GatedModelError: The server refuses access.
        ModelNotFoundError: The server has no such file.
        OfflineError: The download failed or is not allowed.
        CheckpointError: The file is no checkpoint.
        DiskError: The disk has no room.
    """
    from huggingface_hub import cached_assets_path

    link = link.strip()
    shown = without_query(link)
    name = PurePosixPath(unquote(urlsplit(shown).path)).name
    if PurePosixPath(name).suffix not in SUFFIXES:
        raise InputError(
            f"a link should end in the name of a weights file ({', '.join(SUFFIXES)}), and '{shown}' does not; "
            "download the file, and give its path"
        )
    key = hashlib.sha256(shown.encode()).hexdigest()[:16]
    try:
        folder = cached_assets_path(
            "dinov3_infer", "links", key, assets_dir=None if cache_dir is None else Path(cache_dir)
        )
        target = folder / name
        if target.is_file():
            return target, False
        if not_asked:
            raise OfflineError(
                f"'{shown}' is not in the cache '{folder}', and its host was not contacted ({not_asked}); download "
                "it where that is allowed, or give the path of the file"
            )
        with client_tools().WeakFileLock(folder / ".lock"):  # only one of several processes downloads
            if target.is_file():
                return target, False
            with whole(target) as beside:
                with queries_cut(), open(beside, "wb") as file:
                    _receive(link, shown, file, name)
                check(beside)
        return target, True
    except Dinov3Error:
        raise
    except client_errors() as error:
        raise OfflineError(
            f"download of '{shown}' failed ({reason(error)}); try again, or give the path of the file"
        ) from None


def _receive(link: str, shown: str, file: BinaryIO, name: str) -> None:
    """Write the whole file; after a broken connection continue from there, unless nothing arrives any more."""
    total: int | None = None
    version: str | None = None
    done, without_progress, answered, head = 0, 0, False, b""
    with client_tools().tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:  # shown on a terminal only
        while True:
            before = done
            problem = "the connection ended early"
            try:
                with get(link, done, version) as (response, chunks):
                    _check(response, link, shown)
                    answered = True
                    if done and response.status_code != 206:  # the server starts again
                        done = 0
                        file.seek(0)
                        file.truncate()
                    length = response.headers.get("Content-Length")
                    total = done + int(length) if length else total
                    version = response.headers.get("ETag")
                    bar.total, bar.n = total, done
                    if total is not None:
                        _check_room(total, total - done, file, shown)
                    for chunk in chunks:
                        if total is None and done < _HEAD <= done + len(chunk):  # the body may be endless noise
                            kind_of((head + chunk)[:_HEAD], MAX_BYTES, shown)
                        head = (head + chunk[:_HEAD])[:_HEAD] if done else chunk[:_HEAD]
                        file.write(chunk)
                        done += len(chunk)
                        if total is None or done > total:
                            _check_room(done, _SPARE, file, shown)
                        bar.update(len(chunk))
                if total is None or done == total:
                    return
            except client_error() as error:
                if not answered:  # waiting would not help
                    raise
                problem = reason(error)
            without_progress = 0 if done > before else without_progress + 1
            if without_progress == _TRIES or (total is not None and done > total):
                raise OfflineError(
                    f"download of '{shown}' stopped at {done:,} of {total or 0:,} bytes ({problem}); try again"
                )
            time.sleep(_PAUSE_S)


def _check_room(size: int, more: int, file: BinaryIO, shown: str) -> None:
    """Refuse a file larger than any model or than the disk; a file of unstated size must leave 1 GiB free.

    Raises: CheckpointError, DiskError.
    """
    if size > MAX_BYTES:
        raise CheckpointError(f"'{shown}' has more than {MAX_BYTES >> 30} GiB, more than any model; check the link")
    folder = os.path.dirname(file.name)
    free = shutil.disk_usage(folder).free
    if free < more:
        raise DiskError(
            f"'{shown}' needs {more >> 20:,} MiB more on the disk of '{folder}', which has {free >> 20:,} MiB free; "
            "make room, or give another cache_dir"
        )


def _check(response: Any, link: str, shown: str) -> None:
    """Refuse a response that is not the file.

    Raises: GatedModelError, ModelNotFoundError, OfflineError, CheckpointError.
    """
    status = response.status_code
    if status in (400, 401, 403):
        query = urlsplit(link).query
        ended = _expiry(query)
        if not query:
            advice = "log in with a browser, download the file there, and give its path"
        elif ended is not None and ended < datetime.now(UTC):
            advice = f"the link expired on {ended:%Y-%m-%d at %H:%M} UTC, so ask for a new one"
        else:
            advice = "signed links expire, so ask for a new one, and give the whole link in quotes"
        raise GatedModelError(f"download of '{shown}' was refused (HTTP {status}); {advice}")
    if status in (404, 410):
        raise ModelNotFoundError(f"there is nothing at '{shown}' (HTTP {status}); check the link")
    if status >= 400:
        raise OfflineError(f"download of '{shown}' failed (HTTP {status}); try again, or give the path of the file")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise CheckpointError(
            f"'{shown}' leads to a web page, not to a weights file; open it in a browser, log in if asked, download "
            "the file, and give its path"
        )


def _expiry(query: str) -> datetime | None:
    """When a signed link expires: CloudFront's Expires or Policy, S3's X-Amz-Date and X-Amz-Expires."""
    fields = {name: values[0] for name, values in parse_qs(query).items()}
    try:
        if "Policy" in fields:
            policy = base64.b64decode(fields["Policy"].translate(str.maketrans("-_~", "+=/")))
            found = re.search(rb'"AWS:EpochTime":\s*(\d+)', policy)
            return datetime.fromtimestamp(int(found[1]), UTC) if found else None
        if "X-Amz-Date" in fields:
            signed = datetime.strptime(fields["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            return datetime.fromtimestamp(signed.timestamp() + int(fields["X-Amz-Expires"]), UTC)
        return datetime.fromtimestamp(int(fields["Expires"]), UTC) if "Expires" in fields else None
    except (ValueError, KeyError, OverflowError, OSError, binascii.Error):
        return None
