"""One HTTP session for everything that is fetched; no query, user or password of a link gets into a message."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from .errors import InputError

__all__ = ["client_error", "client_tools", "get", "is_link", "queries_cut", "reach", "reason", "without_query"]

_TIMEOUT_S, _PATIENCE_S = 30.0, 10.0
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


@contextmanager
def get(link: str, start: int = 0, version: str | None = None) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """An answer and its body, from byte `start` on if the file is still that `version`, else the whole.

    The session is that of huggingface_hub, so that its proxies and certificates count.
    """
    session = client_tools().get_session()
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
    session = client_tools().get_session()
    here = {"follow_redirects": False} if callable(session.stream) else {"allow_redirects": False}
    session.head(link, timeout=_PATIENCE_S, **here)


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
        record.msg, record.args = re.sub(r"\?[^\s'\"]+", "", record.getMessage()), None
        return True


def client_tools() -> Any:
    """huggingface_hub.utils; not every version of it declares to type checkers what it exports."""
    return import_module("huggingface_hub.utils")
