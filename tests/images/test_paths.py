"""Images in folders, behind patterns and behind addresses."""

import base64
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import CONTENT
from oracles import SMALL
from pictures import complaint, photo
from PIL import Image
from repository import ROOT

from dinov3_infer import Backbone, ImageError, InputError, MissingFileError, load_image
from dinov3_infer.images import paths as places
from dinov3_infer.images.opening import as_source
from dinov3_infer.images.paths import FORMATS, image_suffixes, list_images, name_of, read_list, walk

_stream = io.BytesIO()
Image.fromarray(photo(20, 30)).save(_stream, "png")
PNG = _stream.getvalue()
SECRET = "Signature=s3cr3t"


class Handler(BaseHTTPRequestHandler):
    """Serves /ok, /moved, /slow, /endless, /cut and /page, and the statuses /404, /403 and /500."""

    def do_GET(self) -> None:
        kind = self.path.split("?")[0].strip("/")
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", f"/ok?{SECRET}")
            self.end_headers()
            return
        self.send_response(int(kind) if kind.isdigit() else 200)
        if kind in ("ok", "cut", "page"):
            self.send_header("Content-Length", str(2000 if kind == "page" else len(PNG)))
        self.end_headers()
        try:
            if kind in ("endless", "slow"):
                for _ in range(10_000):
                    self.wfile.write(b"\0" * (1 << 16 if kind == "endless" else 1))
                    time.sleep(0.05 if kind == "slow" else 0)
            else:
                self.wfile.write({"ok": PNG, "cut": PNG[:200], "page": b"<html>log in" + b" " * 1988}.get(kind, b""))
        except OSError:
            pass  # the client has had enough

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite is offline for huggingface_hub; this server is not a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("path", ["ok", f"ok?{SECRET}", "moved", f"moved?{SECRET}"])
def test_an_image_behind_an_address(path: str, server: str) -> None:
    assert torch.equal(load_image(f"{server}/{path}"), load_image(PNG))


