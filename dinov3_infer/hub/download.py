"""Weights behind a link: downloaded once, whole or not at all; what signs a link is neither kept nor shown."""

import base64
import binascii
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from ..checkpoints.reading import SUFFIXES
from ..errors import CheckpointError, Dinov3Error, GatedModelError, InputError, ModelNotFoundError, OfflineError
from ..system import whole

__all__ = ["client_error", "download", "get", "is_link", "queries_cut", "reach", "reason", "sha256", "without_query"]

_TRIES, _PAUSE_S, _TIMEOUT_S, _PATIENCE_S = 4, 1.0, 30.0, 10.0
_CHUNK = 1 << 16
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3")  # whatever its version uses


def is_link(text: str | os.PathLike[str]) -> bool:
    """Also one that was pasted with white space, or made a path."""
    return re.match(r"\s*(https?:/|[A-Za-z][A-Za-z0-9+.-]+://)", os.fspath(text)) is not None


def without_query(link: str) -> str:
    """A link without what signs it: no query, no user and password, no white space around it.

    Raises: InputError for what is no http link.
    """
    link = link.strip()
    try:
        parts = urlsplit(link)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x20\x7f]", link):
        raise InputError(
            f"'{link.partition(':')[0]}://...' is no link that can be downloaded here, as http://host/file and "
            "https://host/file are; fetch the file, and give its path"
        )
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}{f':{port}' if port else ''}{parts.path}"


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

    Raises: InputError, GatedModelError where access is refused, ModelNotFoundError, OfflineError, CheckpointError.
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
        with _tools().WeakFileLock(folder / ".lock"):  # of several processes one downloads
            if target.is_file():
                return target, False
            with whole(target) as beside:
                with queries_cut(), open(beside, "wb") as file:
                    _receive(link, shown, file, name)
                check(beside)
        return target, True
    except Dinov3Error:
        raise
    except (OSError, client_error(), ValueError) as error:  # ValueError: a host that no client can write
        raise OfflineError(
            f"download of '{shown}' failed ({reason(error)}); try again, or give the path of the file"
        ) from None


def _tools() -> Any:
    """huggingface_hub.utils; not every version of it declares to type checkers what it exports."""
    return import_module("huggingface_hub.utils")


def _receive(link: str, shown: str, file: BinaryIO, name: str) -> None:
    """Writes the whole file; where a connection breaks it goes on from there, unless nothing comes any more."""
    total: int | None = None
    version: str | None = None
    done, without_progress, answered = 0, 0, False
    with _tools().tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:  # on a terminal only
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
                    for chunk in chunks:
                        file.write(chunk)
                        done += len(chunk)
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


@contextmanager
def get(link: str, start: int = 0, version: str | None = None) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """An answer and its body, from byte `start` on if the file is still that `version`, else the whole.

    The session is that of huggingface_hub, so that its proxies and certificates count.
    """
    session = _tools().get_session()
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    if start and version and not version.startswith("W/"):
        headers["If-Range"] = version
    if callable(session.stream):  # httpx; for requests, in huggingface_hub 0.x, this is a setting
        with session.stream("GET", link, headers=headers, timeout=_TIMEOUT_S) as response:
            yield response, response.iter_bytes()
    else:
        with session.get(link, headers=headers, timeout=_TIMEOUT_S, stream=True) as response:
            yield response, response.iter_content(_CHUNK)


def reach(link: str) -> None:
    """One question without patience: huggingface_hub goes on asking for half a minute where there is no network.

    Any answer will do.  Raises what the HTTP client raises.
    """
    session = _tools().get_session()
    here = {"follow_redirects": False} if callable(session.stream) else {"allow_redirects": False}
    session.head(link, timeout=_PATIENCE_S, **here)


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


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def client_error() -> type[Exception]:
    """The base of what the HTTP client raises: that of requests, httpx or httpx2, by version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    order = HfHubHTTPError.__mro__
    return order[order.index(OSError) - 1]


def reason(error: BaseException) -> str:
    """What went wrong, in a word or two; never the text of the error, which may hold a link."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"HTTP {status}"
    return getattr(error, "strerror", None) or type(error).__name__


@contextmanager
def queries_cut() -> Iterator[None]:
    """While this lasts, no query of a link gets into the log of huggingface_hub or of its HTTP client."""
    _tools().get_session()  # the loggers are there once the client is
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _CLIENTS]
    loggers, cut = [logging.getLogger(name) for name in names], _Cut()
    for logger in loggers:
        logger.addFilter(cut)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(cut)


class _Cut(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?[^\s'\"]+", "", record.getMessage()), None
        return True
