"""Weights behind a link: downloaded once, whole or not at all; what signs a link is neither kept nor shown."""

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
MAX_BYTES = 2**36  # of a file: twice those of the largest model in float32
_HEAD = 64  # bytes that tell what a file is
_SPARE = 2**30  # of a disk, which a file without a stated size does not take


def download(
    link: str,
    *,
    cache_dir: str | os.PathLike[str] | None,
    not_asked: str | None,
    check: Callable[[Path], None],
) -> tuple[Path, bool]:
    """The file that a link leads to, in the assets of huggingface_hub's cache, and whether it is new there.

    Files are known by their link without its query, so that a link signed anew finds what an older one brought.
    `not_asked` is why nothing may be downloaded, None if it may.  `check` raises for a file that is not to be kept.

    Raises: InputError, GatedModelError where access is refused, ModelNotFoundError, OfflineError, CheckpointError,
    DiskError.
    """
    from huggingface_hub import cached_assets_path

    link = link.strip()
    shown = without_query(link)
    name = PurePosixPath(unquote(urlsplit(shown).path)).name
    if PurePosixPath(name).suffix not in SUFFIXES:
        raise InputError(
            f"a link should lead to a weights file ({', '.join(SUFFIXES)}), and '{shown}' does not; "
            "download what you need, and give its path"
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
                f"'{shown}' is not in the cache '{folder}', and its host was not asked ({not_asked}); "
                "download it where that is allowed, or give the path of the file"
            )
        with client_tools().WeakFileLock(folder / ".lock"):  # of several processes one downloads
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
    """Writes the whole file; where a connection breaks it goes on from there, unless nothing comes any more."""
    total: int | None = None
    version: str | None = None
    done, without_progress, answered, head = 0, 0, False, b""
    with client_tools().tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:  # on a terminal only
        while True:
            before = done
            problem = "the connection ended early"
            try:
                with get(link, done, version) as (response, chunks):
                    _check(response, link, shown)
                    answered = True
                    if done and response.status_code != 206:  # from the start again
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
                        if total is None and done < _HEAD <= done + len(chunk):  # it may be noise without an end
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
                if not answered:  # no use in waiting
                    raise
                problem = reason(error)
            without_progress = 0 if done > before else without_progress + 1
            if without_progress == _TRIES or (total is not None and done > total):
                raise OfflineError(
                    f"download of '{shown}' stopped at {done:,} of {total or 0:,} bytes ({problem}); try again"
                )
            time.sleep(_PAUSE_S)


def _check_room(size: int, more: int, file: BinaryIO, shown: str) -> None:
    """Raises for a file larger than any model, or than the disk; one without a stated size leaves 1 GiB free."""
    if size > MAX_BYTES:
        raise CheckpointError(f"'{shown}' has more than {MAX_BYTES >> 30} GiB, which no model has; check the link")
    folder = os.path.dirname(file.name)
    free = shutil.disk_usage(folder).free
    if free < more:
        raise DiskError(
            f"'{shown}' needs {more >> 20:,} MiB more on the disk of '{folder}', where {free >> 20:,} are free; make "
            "room, or give another cache_dir"
        )


def _check(response: Any, link: str, shown: str) -> None:
    """Raises for an answer that is not the file."""
    status = response.status_code
    if status in (400, 401, 403):
        query = urlsplit(link).query
        ended = _expiry(query)
        if not query:
            advice = "log in with a browser, download it there, and give the path of the file"
        elif ended is not None and ended < datetime.now(UTC):
            advice = f"the link expired on {ended:%Y-%m-%d at %H:%M} UTC, so ask for a new one"
        else:
            advice = "signed links expire, so ask for a new one, and give the whole of it, in quotes"
        raise GatedModelError(f"download of '{shown}' was refused (HTTP {status}); {advice}")
    if status in (404, 410):
        raise ModelNotFoundError(f"there is nothing at '{shown}' (HTTP {status}); check the link")
    if status >= 400:
        raise OfflineError(f"download of '{shown}' failed (HTTP {status}); try again, or give the path of the file")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise CheckpointError(
            f"'{shown}' leads to a web page, not to a weights file; open it in a browser, where it may ask to log in, "
            "and give the path of what you download there"
        )


def _expiry(query: str) -> datetime | None:
    """When a signed link ends: CloudFront's Expires or Policy, S3's X-Amz-Date and X-Amz-Expires."""
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