def test_file_and_data_addresses(tmp_path: Path) -> None:
    """The addresses contain characters that need escaping."""
    path = tmp_path / "a cat?.png"
    path.write_bytes(PNG)
    for address in (path.as_uri(), f"data:image/png;base64,{base64.b64encode(PNG).decode()}"):
        assert torch.equal(load_image(address), load_image(PNG))


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "path, error, said",
    [
        ("404", MissingFileError, "(HTTP 404)"), ("403", ImageError, "(HTTP 403)"), ("500", ImageError, "(HTTP 500)"),
        ("page", ImageError, "is a web page"), ("slow", ImageError, "took longer than"),
        ("endless", ImageError, "is larger than"), ("cut", ImageError, "cannot download"),
    ],
)  # fmt: skip
def test_what_an_address_may_lead_to(
    path: str, error: Any, said: str, server: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The error has the address without its secrets, and no log has them either."""
    monkeypatch.setattr(places, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(places, "MAX_SECONDS", 0.3)
    caplog.set_level("DEBUG")
    started = time.monotonic()
    text = complaint(error, lambda: load_image(f"{server}/{path}?{SECRET}"))
    assert said in text and f"'{server}/{path}'" in text and "s3cr3t" not in text + caplog.text
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("online")
def test_nobody_at_an_address() -> None:
    text = complaint(ImageError, lambda: load_image(f"http://127.0.0.1:9/a.png?{SECRET}"))
    assert "cannot download 'http://127.0.0.1:9/a.png'" in text and "s3cr3t" not in text


def test_offline_is_offline(server: str) -> None:
    """HF_HUB_OFFLINE applies to images too, since they use the session of huggingface_hub."""
    text = complaint(ImageError, lambda: load_image(f"{server}/ok?{SECRET}"))
    assert "OfflineMode" in text and "s3cr3t" not in text


@pytest.mark.parametrize(
    "address, error, said",
    [
        ("s3://bucket/a.png?X-Amz-Signature=s3cr3t", InputError, "s3://..."),
        ("data:image/png;base64,&&&s3cr3t", ImageError, "no base64"),
        ("data:image/png;base64,AAAA", ImageError, "'data:...' is not an image"),
        ("file:///nowhere/a.png", MissingFileError, "no image at '/nowhere/a.png'"),
        ("http://user:s3cr3t@[1/a.png", InputError, "no http or https link"),
    ],
)
def test_other_addresses_are_said(address: str, error: Any, said: str) -> None:
    text = complaint(error, lambda: load_image(address))
    assert said in text and "s3cr3t" not in text


def test_names_in_reports() -> None:
    """A path is unchanged, an address loses user, query and fragment, and an object has no name."""
    assert name_of("a?b.png") == "a?b.png" and name_of(Path("x") / "y.png") == os.path.join("x", "y.png")
    assert name_of("https://user:pw@host:8/a.png?Signature=1#2") == "https://host:8/a.png"
    assert name_of("s3://key:pw@bucket/a.png") == "s3://bucket/a.png" and name_of("data:,x") == "data:..."
    assert name_of(PNG) is None and name_of(np.zeros((2, 2, 3))) is None


# Folders and patterns


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "in/c.webp", "in/deep/d.tiff", ".hidden.png", "._a.JPG", ".git/e.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    os.symlink(tmp_path, tmp_path / "in" / "loop")
    return tmp_path


def test_a_folder_is_its_images(album: Path) -> None:
    """A folder is searched recursively and sorted, without hidden files."""
    expected = [str(album / name) for name in ("a.JPG", "b.png", "in/c.webp", "in/deep/d.tiff")]
    assert list_images(album) == list_images(str(album)) == expected


@pytest.mark.parametrize(
    "pattern, names",
    [("*.png", ["b.png"]), ("in/**/*.*", ["in/c.webp", "in/deep/d.tiff"]), ("?.*", ["a.JPG", "b.png"])],
)
def test_a_pattern_is_what_fits_it(pattern: str, names: list[str], album: Path) -> None:
    found = [path for path in list_images(str(album / pattern)) if "loop" not in path]
    assert found == [str(album / name) for name in names]


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("**/*.*", ["a.JPG", "b.png", "in/c.webp", "in/deep/d.tiff", "notes.txt"]),
        ("**", ["a.JPG", "b.png", "in/c.webp", "in/deep/d.tiff", "notes.txt"]),
        ("in/**", ["in/c.webp", "in/deep/d.tiff", "in/loop/a.JPG", "in/loop/b.png", "in/loop/notes.txt"]),
        ("**/deep/**/*.tiff", ["in/deep/d.tiff"]),
        ("[i]?/**/d*", ["in/deep/d.tiff"]), ("**/.git/*", [".git/e.png"]),
    ],
)  # fmt: skip
def test_patterns_of_folders_end(pattern: str, names: list[str], album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With link loops there are endless paths to each file; only one is followed."""
    for i in range(8):
        os.symlink(album, album / f"again{i}")
        os.symlink(album / "in", album / "in" / "deep" / f"up{i}")
    assert list_images(str(album / pattern)) == [str(album / name) for name in names]
    monkeypatch.chdir(album)
    assert list_images(pattern) == names


def test_streams_take_folders_and_patterns(album: Path) -> None:
    """Streams have the order of `list_images`, and reports have the paths."""
    bb = Backbone.from_config(SMALL["dinov3"], seed=0)
    rows = bb.embed(album, size=32)
    assert rows.shape == (4, 64) and np.array_equal(rows[0], bb.embed(PNG, size=32)[0])
    assert len(list(bb.iter_features(str(album / "*.png"), size=32))) == 1
    bb.embed(str(album / "?.*"), album / "x.npy", size=32)
    assert "a.JPG" in (album / "x.jsonl").read_text().splitlines()[0]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1].png"
    path.write_bytes(PNG)
    assert Backbone.from_config(SMALL["dinov3"], seed=0).embed(path, size=32).shape == (1, 64)


