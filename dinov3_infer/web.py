"""One HTTP session for everything that is fetched; no query, user or password of a link gets into a message."""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from .errors import InputError

__all__ = [
    "client_error",
    "client_errors",
    "client_tools",
    "get",
    "is_link",
    "queries_cut",
    "reach",
    "reason",
    "without_query",
]

_TIMEOUT_S, _PATIENCE_S = 30.0, 10.0
_CHUNK = 1 << 16  # bytes that come within _TIMEOUT_S, or the connection is given up
_REDIRECTS, _MOVED = 10, (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
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


@contextmanager
def get(
    link: str, start: int = 0, version: str | None = None, seconds: float | None = None
) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """An answer and its body, from byte `start` on if the file is still that `version`, else the whole.

    The session is that of huggingface_hub, so that its proxies and certificates count.  The answer begins within 30 s,
    and so does each 64 KiB of its body come; `seconds` is the limit for all of it together.  (With huggingface_hub 0.x,
    whose client is another, each single wait has these limits.)

    Redirects are followed, 10 at most, to other hosts too, as most services for files ask for that.  A server that
    fetches what its users send can be led to hosts that only it can see: DINOV3_INFER_REDIRECTS=same-host in its
    environment refuses every redirect to another host or port.

    Raises: InputError for a link that leads nowhere or where it may not, and `client_errors`.
    """
    session, clock = client_tools().get_session(), _Clock(seconds or _TIMEOUT_S)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    if start and version and not version.startswith("W/"):
        headers["If-Range"] = version
    modern = callable(session.stream)  # httpx; for requests, in huggingface_hub 0.x, this is a setting
    place = _written(link)
    for _ in range(_REDIRECTS + 1):
        if modern:
            limits = (clock, clock, _TIMEOUT_S, _TIMEOUT_S)  # to connect, to read, to write, for a free connection
            opened = session.stream("GET", place, headers=headers, timeout=limits, follow_redirects=False)
        else:
            opened = session.get(
                place, headers=headers, timeout=seconds or _TIMEOUT_S, stream=True, allow_redirects=False
            )
        with opened as response:
            target = response.headers.get("Location") if response.status_code in _MOVED else None
            if target is None:
                body = response.iter_bytes() if modern else response.iter_content(_CHUNK)
                yield response, _in_time(body, clock, restarts=seconds is None)
                return
            place = _next(place, target, link)
    raise InputError(f"'{without_query(link)}' leads on more than {_REDIRECTS} times; give the address that it ends at")


class _Clock:
    """The seconds that are left, asked for at each wait of the client: who sends a byte now and then gains no time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self.end = time.monotonic() + self.seconds

    def __index__(self) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return math.ceil(left)


def _in_time(chunks: Iterator[bytes], clock: _Clock, restarts: bool) -> Iterator[bytes]:
    came = _CHUNK
    for chunk in chunks:
        came += len(chunk)
        if restarts and came >= _CHUNK:
            clock.restart()
            came = 0
        yield chunk


def _written(link: str) -> str:
    """A link as a client can write it: bytes that are no ASCII, of whatever encoding, as %XX after the host."""
    link = link.strip()
    without_query(link)
    head, slash, rest = link.partition("://")[2].partition("/")
    return f"{link.partition('://')[0].lower()}://{head}{slash}{quote(os.fsencode(rest), safe=_SAFE)}"


_SAFE = "".join(map(chr, range(33, 127)))  # what is there stays, "%" too


def _next(place: str, target: str, link: str) -> str:
    """Where a redirect leads to."""
    found = _written(urljoin(place, target))
    before, after = (urlsplit(one) for one in (place, found))
    hosts, ports = {before.hostname, after.hostname}, {one.port or _PORTS[one.scheme] for one in (before, after)}
    same = len(hosts) == 1 and (len(ports) == 1 or ports == set(_PORTS.values()))
    if not same and os.environ.get("DINOV3_INFER_REDIRECTS") == "same-host":
        raise InputError(
            f"'{without_query(link)}' leads on to another host, which DINOV3_INFER_REDIRECTS=same-host refuses; give "
            "the address of the file itself"
        )
    return found


def reach(link: str) -> None:
    """One question without patience: huggingface_hub goes on asking for half a minute where there is no network.

    Any answer will do.  Raises what the HTTP client raises.
    """
    session = client_tools().get_session()
    here = {"follow_redirects": False} if callable(session.stream) else {"allow_redirects": False}
    session.head(link, timeout=_PATIENCE_S, **here)


def client_error() -> type[Exception]:
    """The base of what the HTTP client raises: that of requests, httpx or httpx2, by version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    order = HfHubHTTPError.__mro__
    return order[order.index(OSError) - 1]


def client_errors() -> tuple[type[Exception], ...]:
    """All that a request raises, for an address too that the client cannot write: a host or a length that cannot be."""
    base = client_error()
    client = sys.modules[base.__module__.partition(".")[0]]
    return (base, OSError, ValueError, getattr(client, "InvalidURL", base))


def reason(error: BaseException) -> str:
    """What went wrong, in a word or two; never the text of the error, which may hold a link."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"HTTP {status}"
    if isinstance(error, ValueError) or type(error).__name__ == "InvalidURL":
        return "no such address can be asked for"
    return getattr(error, "strerror", None) or type(error).__name__


@contextmanager
def queries_cut() -> Iterator[None]:
    """While this lasts, no query, user or password of a link gets into the log of huggingface_hub or of its client."""
    client_tools().get_session()  # the loggers are there once the client is
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
        text = re.sub(r"(?<=://)[^\s/?#'\"]*@|\?[^\s'\"]+", "", record.getMessage())
        record.msg, record.args = text, None
        return True


def client_tools() -> Any:
    """huggingface_hub.utils; not every version of it declares to type checkers what it exports."""
    return import_module("huggingface_hub.utils")
