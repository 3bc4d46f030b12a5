"""Requests that end: odd addresses, slow or endless answers, redirects, and secrets in addresses."""

import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from archives import CONTENT
from pictures import complaint

from dinov3_infer import Backbone, CheckpointError, Dinov3Error, DiskError, ImageError, InputError, load_image, web
from dinov3_infer.hub import download as weights
from dinov3_infer.images import paths
from dinov3_infer.images.paths import name_of
from dinov3_infer.images.sources import Names

PNG, SECRET = CONTENT[0], "s3cr3t"
Answer = Callable[[str, Callable[[bytes], None]], None]  # (requested path, function that sends bytes)


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite is offline for huggingface_hub; no server here is a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that sends the given bytes, and returns its address."""
    sockets: list[socket.socket] = []

    def start(answer: Answer) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def one(connection: socket.socket) -> None:
            with connection:
                try:
                    asked = b""
                    while b"\r\n\r\n" not in asked:
                        asked += connection.recv(1 << 16)
                    answer(asked.split(b" ")[1].decode("latin1"), connection.sendall)
                except OSError:
                    pass  # the client has had enough

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for one in sockets:
        one.close()


def whole(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content


def moved(place: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: {place}\r\n\r\n".encode()


# Addresses

ODD = [
    "http://256.1.1.1/x.png", "http://127.0.0.1:1/caf\udce9.png", "http://127.0.0.1:1/\ud800.png", "http://a..b/x",
    "http://" + "\u0430" * 300 + "/x.png", "http://127.0.0.1:1/" + "a" * 70_000, "http://xn--\u00e9/x", "http://./x",
    "http://[fe80::1%eth9]/x", "http://[::1/x", "http://[v1.x]/a", "http://127.0.0.1:99999/x", "http://h:\u0663/x",
    "http://\u2100/x", "http://a\u0000b/x", "http://%zz/x", "http://1.1.1.1.1/x", "HTTP:/127.0.0.1/x", "http://-/x",
    "https://" + "a." * 200 + "b/x", "http://" + "a" * 64 + "/x", "http://*/x", "http://a b/x", "http:///x",
    "http://127.0.0.1:1/\r\nX: y", "ftp://me:s3cr3t@host/x", "http://?", "http://#", "http://@/x", "http://:@:/x",
    "http://\u200d/x",
]  # fmt: skip


@pytest.mark.parametrize("address", ODD, ids=lambda text: ascii(text)[1:40])
def test_an_odd_address_is_one_bad_row(address: str, tmp_path: Path) -> None:
    """An odd address costs one row, in memory, in a file and alone."""
    complaint(Dinov3Error, lambda: load_image(address))
    bb = Backbone.from_pretrained("nano", device="cpu")
    report = bb.embed([PNG, address, PNG], tmp_path / "v.npy", size=32, on_error="skip", progress=False)
    assert report.shape[0] == 3 and [failure.row for failure in report.failures] == [1]
    complaint(Dinov3Error, lambda: bb.embed(address, size=32))
    assert list(Names([address, "x"])) == [address, "x"]


def test_bytes_of_any_encoding_are_asked_for(serve: Callable[[Answer], str]) -> None:
    """A list of addresses in Latin-1, and one with escaped spaces."""
    asked: list[str] = []

    def answer(path: str, send: Callable[[bytes], None]) -> None:
        asked.append(path)
        send(whole(PNG))

    host = serve(answer)
    for path in ("caf\udce9.png", "caf\u00e9.png", "a%20b.png?x=%2F&y=\u00e9"):
        assert torch.equal(load_image(f"{host}/{path}"), load_image(PNG))
    assert asked == ["/caf%E9.png", "/caf%C3%A9.png", "/a%20b.png?x=%2F&y=%C3%A9"]


# Users, passwords, signatures


@pytest.mark.parametrize(
    "address, shown",
    [
        (f"https://me:{SECRET}@host/a.png", "https://host/a.png"),
        (f"https://{SECRET}@host/a.png?{SECRET}", "https://host/a.png"),
        (f"https://me:a@{SECRET}@host/a.png#{SECRET}", "https://host/a.png"),
        (f"https:/me:{SECRET}@host/a.png", "https:/host/a.png"),
        (f"https://me:/{SECRET}@host/a.png", "https://host/a.png"),
        (f"https://me:half/{SECRET}@host/a.png", "https://..."),
        (f"https://me:half?{SECRET}@host/a.png", "https://..."),
        (f"https://me:half#{SECRET}@host/a.png", "https://..."),
        ("https://host/@somebody/a.png", "https://host/@somebody/a.png"),
    ],
)
def test_no_secret_of_an_address_is_shown(address: str, shown: str) -> None:
    found = name_of(address)
    assert found == shown or SECRET not in str(found)
    assert "half" not in str(found)


@pytest.mark.parametrize("text", [f"http://me:{SECRET}@{{}}/x.png?Signature={SECRET}", f"http://{SECRET}@{{}}/x.png"])
def test_no_secret_gets_into_a_log(text: str, serve: Callable[[Answer], str]) -> None:
    """Checked at the log level at which the client logs each request."""
    host = serve(lambda path, send: send(whole(PNG))).removeprefix("http://")
    written = io.StringIO()
    handler, root = logging.StreamHandler(written), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        load_image(text.format(host))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert host in written.getvalue() and SECRET not in written.getvalue() and "me:" not in written.getvalue()


# Answers without an end


def _drips(send: Callable[[bytes], None], content: bytes) -> None:
    for at in range(len(content)):
        send(content[at : at + 1])
        time.sleep(0.05)


def _without_end(send: Callable[[bytes], None], first: bytes) -> None:
    send(b"HTTP/1.1 200 OK\r\n\r\n" + first)
    while True:
        send(bytes(1 << 16))


SLOW: dict[str, Answer] = {
    "headers that drip": lambda _, send: _drips(send, b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 10_000),
    "one header that drips": lambda _, send: _drips(send, b"HTTP/1.1 200 OK\r\nX: " + b"a" * 90_000),
    "a body that drips": lambda _, send: (send(whole(bytes(99_999))[:80]), _drips(send, bytes(10_000))),
    "chunks that drip": lambda _, send: (
        send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), _drips(send, b"1\r\n\0\r\n" * 10_000)
    ),
    "redirects that drip": lambda path, send: _drips(send, moved(path + "a") * 9),
    "silence": lambda _, send: time.sleep(20),
}  # fmt: skip


@pytest.mark.parametrize("case", SLOW)
def test_what_drips_is_given_up(
    case: str, serve: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow trickle gains no time: an image has 60 s, weights have 30 s per 64 KiB; the test uses one second."""
    for module, name in ((paths, "MAX_SECONDS"), (web, "_TIMEOUT_S"), (weights, "_PAUSE_S")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(weights, "_TRIES", 1)
    host, started = serve(SLOW[case]), time.monotonic()
    assert "took longer than 1 s" in complaint(ImageError, lambda: load_image(f"{host}/x.png?{SECRET}"))
    assert time.monotonic() - started < 6
    link = f"{host}/x.pth?{SECRET}"
    text = complaint(Dinov3Error, lambda: Backbone.from_pretrained(link, cache_dir=tmp_path))
    assert time.monotonic() - started < 12 and f"'{host}/x.pth'" in text
    assert [path for path in tmp_path.rglob("*.pth*") if path.is_file()] == []


@pytest.mark.parametrize("first", [b"", b"<html>" + b" " * 99, b"PK\3\4"], ids=["zeros", "page", "zip"])
def test_weights_without_a_length_end(
    first: bytes, serve: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first bytes, the size limit or the free space of the disk ends the download."""
    host = serve(lambda _, send: _without_end(send, first))
    monkeypatch.setattr(weights, "MAX_BYTES", 1 << 22)
    said = "has more than" if first.startswith(b"PK") else "is not a checkpoint"
    text = complaint(CheckpointError, lambda: Backbone.from_pretrained(f"{host}/x.pth", cache_dir=tmp_path))
    assert said in text
    if first.startswith(b"PK"):
        monkeypatch.setattr(weights, "MAX_BYTES", 1 << 40)
        monkeypatch.setattr(weights, "_SPARE", 1 << 60)
        text = complaint(DiskError, lambda: Backbone.from_pretrained(f"{host}/x.pth", cache_dir=tmp_path))
        assert "make room" in text
    assert [path for path in tmp_path.rglob("*.pth*") if path.is_file()] == []


@pytest.mark.parametrize("size", [2**37, 2**70], ids=["no model", "no disk"])
def test_weights_that_claim_too_much_are_not_begun(size: int, serve: Callable[[Answer], str], tmp_path: Path) -> None:
    host = serve(lambda _, send: send(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\nPK\3\4".encode()))
    text = complaint(Dinov3Error, lambda: Backbone.from_pretrained(f"{host}/x.pth", cache_dir=tmp_path))
    assert "more than any model" in text or "failed" in text


# Redirects


def test_redirects_to_other_hosts_can_be_refused(
    serve: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that embeds links of its users must not be led to internal hosts."""
    inside: list[str] = []

    def answer_inside(path: str, send: Callable[[bytes], None]) -> None:
        inside.append(path)
        send(whole(PNG))

    other = serve(answer_inside)

    def answer(path: str, send: Callable[[bytes], None]) -> None:
        send(
            moved({"/out": f"{other}/x?{SECRET}", "/in": "/here", "/on": "/out"}.get(path, ""))
            if path != "/here"
            else whole(PNG)
        )

    host = serve(answer)
    for path in ("/in", "/out", "/on"):
        assert torch.equal(load_image(host + path), load_image(PNG))
    assert len(inside) == 2
    monkeypatch.setenv("DINOV3_INFER_REDIRECTS", "same-host")
    assert torch.equal(load_image(host + "/in"), load_image(PNG))
    for path in ("/out", "/on"):
        text = complaint(InputError, lambda path=path: load_image(host + path))
        assert "redirects to another host" in text and f"'{host}{path}'" in text and SECRET not in text
        link = f"{host}{path}#x.pth"
        complaint(Dinov3Error, lambda link=link: Backbone.from_pretrained(link, cache_dir=tmp_path))
    assert len(inside) == 2


@pytest.mark.parametrize(
    "place",
    ["{path}a", "ftp://host/x", "file:///etc/passwd", "http://[", "http://a..b/", "//256.1.1.1/", "\u00e9" * 70_000],
)  # fmt: skip
def test_redirects_that_lead_nowhere(place: str, serve: Callable[[Answer], str]) -> None:
    host = serve(lambda path, send: send(moved(place.replace("{path}", path))))
    text = complaint(Dinov3Error, lambda: load_image(f"{host}/x"))
    assert "passwd" not in text
