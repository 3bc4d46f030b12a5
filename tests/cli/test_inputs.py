"""The images, model, options and outputs of a command."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import listed, refused, run, small_model, write_pictures
from safetensors import safe_open

from dinov3_infer import Backbone, Dinov3Error
from dinov3_infer.images.opening import find_images
from dinov3_infer.images.sources import relative_names

MODEL = ("-m", small_model(), "--device", "cpu")
SMALL = ("--size", "64")


def names(*sources: object) -> list[tuple[str, str]]:
    found = find_images([str(s) for s in sources])
    keys = [found.key(i) or "" for i in range(len(found))]
    return [
        (Path(key).as_posix(), Path(name).as_posix()) for key, name in zip(keys, relative_names(found), strict=True)
    ]


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders (recursive), patterns, lists and URLs, in the given order; names keep the folders below a source."""
    write_pictures(tmp_path, "in/b.png", "in/sub/a.jpg", "in/.hidden.png", "in/notes.txt", "[1].png", "c.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_text("c.png\n\nin/sub/a.jpg\nhttps://host/x/photo.jpg?Signature=s3cr3t\n")
    (tmp_path / "zeros").write_bytes(b"c.png\0in/b.png\0")
    assert names("in") == [("in/b.png", "b"), ("in/sub/a.jpg", "sub/a")]
    assert names("in/") == names("in")
    assert names(tmp_path / "in") == [(f"{tmp_path}/in/b.png", "b"), (f"{tmp_path}/in/sub/a.jpg", "sub/a")]
    assert names("in/**/*.jpg", "*.png") == [("in/sub/a.jpg", "sub/a"), ("[1].png", "[1]"), ("c.png", "c")]
    assert names("[1].png") == [("[1].png", "[1]")], "a name that looks like a pattern"
    assert names("c.png", "in/b.png") == [("c.png", "c"), ("in/b.png", "in/b")], "below the folder that they share"
    assert names("in/sub/a.jpg") == [("in/sub/a.jpg", "a")]
    found = names("@list")
    assert [name for _, name in found] == ["c", "in/sub/a", "photo"]
    assert names("@zeros") == [("c.png", "c"), ("in/b.png", "in/b")]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"c.png\n")))
    assert names("@-") == [("c.png", "c")]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.jpg", r"no image, folder or pattern at '.*nowhere\.jpg'; check the path"),
        ("*.tif", "no folder and no file at"),
        ("empty", r"no images under 'empty' \(looked for .*; 0 other files\)"),
        ("@nowhere", r"the list 'nowhere' cannot be read \(No such file or directory\); check the path"),
        ("@void", "the list 'void' is empty; give one path per line"),
    ],
)
def test_sources_that_are_none(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail before a model is loaded and before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "void").write_text("\n\n")
    monkeypatch.setattr(Backbone, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(1, words, "embed", source, "-o", "x.npy")
    refused(1, words, "features", source, "-o", "maps")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "void"]


