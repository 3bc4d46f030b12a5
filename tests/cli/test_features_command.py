"""`features` writes the maps of the library, one file per image."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives import CONTENT, write_table, write_tar
from cli_runs import listed, refused, run, small_model, write_pictures
from safetensors import safe_open

from dinov3_infer import Backbone
from dinov3_infer.cli import features as features_command

MODEL = ("-m", small_model(), "--device", "cpu")

SMALL = ("--size", "64")


def test_features_writes_what_the_library_gives(tmp_path: Path) -> None:
    """One file per image, in the folders of the images, each with the size of its image."""
    write_pictures(tmp_path / "in", "a.png", "sub/a.png", "sub/b.jpg")
    ran = run("features", tmp_path / "in", "-o", tmp_path / "maps", *MODEL)
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == f"dinov3-infer: wrote maps of 3 images to '{tmp_path / 'maps'}'\n"
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


def test_features_goes_on_after_a_bad_image(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "broken.png", "c.png")
    ran = run("features", tmp_path / "in", "-o", tmp_path / "maps", *MODEL, *SMALL)
    index = tmp_path / "maps" / "index.jsonl"
    assert (ran.status, ran.out) == (3, "")
    assert f"wrote maps of 2 images to '{tmp_path / 'maps'}'; 1 could not be read, see '{index}'" in ran.err
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


def test_two_images_of_one_name(tmp_path: Path) -> None:
    write_pictures(tmp_path, "in/a.png", "in/a.jpg", "other/a.png")
    words = r"'.*a\.jpg' and '.*a\.png' would both be written to 'a\.safetensors'; use one command and one folder"
    refused(1, words, "features", tmp_path / "in", "-o", tmp_path / "maps", *MODEL)
    pair = (tmp_path / "in" / "a.png", tmp_path / "other" / "a.png")
    assert run("features", *pair, "-o", tmp_path / "maps", *MODEL, *SMALL).status == 0
    assert (tmp_path / "maps" / "in" / "a.safetensors").is_file()
    refused(1, "is given twice; give it once", "features", pair[0], pair[0], "-o", tmp_path / "x", *MODEL)


def test_features_of_archives(tmp_path: Path) -> None:
    """It takes the same sources as embed; images of an archive or table are named as in it."""
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
