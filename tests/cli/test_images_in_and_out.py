"""`embed` and `features` write what the library gives, whatever pictures are called and wherever they lie."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import refused, run, small_model, vectors, write_pictures
from safetensors import safe_open

from dinov3_infer import Backbone, Dinov3Error
from dinov3_infer.cli import features as features_command
from dinov3_infer.cli.inputs import find_images
from dinov3_infer.images.sources import relative_names

MODEL = ("-m", small_model(), "--device", "cpu")
SMALL = ("--size", "64")


def listed(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- which pictures ------------------------------------------------------------------------------------------------


def names(*sources: object) -> list[tuple[str, str]]:
    found = find_images([str(s) for s in sources])
    keys = [found.key(i) or "" for i in range(len(found))]
    return [
        (Path(key).as_posix(), Path(name).as_posix()) for key, name in zip(keys, relative_names(found), strict=True)
    ]


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders to the bottom, patterns, lists, addresses, in the order given; names keep the folders below a source."""
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
        ("nowhere.jpg", r"no picture, folder or pattern at '.*nowhere\.jpg'; check the path"),
        ("*.tif", "no folder and no file at"),
        ("empty", r"no pictures under 'empty' \(looked for .*; 0 other files\)"),
        ("@nowhere", r"the list 'nowhere' cannot be read \(No such file or directory\); check the path"),
        ("@void", "the list 'void' is empty; give one path per line"),
    ],
)
def test_sources_that_are_none(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before a model is loaded and before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "void").write_text("\n\n")
    monkeypatch.setattr(Backbone, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(1, words, "embed", source, "-o", "x.npy")
    refused(1, words, "features", source, "-o", "maps")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "void"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names that these systems do not have")
def test_names_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line breaks, bytes that are not UTF-8, a minus in front: read, and told in one line where they cannot be."""
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


# --- embed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), {}),
        (("--pooling", "cls_mean", *SMALL), dict(pooling="cls_mean", size=64)),
        (("--fit", "native", "--size", "48"), dict(fit="native", size=48)),
        (("--fit", "native", "--size", "own"), dict(fit="native")),
        (("--fit", "crop", "--size", "32x48", "--batch-size", "1"), dict(fit="crop", size=(32, 48))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_embed_writes_what_the_library_gives(
    flags: tuple[str, ...], options: dict[str, object], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.jpg", "c.png")
    ran = run("embed", tmp_path / "in", "-o", tmp_path / "x.npy", *MODEL, *flags)
    expected = vectors(sorted((tmp_path / "in").iterdir()), **options)
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == f"dinov3-infer: wrote '{tmp_path / 'x.npy'}': 3 vectors of {expected.shape[1]} numbers\n"
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


def test_embed_normalizes(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    assert run("embed", tmp_path, "-o", tmp_path / "x.npy", *MODEL, *SMALL, "--normalize").status == 0
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "x.npy"), axis=1), 1, rtol=1e-6)


def test_embed_goes_on_after_a_bad_picture(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "broken.png", "c.png")
    out = tmp_path / "x.npy"
    ran = run("embed", tmp_path / "in", "-o", out, *MODEL, *SMALL)
    assert (ran.status, ran.out) == (3, "")
    assert f"3 vectors of 192 numbers; 1 could not be read, its row is NaN, see '{tmp_path / 'x.jsonl'}'" in ran.err
    rows = listed(tmp_path / "x.jsonl")
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert [Path(str(row["path"])).name for row in rows] == ["a.png", "broken.png", "c.png"]
    before = out.read_bytes()
    refused(
        1, "cannot decode", "embed", tmp_path / "in", "-o", out, *MODEL, *SMALL, "--on-error", "raise", "--overwrite"
    )
    assert out.read_bytes() == before, "what is there is replaced when the new one is whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "x.json", "x.jsonl", "x.npy"]
    assert run("embed", tmp_path / "in" / "broken.png", "-o", tmp_path / "y.npy", *MODEL).status == 1, (
        "nothing was done"
    )


def test_a_list_may_name_what_is_gone(tmp_path: Path) -> None:
    """Lists come from programs: one path that leads nowhere costs its own row."""
    write_pictures(tmp_path, "a.png")
    (tmp_path / "list").write_text(f"{tmp_path / 'a.png'}\n{tmp_path / 'gone.png'}\n")
    assert run("embed", f"@{tmp_path / 'list'}", "-o", tmp_path / "x.npy", *MODEL, *SMALL).status == 3
    assert "no picture at" in str(listed(tmp_path / "x.jsonl")[1]["error"])


# --- features ------------------------------------------------------------------------------------------------------


def test_features_writes_what_the_library_gives(tmp_path: Path) -> None:
    """One file per picture, in the folders that the pictures lie in, at sizes of their own."""
    write_pictures(tmp_path / "in", "a.png", "sub/a.png", "sub/b.jpg")
    ran = run("features", tmp_path / "in", "-o", tmp_path / "maps", *MODEL)
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == f"dinov3-infer: wrote maps of 3 pictures to '{tmp_path / 'maps'}'\n"
    bb = Backbone.from_pretrained(small_model(), device="cpu")
    index = listed(tmp_path / "maps" / "index.jsonl")
    assert [row["file"] for row in index] == ["a.safetensors", "sub/a.safetensors", "sub/b.safetensors"]
    for row in index:
        expected = bb.extract_features(str(row["path"]), fit="native", size=768)
        with safe_open(tmp_path / "maps" / str(row["file"]), framework="pt") as content:
            assert set(content.keys()) == {"feature_map", "cls_token"}
            assert content.get_tensor("feature_map").equal(expected.feature_map[0])
            assert content.get_tensor("cls_token").equal(expected.cls_token[0])
            height, width = expected.original_sizes[0]
            assert content.metadata() == {
                "model": "nano", "patch_size": "16", "path": row["path"], "original_size": f"{height}x{width}",
                "input_size": "{}x{}".format(*expected.input_size),
            }  # fmt: skip


def test_layers_halves_padding_and_arrays(tmp_path: Path) -> None:
    source = write_pictures(tmp_path, "a.png") / "a.png"
    bb = Backbone.from_pretrained(small_model(), device="cpu")
    expected = bb.extract_features(source, fit="pad", size=64, layers=[-1, 0])
    flags = ("--layers", "-1,0", "--fit", "pad", *SMALL)
    assert run("features", source, "-o", tmp_path / "maps", *MODEL, *flags, "--half").status == 0
    with safe_open(tmp_path / "maps" / "a.safetensors", framework="pt") as content:
        assert set(content.keys()) == {"layer_0", "layer_3", "cls_token", "valid"}
        for name, layer in (("layer_3", expected.layers[0]), ("layer_0", expected.layers[1])):
            assert content.get_tensor(name).equal(layer.feature_map[0].half())
        assert content.get_tensor("valid").equal(expected.valid[0])  # type: ignore[index]
    assert run("features", source, "-o", tmp_path / "arrays", *MODEL, *flags, "--format", "npy").status == 0
    stacked = np.load(tmp_path / "arrays" / "a.npy")
    np.testing.assert_array_equal(stacked, np.stack([layer.feature_map[0].numpy() for layer in expected.layers]))
    assert run("features", source, "-o", tmp_path / "one", *MODEL, *SMALL, "--format", "npy").status == 0
    assert np.load(tmp_path / "one" / "a.npy").shape == (192, 2, 4)
    refused(1, "layer 4 does not exist", "features", source, "-o", tmp_path / "x", *MODEL, "--layers", "4")
    assert not (tmp_path / "x").exists()


def test_features_goes_on_after_a_bad_picture(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "broken.png", "c.png")
    ran = run("features", tmp_path / "in", "-o", tmp_path / "maps", *MODEL, *SMALL)
    index = tmp_path / "maps" / "index.jsonl"
    assert (ran.status, ran.out) == (3, "")
    assert f"wrote maps of 2 pictures to '{tmp_path / 'maps'}'; 1 could not be read, see '{index}'" in ran.err
    assert [row["file"] for row in listed(index)] == ["a.safetensors", None, "c.safetensors"]
    assert "cannot decode" in str(listed(index)[1]["error"])
    out = tmp_path / "strict"
    refused(1, "cannot decode", "features", tmp_path / "in", "-o", out, *MODEL, *SMALL, "--on-error", "raise")
    assert [row["file"] for row in listed(out / "index.jsonl")] == ["a.safetensors"], "what was finished is told"


def test_interrupted_features_keep_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    write: Callable[..., None] = features_command._write

    def interrupt(target: Path, *rest: object) -> None:
        if target.stem == "b":
            raise KeyboardInterrupt
        write(target, *rest)

    monkeypatch.setattr(features_command, "_write", interrupt)
    assert run("features", tmp_path / "in", "-o", tmp_path / "maps", *MODEL, *SMALL).status == 130
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["a.safetensors", "index.jsonl"]
    assert [row["file"] for row in listed(tmp_path / "maps" / "index.jsonl")] == ["a.safetensors"]


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    write_pictures(tmp_path, "in/a.png", "in/a.jpg", "other/a.png")
    words = r"'.*a\.jpg' and '.*a\.png' would both go to 'a\.safetensors'; give them in runs of their own"
    refused(1, words, "features", tmp_path / "in", "-o", tmp_path / "maps", *MODEL)
    pair = (tmp_path / "in" / "a.png", tmp_path / "other" / "a.png")
    assert run("features", *pair, "-o", tmp_path / "maps", *MODEL, *SMALL).status == 0
    assert (tmp_path / "maps" / "in" / "a.safetensors").is_file()
    refused(1, "is given twice; give it once", "features", pair[0], pair[0], "-o", tmp_path / "x", *MODEL)


# --- where to, and with what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "out", "words"),
    [
        ("embed", "x.csv", r"should end in \.npy, \.safetensors, \.parquet, or be a folder"),
        ("embed", "missing/x.npy", r"no folder '.*missing' to write '.*x\.npy' to; make it first"),
        ("embed", "there.npy", r"'.*there\.npy' exists already, and not from embed; give another name, or --overwrite"),
        ("embed", "beside.npy", r"'.*beside\.jsonl' exists already"),
        ("embed", "in", r"the folder '.*in' holds other things; give an empty one or another name"),
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
    """Found out before a model is loaded."""
    monkeypatch.setattr(Backbone, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    source = write_pictures(tmp_path, "in/a.png") / "in"
    for existing in ("there.npy", "beside.jsonl", "full/x"):
        (tmp_path / existing).parent.mkdir(exist_ok=True)
        (tmp_path / existing).write_text("")
    (tmp_path / "folder.npy").mkdir()
    refused(1, words, command, *(["pca"] if command == "show" else []), source, "-o", tmp_path / out)


def test_overwrite(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png")
    for command, out in (("embed", "x.npy"), ("features", "maps")):
        for flags in ((), ("--overwrite",)):
            assert run(command, tmp_path / "in", "-o", tmp_path / out, *MODEL, *SMALL, *flags).status == 0


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="wants a folder that nobody can write to")
@pytest.mark.parametrize("command", ["embed", "features"])
def test_a_place_that_cannot_be_written(command: str, tmp_path: Path) -> None:
    source = write_pictures(tmp_path, "a.png")
    out = "/proc/x.npy" if command == "embed" else "/proc/maps"
    refused(1, "'/proc", command, source, "-o", out, *MODEL, *SMALL)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pictures(tmp_path, "in/a.png") / "in"
    monkeypatch.setattr(os, "access", lambda *_: False)
    words = "'.*x.npy' cannot be written: no permission to write to '.*'; choose another place"
    refused(1, words, "embed", source, "-o", tmp_path / "x.npy", *MODEL)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-m", "vits-16"), "unknown model 'vits-16': did you mean 'vits16'"),
        (("-m", "nowhere.safetensors"), r"no weights at '.*nowhere\.safetensors'"),
        ((*MODEL, "--device", "abacus"), "device is 'auto', 'cpu'"),
        ((*MODEL, "--dtype", "int8"), "dtype"),
        ((*MODEL, "--size", "250", "--fit", "squash"), "size 250 is not a multiple of the patch size 16"),
        ((*MODEL, "--size", "own", "--fit", "crop"), "--size own goes with --fit native"),
    ],
    ids=lambda value: " ".join(str(v) for v in value[-2:]) if isinstance(value, tuple) else "",
)
def test_options_that_do_not_fit(flags: tuple[str, ...], words: str, tmp_path: Path) -> None:
    source = write_pictures(tmp_path, "in/a.png") / "in"
    refused(1, words, "features", source, "-o", tmp_path / "maps", *flags)
    assert not (tmp_path / "maps").exists()


def test_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is the model that comes with the package; where none does, a sentence says what to give."""
    source = write_pictures(tmp_path, "in/a.png") / "in"
    asked: list[str] = []

    def load(name: str, **_: object) -> Backbone:
        asked.append(name)
        raise dinov3_error

    dinov3_error: Dinov3Error = __import__("dinov3_infer").ModelNotFoundError("no weights of 'nano'")
    monkeypatch.setattr(Backbone, "from_pretrained", load)
    words = "no model was named, and this release holds no weights of its own; give -m with a name"
    refused(1, words, "embed", source, "-o", tmp_path / "x.npy")
    assert asked == ["nano"]