@pytest.mark.parametrize(
    ("command", "out", "words"),
    [
        ("embed", "x.csv", r"should end in \.npy, \.safetensors, \.parquet, or be a folder"),
        ("embed", "missing/x.npy", r"no folder '.*missing' to write '.*x\.npy' to; make it first"),
        ("embed", "there.npy", r"'.*there\.npy' exists already and was not written by embed; .* or --overwrite"),
        ("embed", "beside.npy", r"'.*beside\.jsonl' exists already"),
        ("embed", "in", r"the folder '.*in' holds other files; give an empty folder or another name"),
        ("features", "missing/maps", r"no folder '.*missing' to write"),
        ("features", "full", "the folder '.*full' is not empty; give another one, or --overwrite"),
        ("features", "there.npy", "is a file, and a folder is needed; give another name"),
        ("show", "x.tif", r"should end in \.png or \.jpg or \.jpeg or \.webp; rename it"),
        ("show", "missing/x.png", "no folder '.*missing' to write"),
    ],
    ids=lambda value: value if len(value) < 20 else "",
)
def test_where_results_cannot_go(
    command: str, out: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These outputs fail before a model is loaded."""
    monkeypatch.setattr(Backbone, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    source = write_pictures(tmp_path, "in/a.png") / "in"
    for existing in ("there.npy", "beside.jsonl", "full/x"):
        (tmp_path / existing).parent.mkdir(exist_ok=True)
        (tmp_path / existing).write_text("")
    (tmp_path / "folder.npy").mkdir()
    refused(1, words, command, *(["pca"] if command == "show" else []), source, "-o", tmp_path / out)


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="wants a folder that nobody can write to")
@pytest.mark.parametrize("command", ["embed", "features"])
def test_a_place_that_cannot_be_written(command: str, tmp_path: Path) -> None:
    source = write_pictures(tmp_path, "a.png")
    out = "/proc/x.npy" if command == "embed" else "/proc/maps"
    refused(1, "'/proc", command, source, "-o", out, *MODEL, *SMALL)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pictures(tmp_path, "in/a.png") / "in"
    monkeypatch.setattr(os, "access", lambda *_: False)
    words = "'.*x.npy' cannot be written: no permission to write to '.*'; give another path"
    refused(1, words, "embed", source, "-o", tmp_path / "x.npy", *MODEL)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-m", "vits-16"), "unknown model 'vits-16': did you mean 'vits16'"),
        (("-m", "nowhere.safetensors"), r"no weights at '.*nowhere\.safetensors'"),
        ((*MODEL, "--device", "abacus"), "device is 'auto' or a torch device"),
        ((*MODEL, "--dtype", "int8"), "dtype"),
        ((*MODEL, "--size", "250", "--fit", "squash"), "size 250 is not a multiple of the patch size 16"),
        ((*MODEL, "--size", "own", "--fit", "crop"), "--size own needs --fit native"),
    ],
    ids=lambda value: " ".join(str(v) for v in value[-2:]) if isinstance(value, tuple) else "",
)
def test_options_that_do_not_fit(flags: tuple[str, ...], words: str, tmp_path: Path) -> None:
    source = write_pictures(tmp_path, "in/a.png") / "in"
    refused(1, words, "features", source, "-o", tmp_path / "maps", *flags)
    assert not (tmp_path / "maps").exists()


def test_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is nano; in a release without it, the error says what to give."""
    source = write_pictures(tmp_path, "in/a.png") / "in"
    asked: list[str] = []

    def load(name: str, **_: object) -> Backbone:
        asked.append(name)
        raise dinov3_error

    dinov3_error: Dinov3Error = __import__("dinov3_infer").ModelNotFoundError("no weights of 'nano'")
    monkeypatch.setattr(Backbone, "from_pretrained", load)
    words = "no model is given and this release contains no weights; add -m with a name"
    refused(1, words, "embed", source, "-o", tmp_path / "x.npy")
    assert asked == ["nano"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names that these systems do not have")
def test_names_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with line breaks, invalid UTF-8 or a leading minus are read, and printed on one line in errors."""
    odd = ["-x.png", "two\nlines.png", os.fsdecode(b"caf\xe9.png"), "bro\x1b[31mken broken.png", "日本.png"]
    write_pictures(tmp_path, *odd)
    monkeypatch.chdir(tmp_path)
    ran = run("embed", "-o", "x.npy", *MODEL, *SMALL, "--fit", "squash", "--", *odd)
    assert ran.status == 3
    assert [row["path"] for row in listed(Path("x.jsonl"))] == odd
    assert np.isnan(np.load("x.npy")).all(axis=1).tolist() == [False, False, False, True, False]
    assert r"bro\x1b[31mken broken.png" in ran.err
    assert run("features", ".", "-o", "maps", *MODEL, *SMALL).status == 3
    assert {p.stem for p in Path("maps").iterdir()} == {Path(n).stem for n in odd if "broken" not in n} | {"index"}
    with safe_open(Path("maps", os.fsdecode(b"caf\xe9.safetensors")), framework="np") as content:
        assert content.metadata()["path"] == "./caf\\udce9.png"


def test_overwrite(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png")
    for command, out in (("embed", "x.npy"), ("features", "maps")):
        for flags in ((), ("--overwrite",)):
            assert run(command, tmp_path / "in", "-o", tmp_path / out, *MODEL, *SMALL, *flags).status == 0
