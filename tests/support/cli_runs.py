"""Runs the command line in this process, and keeps its exit status, stdout and stderr."""

import contextlib
import io
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pictures import photo
from PIL import Image

from dinov3_infer import Backbone
from dinov3_infer.cli import main


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


class Text(io.TextIOWrapper):
    """A text stream like that of a UTF-8 terminal; other bytes raise."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)

    def getvalue(self) -> str:
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


def run(*argv: object) -> Ran:
    """Runs a command, and checks that every line on stderr is complete and starts with the command's name."""
    out, err = Text(), Text()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(a) for a in argv])
    ran = Ran(status, out.getvalue(), err.getvalue())
    assert not re.search("0x[0-9a-f]{6}", ran.err), "an address"
    if status != 2 and "--debug" not in argv:  # argparse writes its errors in another form
        assert all(line.startswith("dinov3-infer: ") for line in ran.err.splitlines()), ran.err
        assert ran.err == "" or ran.err.endswith("\n")
    return ran


def refused(status: int, words: str, *argv: object) -> Ran:
    """Runs a command that must fail with this exit status, one matching line on stderr, and empty stdout."""
    ran = run(*argv)
    assert (ran.status, ran.out) == (status, ""), ran
    lines = ran.err.splitlines()
    assert re.search(words, lines[-1]), ran.err
    assert "Traceback" not in ran.err
    if status == 1:
        assert len(lines) == 1 and lines[0].startswith("dinov3-infer: error: "), ran.err
    return ran


def verdict(ran: Ran) -> str:
    """The last line of `verify` and `doctor`."""
    return ran.out.splitlines()[-1].removeprefix("verdict").strip()


def listed(path: Path) -> list[dict[str, object]]:
    """Reads a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


_folder = TemporaryDirectory(prefix="dinov3_infer_cli_")


@cache
def small_model() -> Path:
    """The folder of a small model with random weights."""
    return Backbone.from_config("nano", seed=0).save_pretrained(Path(_folder.name) / "nano")


def write_pictures(folder: Path, *names: str) -> Path:
    """Writes images of different sizes under these names; a .txt is a text, and a name with `broken` is truncated."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no picture")
            continue
        Image.fromarray(photo(40 + 8 * i, 64, seed=i)).save(path)
        if "broken" in path.name:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def vectors(paths: list[Path], **options: object) -> np.ndarray:
    """The vectors that the library computes for them, one image at a time."""
    bb = Backbone.from_pretrained(small_model(), device="cpu")
    return np.concatenate([bb.extract_features(path, **options).embedding.numpy() for path in paths])  # type: ignore[arg-type]