def test_nothing_in_a_folder_is_said(tmp_path: Path) -> None:
    """The error says what was looked for, and how many other files there are."""
    for name in ("notes.txt", "in/data.csv", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    bb = Backbone.from_config(SMALL["dinov3"], seed=0)
    text = complaint(InputError, lambda: bb.embed(tmp_path))
    assert f"no images under '{tmp_path}' (looked for .jpg .jpeg" in text and "2 other files)" in text
    for wrong in (tmp_path / "*.png", tmp_path / "none"):
        assert str(wrong) in complaint(MissingFileError, lambda wrong=wrong: list_images(wrong))
    assert "is a folder" in complaint(ImageError, lambda: bb.embed([tmp_path]))


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Links are followed after all real folders; loops, links to links and second names of a folder end."""
    for name in ("top/b/1.png", "top/a/2.png", "other/3.png", "other/deep/4.png", "top/.hidden/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(CONTENT[0])
    for link, there in (("top/a/loop", "top"), ("top/a/again", "top/b"), ("top/there", "other"), ("other/back", "top"),
                        ("other/deep/self", "other/deep"), ("top/gone", "nowhere")):  # fmt: skip
        (tmp_path / link).symlink_to(tmp_path / there)
    top = str(tmp_path / "top")
    found = ["a/2.png", "b/1.png", "there/3.png", "there/deep/4.png"]
    assert [os.path.relpath(path, top) for path in list_images(top)] == found
    assert sorted(walk(top)) == sorted(os.path.join(top, name) for name in [*found, "gone"]), (
        "a link to no folder is a file"
    )


# Suffixes


def test_suffixes_are_those_of_pillow() -> None:
    """Our table avoids loading all of Pillow; it agrees with Pillow's registry, which differs by version."""
    kinds = Image.registered_extensions()
    found = {suffix: "JPEG" if kind == "MPO" else kind for suffix, kind in kinds.items()}  # two JPEGs in one file
    registered = {(kind, suffix) for suffix, kind in found.items() if kind in FORMATS}
    ours = {(kind, suffix) for kind, suffixes in FORMATS.items() for suffix in suffixes}
    assert {pair for pair in registered if pair[0] not in ("HEIF", "JXL")} <= ours
    assert {pair for pair in ours if pair[0] in Image.OPEN} <= registered


def test_suffixes_of_plugins_count_where_they_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ".heic" in image_suffixes() and ".heics" not in image_suffixes()
    monkeypatch.setitem(Image.EXTENSION, ".heics", "HEIF")
    monkeypatch.setitem(Image.EXTENSION, ".eps", "EPS")
    assert ".heics" in image_suffixes() and ".eps" not in image_suffixes()


def test_looking_for_suffixes_does_not_load_all_of_pillow() -> None:
    """The check runs in a new process, since other tests load all of Pillow."""
    script = "import sys; from dinov3_infer.images.paths import image_suffixes; image_suffixes()"
    script += "; assert 'PIL.TiffImagePlugin' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)


# Encodings of lists


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_list_is_read_by_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    """Windows' Notepad and PowerShell write such lists."""
    (tmp_path / "bücher.png").write_bytes(PNG)
    (tmp_path / "list.txt").write_text("bücher.png\tcat\r\n", encoding=encoding)
    source = as_source(tmp_path / "list.txt")
    assert len(source) == 1 and source.labels == ["cat"]
    assert source.load(0).image.shape == (3, 20, 30)
    assert read_list(tmp_path / "list.txt") == ["bücher.png\tcat"]


@pytest.mark.parametrize("content", ["a.png\nb.png\n".encode("utf-16-le"), b"\xff\xfea"])
def test_a_list_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    assert "save it as UTF-8" in complaint(InputError, lambda: read_list(tmp_path / "list.txt"))
