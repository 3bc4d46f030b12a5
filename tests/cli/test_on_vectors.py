"""`embed search`, `embed dedup` and `embed curate`: from images to a sheet and to lists."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_runs import refused, run, small_model, write_pictures
from PIL import Image

from dinov3_infer import Backbone
from dinov3_infer.train import open_data


def test_commands(tmp_path: Path) -> None:
    """From images to a contact sheet of similar ones, and to lists; the query is embedded like the vectors."""
    album = write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(8)), "broken.png")
    Image.open(album / "3.png").save(album / "copy.png")
    vectors, model = tmp_path / "x.npy", ("-m", small_model(), "--device", "cpu")
    assert run("embed", album, "-o", vectors, *model, "--size", "32", "--pooling", "mean").status == 3
    ran = run("embed", "search", album / "3.png", vectors, "-k", "3", *model, "-o", tmp_path / "s.png", "-o",
              tmp_path / "s.txt")  # fmt: skip
    lines = [line.split("\t") for line in ran.out.splitlines()]
    found = [Path(name).name for _, name in lines]
    assert ran.status == 0 and found[0] == "copy.png" and "3.png" not in found and len(found) == 3  # not the query
    assert (
        lines[0][0] == "1.0000"
        and Image.open(tmp_path / "s.png").width > 600
        and len(open_data(tmp_path / "s.txt")) == 3
    )
    ran = run("embed", "dedup", vectors, "-o", tmp_path / "kept.txt", "--threshold", "0.9999", "--plain")
    assert ran.out == f"{album / 'copy.png'}\t{album / '3.png'}\n"
    assert "kept 8 of 10 images; duplicates: 1, without a vector: 1" in ran.err
    ran = run("embed", "curate", vectors, "-o", tmp_path / "c.txt", "-n", "4", "--clusters", "3", "--within",
              tmp_path / "kept.txt")  # fmt: skip
    assert ran.status == 0 and len(open_data(tmp_path / "c.txt")) == 4
    assert "copy.png" not in (tmp_path / "c.txt").read_text()
    refused(1, "-n for a balanced subset, or --seeds", "embed", "curate", vectors, "-o", tmp_path / "d.txt")
    for words, command, *options in (
        ("add --seeds", "curate", "--nearest", "3", "-n", "2"),
        ("does not work with --seeds", "curate", "--seeds", vectors, "--clusters", "3"),
        ("add --against", "dedup", "--against-threshold", "0.5"),
    ):
        refused(1, words, "embed", command, vectors, "-o", tmp_path / "d.txt", *options)
    other: Any = ("-m", tmp_path / "other", "--device", "cpu")
    Backbone.from_config("nano", seed=1).save_pretrained(tmp_path / "other")
    refused(1, "was made with other weights", "embed", "search", album / "3.png", vectors, *other)


def test_search_takes_the_model_of_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for a folder of weights in another place too; if it is gone, the error names it."""
    album = write_pictures(tmp_path / "in", "a.png", "b.png")
    weights = Backbone.from_config("nano", seed=3).save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert run("embed", album, "-o", "x.npy", "-m", "mine", "--device", "cpu", "--size", "32").status == 0
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    ran = run("embed", "search", album / "b.png", "../x.npy", "-k", "1", "--device", "cpu")
    assert ran.status == 0 and ran.out.startswith("1.0000")
    shutil.move(weights, tmp_path / "gone")
    refused(1, f"made with '{tmp_path / 'mine'}', which cannot be", "embed", "search", album / "b.png", "../x.npy")
    other = Backbone.from_config("nano", seed=4).save_pretrained(tmp_path / "mine")
    refused(1, f"than '{other}' now has", "embed", "search", album / "b.png", "../x.npy", "--device", "cpu")
    ran = run("embed", "search", album / "b.png", "../x.npy", "-k", "1", "--device", "cpu", "-m", tmp_path / "gone")
    assert ran.status == 0


@pytest.mark.parametrize("flags", [(), ("--plain",), ("--threshold", "1"), ("--plain", "--threshold", "1")], ids=str)
@pytest.mark.parametrize("count", [1, 2, 6])
def test_dedup_finds_exact_copies(flags: tuple[str, ...], count: int, tmp_path: Path) -> None:
    """This holds with whitening too, which leaves almost nothing of a few images or of copies only."""
    album = write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(count)))
    for i in range(count):
        shutil.copy(album / f"{i}.png", album / f"{i}-copy.png")
    assert run("embed", album, "-o", tmp_path / "x.npy", "-m", small_model(), "--device", "cpu").status == 0
    ran = run("embed", "dedup", tmp_path / "x.npy", "-o", tmp_path / "kept.txt", *flags)
    kept = {Path(name).stem for name in (tmp_path / "kept.txt").read_text().splitlines()}
    assert ran.status == 0 and kept and not any({f"{i}", f"{i}-copy"} <= kept for i in range(count))
    against = ("--against", tmp_path / "x.npy")
    ran = run("embed", "dedup", tmp_path / "x.npy", "-o", tmp_path / "none.txt", *against, *flags)
    assert "there is nothing to write" in ran.err, "all are like those of the set itself"
