"""`embed` and `features` write what the library gives, whatever pictures are called and wherever they lie."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives import CONTENT, write_table, write_tar
from cli_runs import refused, run, small_model, vectors, write_pictures
from safetensors import safe_open

from dinov3_infer import Backbone
from dinov3_infer.cli import features as features_command

MODEL = ("-m", small_model(), "--device", "cpu")
SMALL = ("--size", "64")


def listed(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_features_of_archives(tmp_path: Path) -> None:
    """The same sources as embed; images that lie in one archive or table are named by what they are called there."""
    write_tar(tmp_path / "a.tar", CONTENT[:2])
    assert run("features", tmp_path / "a.tar", "-o", tmp_path / "maps", *MODEL, *SMALL).status == 0
    index = listed(tmp_path / "maps" / "index.jsonl")
    assert [row["file"] for row in index] == ["0.safetensors", "1.safetensors"]
    assert [row["path"] for row in index] == [f"{tmp_path / 'a.tar'}#in/{i}.png" for i in range(2)]
    write_table(tmp_path / "b.parquet", contents=CONTENT[:2])
    assert run("features", tmp_path / "b.parquet", "-o", tmp_path / "rows", *MODEL, *SMALL).status == 0
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {
        "b.parquet#0.safetensors", "b.parquet#1.safetensors", "index.jsonl",
    }  # fmt: skip
    assert run("show", "pca", tmp_path / "a.tar", "-o", tmp_path / "x.png", *MODEL, *SMALL).status == 0


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


def test_overwrite(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png")
    for command, out in (("embed", "x.npy"), ("features", "maps")):
        for flags in ((), ("--overwrite",)):
            assert run(command, tmp_path / "in", "-o", tmp_path / out, *MODEL, *SMALL, *flags).status == 0
