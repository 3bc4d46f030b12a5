"""`embed search`, `embed dedup` and `embed curate`: from pictures to a sheet and to lists."""

from pathlib import Path
from typing import Any

from cli_runs import refused, run, small_model, write_pictures
from PIL import Image

from dinov3_infer.train import open_data


def test_commands(tmp_path: Path) -> None:
    """From pictures to a sheet of what is alike, and to lists; the query is embedded as the vectors were."""
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
    assert "8 of 10 pictures; 1 are like others, 1 have no vector" in ran.err
    ran = run("embed", "curate", vectors, "-o", tmp_path / "c.txt", "-n", "4", "--clusters", "3", "--within",
              tmp_path / "kept.txt")  # fmt: skip
    assert ran.status == 0 and len(open_data(tmp_path / "c.txt")) == 4
    assert "copy.png" not in (tmp_path / "c.txt").read_text()
    refused(1, "-n for a balanced sample, or --seeds", "embed", "curate", vectors, "-o", tmp_path / "d.txt")
    for words, command, *options in (
        ("give --seeds too", "curate", "--nearest", "3", "-n", "2"),
        ("leave it out, or --seeds", "curate", "--seeds", vectors, "--clusters", "3"),
        ("give --against too", "dedup", "--against-threshold", "0.5"),
    ):
        refused(1, words, "embed", command, vectors, "-o", tmp_path / "d.txt", *options)
    other: Any = ("-m", tmp_path / "other", "--device", "cpu")
    from dinov3_infer import Backbone

    Backbone.from_config("nano", seed=1).save_pretrained(tmp_path / "other")
    refused(1, "was made with other weights than", "embed", "search", album / "3.png", vectors, *other)
