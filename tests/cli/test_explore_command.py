"""`explore`: one page for several files, with their names; wrong options fail before a model is loaded."""

import json
import re
from pathlib import Path

import pytest
from cli_runs import refused, run, small_model, write_pictures
from repository import EXAMPLES

CAT = EXAMPLES / "cat.jpg"
MODEL = ("-m", small_model(), "--device", "cpu", "--size", "64")


def names(page: Path) -> list[str]:
    (found,) = re.findall(r'type="application/json">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return [one["name"] for one in json.loads(found)["images"]]


def test_a_page_of_a_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", "a.png", "b.png")
    ran = run("explore", tmp_path / "photos", CAT, "-o", tmp_path / "x.html", *MODEL)
    assert ran.status == 0 and ran.out == ""
    said = (
        rf"dinov3-infer: wrote .{tmp_path}/x\.html.: [\d,]+ patches; the largest error "
        r"of a cosine over [\d,]+ pairs is 0\.\d+\n"
    )
    assert re.fullmatch(said, ran.err)
    assert names(tmp_path / "x.html") == ["a.png", "b.png", "cat.jpg"]
    write_pictures(tmp_path / "other", "a.png")
    again = run("explore", tmp_path / "photos", tmp_path / "other", "-o", tmp_path / "x.html", "--overwrite", *MODEL)
    assert again.status == 0 and len(set(names(tmp_path / "x.html"))) == 3  # two files with one name keep their folders


@pytest.mark.parametrize(
    "flags, words",
    [
        (("-o", "x.png"), r"should end in \.html or \.htm"), (("-o", "none/x.html"), "no folder"),
        (("-o", "x.html", "--fit", "pad"), "does not show padding"),
        (("-o", "x.html", "--fit", "squash", "--size", "own"), "--size own needs --fit native"),
    ],
)  # fmt: skip
def test_what_does_not_go(flags: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(1, words, "explore", CAT, "-m", small_model(), "--device", "cpu", *flags)


def test_too_many_images(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", *(f"{i}.png" for i in range(65)))
    refused(1, "65 images do not fit on one page", "explore", tmp_path / "photos", "-o", tmp_path / "x.html", *MODEL)
