"""Atomic writes, byte-order marks of texts, and disk errors."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from dinov3_infer import DiskError
from dinov3_infer.cli.main import _sentence
from dinov3_infer.system import disk_error, unmarked, whole


@pytest.mark.parametrize("flush", [False, True], ids=["renamed", "flushed"])
def test_a_file_appears_whole_or_not_at_all(flush: bool, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), whole(target, flush=flush) as path:
        path.write_text("half")
        assert path.suffix == ".png" and target.read_text() == "before"
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"] and target.read_text() == "before"
    with whole(target, flush=flush) as path:
        path.write_text("after")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"] and target.read_text() == "after"


def test_a_file_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    """This holds for any writer, though safetensors creates private files."""
    (tmp_path / "plain").touch()
    with whole(tmp_path / "x.safetensors") as path:
        save_file({}, path)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("stem", ["x" * 250, "\N{CAT FACE}" * 62], ids=["bytes", "characters"])
def test_a_name_as_long_as_they_get(stem: str, tmp_path: Path) -> None:
    """The temporary name beside a file must fit the limit too."""
    with whole(tmp_path / f"{stem}.npy") as path:
        path.write_text("all")
    assert (tmp_path / f"{stem}.npy").read_text() == "all"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_is_read_by_its_mark(encoding: str, newline: str) -> None:
    text = newline.join(["a.jpg", "Bücher/写真.png", "x\u2028y.png"])
    content = text.encode(encoding)
    if encoding == "utf-16-be":
        content = b"\xfe\xff" + content
    assert unmarked(content).decode() == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match="UTF-16"):
        unmarked("photos/a.jpg\r\nphotos/b.jpg\r\n".encode(encoding))


def test_names_between_zero_bytes_stay_as_they_are() -> None:
    assert unmarked(b"a.jpg\0b\n.jpg\0\xff.jpg\0") == b"a.jpg\0b\n.jpg\0\xff.jpg\0"


# Disks that take no more

NOISE = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)


def _arrow(path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"a": NOISE.ravel()}), path, compression="none")


def _text(path: Path) -> None:
    path.write_text("x" * 200_000)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": _text,
    "numpy": lambda path: np.save(path.open("wb"), NOISE),
    "torch": lambda path: torch.save(torch.from_numpy(NOISE), path),
    "torch, as it once was": lambda path: torch.save(
        torch.from_numpy(NOISE), path, _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda path: save_file({"a": NOISE}, path),
    "parquet": _arrow,
    "pillow": lambda path: Image.fromarray(NOISE).save(path),
}


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limits files to 100,000 bytes, like a disk that is full then."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_disk_refuses_is_said_to_be_that(writer: str, tmp_path: Path) -> None:
    """Each library raises another class of error, some without the reason."""
    target = tmp_path / "x.png"
    said = r"x.png' could not be written \(File too large\): .*ulimit"
    with pytest.raises(DiskError, match=said) as caught, whole(target) as path:
        WRITERS[writer](path)
    assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "number, said",
    [("ENOSPC", "is full"), ("EDQUOT", "quota"), ("EIO", "gone or broken"), ("ENOTCONN", "mount"), ("ESTALE", "mount"),
     ("ENODEV", "gone"), ("ENXIO", "gone"), ("EROFS", "is read-only")],
)  # fmt: skip
def test_each_trouble_is_named(number: str, said: str, tmp_path: Path) -> None:
    """Any code may raise it; on the command line it is no fault of this package either."""
    code = getattr(errno, number)
    raised = (
        OSError(code, os.strerror(code), "x"),
        RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})"),
        ValueError(f"bad (os error {code})"),
    )
    for error in raised:
        with pytest.raises(DiskError, match=said), whole(tmp_path / "x"):
            raise error
        assert said in _sentence(error) and "fault" not in _sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_goes_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    with pytest.raises(DiskError, match="its folder is gone"), whole(folder / "x") as path:
        shutil.rmtree(folder)
        path.write_text("x")


def test_what_is_no_trouble_of_a_disk_stays_what_it_is(tmp_path: Path) -> None:
    for error in (ValueError("x"), RuntimeError("os error"), KeyError("x"), PermissionError(errno.EACCES, "no", "x")):
        with pytest.raises(type(error)), whole(tmp_path / "x"):
            raise error
        assert disk_error(error) is None
