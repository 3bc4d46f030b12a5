"""Odd addresses, and odd answers of a local server; no request leaves this machine."""

import random
import socket
import threading
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants

from dinov3_infer import Dinov3Error, load_image
from dinov3_infer.images import paths
from dinov3_infer.images.paths import address_scheme, name_of

from .pickles import rough
from .pictures import wholes

SECRET = "s3cr3t"
SCHEMES = ("http", "http", "http", "https", "HTTP", "ftp", "s3", "file", "data", "gopher", "hf", "h\u0442tp", "http+x")
USERS = ("", "", "", f"me:{SECRET}@", f"{SECRET}@", f":{SECRET}@", f"a:b:{SECRET}@", f"a@{SECRET}@", "@", ":@")
HOSTS = (
    "127.0.0.1", "localhost", "LOCALHOST", "[::1]", "256.1.1.1", "1.1.1", "0x7f.1", "127.1", "", ".", "..", "a..b", "-",
    "*", "%00", "%zz", "[", "]", "[::1", "[v1.x]", "[fe80::1%25eth0]", "[fe80::1%eth0]", "a" * 64, "a." * 200,
    "\u0430" * 300, "caf\u00e9", "xn--", "xn--\u00e9", "\u2100", "\u200d", "\udce9", "\ud800", "a\0b", "a b", "a\nb",
    "\u0661.0.0.1", "\uff11\uff12\uff17.0.0.1", "a_b", "$(x)", "'", '"', "<x>", "\\", "a\\b", "^", "|", "`", "{x}",
)  # fmt: skip
PORTS = ("", "", "", ":1", ":0", ":65535", ":65536", ":-1", ":", ":x", ":80:80", ":\u0663", ":1e3", ": 1", ":00001")
PIECES = (
    "x.png", "caf\u00e9.png", "caf\udce9.png", "\ud800", "%", "%zz", "%00", "%2F", "a b", "\0", "\r\nX: y", "\t", "..",
    "//", "\\", "[", "?", "#", "@", ":", ";", "\u202e", "a" * 70_000, "\U0001f600", "&amp;", "{", "|", "\x7f", "\x80",
)  # fmt: skip


def png() -> bytes:
    return wholes()["PNG"][0]


def whole(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content


@cache
def _server() -> tuple[int, dict[str, bytes]]:
    """The port of the server, and its answers by path; it lives in the process that makes the cases."""
    answers: dict[str, bytes] = {}
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(5)
                try:
                    asked = b""
                    while b"\r\n\r\n" not in asked and (more := connection.recv(1 << 16)):
                        asked += more
                    path = asked.split(b" ")[1].decode("latin1").split("?")[0]
                    connection.sendall(answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))
                except (OSError, IndexError):
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return listening.getsockname()[1], answers


@cache
def _stay_here() -> None:
    """Only this machine has a name; the hub client is not offline, since it would then not form the address."""
    asked = socket.getaddrinfo

    def lookup(host: Any, *rest: Any, **options: Any) -> Any:
        if host in ("127.0.0.1", "::1", "localhost", b"127.0.0.1", b"::1", b"localhost"):
            return asked(host, *rest, **options)
        if isinstance(host, str):
            host.encode("idna")
        raise socket.gaierror(-2, "Name or service not known")

    socket.getaddrinfo = lookup
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    paths.MAX_SECONDS = 2


def _headers(draw: random.Random) -> bytes:
    port = _server()[0]
    place = draw.choice(
        (address(draw), f"/{draw.choice(PIECES)}", f"http://127.0.0.1:{port}/loop", "", "//", f"http://me:{SECRET}@x/")
    )
    name = draw.choice(
        ("Location", "Content-Length", "Transfer-Encoding", "Content-Encoding", "Content-Type", "X" * 99)
    )
    value = draw.choice((place, "-1", "9" * 30, "chunked", "gzip", "chunked, chunked", "x", "1, 2", "\u00e9", "a\0b"))
    status = draw.choice((b"200 OK", b"302 Found", b"301 ", b"206 Partial", b"404 x", b"500", b"999 x", b"100 x", b"x"))
    lines = [b"HTTP/1.1 " + status, f"{name}: {value}".encode("utf-8", "surrogatepass"), b"Connection: close"]
    if draw.random() < 0.5:
        lines.append(b"Location: " + place.encode("utf-8", "surrogatepass"))
    lines += [b"X: y"] * draw.choice((0, 0, 0, 2000))
    return b"\r\n".join(lines) + b"\r\n\r\n" + draw.choice((b"", png(), b"5\r\nabcde\r\n0\r\n\r\n", b"zz\r\n"))


def address(draw: random.Random) -> str:
    path = "/".join(draw.choice(PIECES) for _ in range(draw.choice((0, 1, 1, 2))))
    query = draw.choice(("", "", f"?Signature={SECRET}", f"?a={SECRET}#b", f"#{SECRET}"))
    slashes = draw.choice(("://", "://", "://", "://", ":/", ":///", ":"))
    text = f"{draw.choice(SCHEMES)}{slashes}{draw.choice(USERS)}{draw.choice(HOSTS)}{draw.choice(PORTS)}/{path}{query}"
    return draw.choice((text, text, text, f" {text}\n"))


def case(draw: random.Random, folder: Path) -> tuple[Any, bool]:
    """An odd address, or a plain one with an odd answer."""
    _stay_here()
    if draw.random() < 0.6:
        found = address(draw)
        return found, address_scheme(found) in ("http", "https")
    port, answers = _server()
    content = draw.choice((whole(png()), whole(png()), _headers(draw)))
    answers["/x"] = rough(draw, content) if draw.random() < 0.5 else content
    answers["/loop"] = b"HTTP/1.1 302 x\r\nLocation: /loop\r\nContent-Length: 0\r\n\r\n"
    return f"http://me:{SECRET}@127.0.0.1:{port}/x?Signature={SECRET}", True


def read(source: str, draw: random.Random) -> None:
    """Reads an address as one image; errors must not contain the user, password or query of an http address."""
    web = address_scheme(source) in ("http", "https")
    assert not web or SECRET not in str(name_of(source)), name_of(source)
    try:
        image = load_image(source)
        assert image.ndim == 3 and image.numel()
    except Dinov3Error as error:
        assert not web or SECRET not in str(error), str(error)
        raise
