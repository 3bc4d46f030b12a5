"""Files appear whole or not at all, and texts are read by their mark."""

from pathlib import Path

import pytest
from safetensors.numpy import save_file

from dinov3_infer.system import unmarked, whole


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
    """Whatever wrote it: safetensors makes files for their owner alone."""
    (tmp_path / "plain").touch()
    with whole(tmp_path / "x.safetensors") as path:
        save_file({}, path)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("stem", ["x" * 250, "\N{CAT FACE}" * 62], ids=["bytes", "characters"])
def test_a_name_as_long_as_they_get(stem: str, tmp_path: Path) -> None:
    """What is written beside a file has a name of its own, which has to fit too."""
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
