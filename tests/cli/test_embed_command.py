"""`embed` writes the vectors of the library."""

from pathlib import Path

import numpy as np
import pytest
from cli_runs import listed, refused, run, small_model, vectors, write_pictures

MODEL = ("-m", small_model(), "--device", "cpu")

SMALL = ("--size", "64")


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


def test_embed_goes_on_after_a_bad_image(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "broken.png", "c.png")
    out = tmp_path / "x.npy"
    ran = run("embed", tmp_path / "in", "-o", out, *MODEL, *SMALL)
    assert (ran.status, ran.out) == (3, "")
    assert f"3 vectors of 192 numbers; 1 could not be read (its row is NaN), see '{tmp_path / 'x.jsonl'}'" in ran.err
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
    """A missing path in a list affects only its row, since programs write such lists."""
    write_pictures(tmp_path, "a.png")
    (tmp_path / "list").write_text(f"{tmp_path / 'a.png'}\n{tmp_path / 'gone.png'}\n")
    assert run("embed", f"@{tmp_path / 'list'}", "-o", tmp_path / "x.npy", *MODEL, *SMALL).status == 3
    assert "no image at" in str(listed(tmp_path / "x.jsonl")[1]["error"])
