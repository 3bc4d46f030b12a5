"""`--levels` of the commands, and `levels` of a training run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import photo
from PIL import Image

from dinov3_infer import Backbone
from dinov3_infer.cli.main import main
from dinov3_infer.errors import ImageError, InputError
from dinov3_infer.train import open_data
from dinov3_infer.train.command import parse

GREY = photo(48, 64)[..., 0].astype(np.uint16) * 16


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for i in range(3):
        Image.fromarray(np.roll(GREY, 7 * i, 1)).save(tmp_path / "scans" / f"{i}.tif")
    return tmp_path / "scans"


@pytest.mark.parametrize("levels", ["0,4095", "full", "percentile"])
def test_embed(scans: Path, levels: str, tmp_path: Path) -> None:
    out = tmp_path / "v.npy"
    given = ["embed", str(scans), "-o", str(out), "--device", "cpu", "--size", "32", "--levels", levels]
    assert main(given) == 0
    asked: Any = (0, 4095) if "," in levels else levels
    want = Backbone.from_pretrained("nano", device="cpu").embed(scans, size=32, levels=asked)
    assert np.array_equal(np.load(out), want)


def test_without_levels_the_rows_say_what_is_missing(scans: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["embed", str(scans), "-o", str(tmp_path / "v.npy"), "--device", "cpu"]) == 1
    assert "--levels LOW,HIGH" in capsys.readouterr().err


def test_a_rerun_with_other_levels_is_refused(scans: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["embed", str(scans), "-o", str(tmp_path / "v.npy"), "--device", "cpu", "--size", "32", "--levels"]
    assert main([*given, "0,4095"]) == 0 and main([*given, "0,4095"]) == 0 and main([*given, "full"]) == 1
    assert "levels" in capsys.readouterr().err


@pytest.mark.parametrize("levels", ["4095", "1,0", "a,b", "half"])
def test_levels_that_are_none(scans: Path, tmp_path: Path, levels: str, capsys: Any) -> None:
    assert main(["embed", str(scans), "-o", str(tmp_path / "v.npy"), "--levels", levels]) in (1, 2)
    assert "levels" in capsys.readouterr().err and not (tmp_path / "v.npy").exists()


def test_features_show_and_search(scans: Path, tmp_path: Path, capsys: Any) -> None:
    rest = ["--device", "cpu", "--size", "64", "--levels", "0,4095"]
    assert main(["features", str(scans), "-o", str(tmp_path / "maps"), *rest]) == 0
    lines = (tmp_path / "maps" / "index.jsonl").read_text().splitlines()
    assert len(lines) == 3 and not any(json.loads(line)["error"] for line in lines)
    assert main(["show", "pca", str(scans), "-o", str(tmp_path / "pca.png"), *rest]) == 0
    assert main(["show", "attention", str(scans / "0.tif"), "-o", str(tmp_path / "a.png"), *rest]) == 0
    assert main(["embed", str(scans), "-o", str(tmp_path / "v.npy"), *rest]) == 0
    capsys.readouterr()
    sheet = str(tmp_path / "sheet.png")
    assert main(["embed", "search", str(scans / "1.tif"), str(tmp_path / "v.npy"), "-k", "1", "-o", sheet]) == 0
    found = capsys.readouterr().out.split()[1]  # not the query itself
    assert found.endswith(".tif") and not found.endswith("1.tif") and Path(sheet).exists()


def test_training_reads_by_levels(scans: Path) -> None:
    with pytest.raises(ImageError, match="levels="):
        open_data(scans)[0]
    found = open_data(scans, "0,4095")[0]
    assert np.abs(found[0].numpy().astype(float) - GREY / 4095 * 255).max() <= 1
    with pytest.raises(InputError, match="levels"):
        open_data(scans, "much")
    config, _ = parse(["--data", str(scans), "--out", "run", "--levels", "0,4095"])
    assert config.levels == "0,4095"
