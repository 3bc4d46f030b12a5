"""The HTTP session for all downloads; keeps queries, users and passwords of links out of messages."""

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
_CHUNK = 1 << 16  # bytes that must arrive within _TIMEOUT_S
_REDIRECTS, _MOVED = 10, (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3")  # HTTP clients of its versions


def is_link(text: str | os.PathLike[str]) -> bool:
    """Whether a text is a link, even with white space around it or after conversion to a Path."""
    return re.match(r"\s*(https?:/|[A-Za-z][A-Za-z0-9+.-]+://)", os.fspath(text)) is not None


def without_query(link: str) -> str:
    """Strip a link of its query, user, password and surrounding white space.

    Raises: InputError if it is no http or https link.
    """
    link = link.strip()
    try:
        parts = urlsplit(link)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x20\x7f]", link):
        raise InputError(
            f"'{link.partition(':')[0]}://...' is no http or https link; download the file another way, and give its "
            "path"
        )
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}{f':{port}' if port else ''}{parts.path}"


@contextmanager
def get(
    link: str, start: int = 0, version: str | None = None, seconds: float | None = None
) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Request a link, and yield the response and its body.

    The session is that of huggingface_hub, with its proxies and certificates.  At most 10 redirects are followed, also
    to other hosts, since most file services need that.  A server that fetches links of its users could be sent to
    internal hosts that way: the environment variable DINOV3_INFER_REDIRECTS=same-host refuses redirects to another host
    or port.

    Args:
        link: The link.
        start: First byte to request.
        version: ETag of the file that `start` refers to; if the file has changed, the whole file is sent.
        seconds: Limit for the whole request.  Without it the response must begin within 30 s, and each 64 KiB of the
            body must arrive within 30 s.

    Raises:
        InputError: A link or redirect is not valid or not allowed.
        Exception: One of `client_errors`.
    """
    session, clock = client_tools().get_session(), _Clock(seconds or _TIMEOUT_S)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    if start and version and not version.startswith("W/"):
        headers["If-Range"] = version
    limits = (clock, clock, _TIMEOUT_S, _TIMEOUT_S)  # connect, read, write, pool
    place = _written(link)
    for _ in range(_REDIRECTS + 1):
        with session.stream("GET", place, headers=headers, timeout=limits, follow_redirects=False) as response:
            target = response.headers.get("Location") if response.status_code in _MOVED else None
            if target is None:
                yield response, _in_time(response.iter_bytes(), clock, restarts=seconds is None)
                return
            place = _next(place, target, link)
    raise InputError(f"'{without_query(link)}' redirects more than {_REDIRECTS} times; give the final address")


class _Clock:
    """The remaining seconds, computed at each wait of the client, so that a trickle of bytes gains no time."""

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
    """Percent-encode the bytes of a link after its host that are not ASCII, so that a client can send it."""
    link = link.strip()
    without_query(link)
    head, slash, rest = link.partition("://")[2].partition("/")
    return f"{link.partition('://')[0].lower()}://{head}{slash}{quote(os.fsencode(rest), safe=_SAFE)}"


_SAFE = "".join(map(chr, range(33, 127)))  # printable ASCII stays, "%" too


def _next(place: str, target: str, link: str) -> str:
    """Target of a redirect."""
    found = _written(urljoin(place, target))
    before, after = (urlsplit(one) for one in (place, found))
    hosts, ports = {before.hostname, after.hostname}, {one.port or _PORTS[one.scheme] for one in (before, after)}
    same = len(hosts) == 1 and (len(ports) == 1 or ports == set(_PORTS.values()))
    if not same and os.environ.get("DINOV3_INFER_REDIRECTS") == "same-host":
        raise InputError(
            f"'{without_query(link)}' redirects to another host, which DINOV3_INFER_REDIRECTS=same-host refuses; give "
            "the address of the file itself"
        )
    return found


def reach(link: str) -> None:
    """Check that a server answers, with one HEAD request and a timeout of 10 s.

    huggingface_hub itself retries for half a minute without a network.

    Raises: Exception, one of `client_errors`.
    """
    client_tools().get_session().head(link, timeout=_PATIENCE_S, follow_redirects=False)


def client_error() -> type[Exception]:
    """Base class of the errors of the HTTP client: httpx or httpx2, by version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    order = HfHubHTTPError.__mro__
    return order[order.index(OSError) - 1]


def client_errors() -> tuple[type[Exception], ...]:
    """All exceptions of a request, including those for addresses that the client cannot send."""
    base = client_error()
    client = sys.modules[base.__module__.partition(".")[0]]
    return (base, OSError, ValueError, getattr(client, "InvalidURL", base))


def reason(error: BaseException) -> str:
    """Describe an error in a few words, without its text, which may hold a link."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"HTTP {status}"
    if isinstance(error, ValueError) or type(error).__name__ == "InvalidURL":
        return "the address is not valid"
    return getattr(error, "strerror", None) or type(error).__name__


@contextmanager
def queries_cut() -> Iterator[None]:
    """Keep queries, users and passwords of links out of the logs of huggingface_hub and its HTTP client."""
    client_tools().get_session()  # creates the client, and with it the loggers
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
    """The module huggingface_hub.utils; not every version declares its exports to type checkers."""
    return import_module("huggingface_hub.utils")
